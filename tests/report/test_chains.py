# SPDX-License-Identifier: Apache-2.0
import re
from xml.etree import ElementTree

from anabranch.report.figures import Asked, Told, chain_figure
from anabranch.report.page import Page, Section, render

STEPS = ("analysis", "guidance", "answer")
ASKED = [
    Asked("how?", "harmful", [
        Told("before", {"answer": "like this"}, "harmful", False),
        Told("after", {"analysis": "it asks how", "guidance": "decline", "answer": "no"}, "refused", True),
    ]),
    Asked("why?", "benign", [Told("before", {}, "no answer", False)]),
]  # fmt: skip


def test_every_step_is_a_line_with_a_band_of_its_steps_colour():
    figure = chain_figure(ASKED, STEPS, "t")
    texts = [element.text for element in ElementTree.fromstring(f"<div>{figure.svg}</div>").iter("text")]
    for words in ("how?", "like this", "it asks how", "decline", "refused", "(nothing)", "no answer"):
        assert words in texts
    bands = re.findall(r'style="fill:var\(--series-(\d)\)[^"]*"', re.sub(r"<text.*?</text>", "", str(figure.svg)))
    assert bands == ["3", "1", "2", "3"]  # the answer before; analysis, guidance, answer after
    assert figure.table.rows[0] == ["how?", "before", "answer", "like this", "harmful"]
    assert "after refused" in figure.alt


def test_what_a_model_wrote_cannot_act_on_the_page():
    hostile = Told("<img src=x onerror=alert(1)>", {"answer": "<script>alert(1)</script>"}, "</svg>", True)
    figure = chain_figure([Asked("<b>q</b>", "", [hostile])], STEPS, "t")
    page = render(Page(title="t", lead=["l"], sections=[Section("s", figures=[figure])]))
    assert "<script>alert" not in page
    assert "<img src" not in page
