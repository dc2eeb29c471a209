# SPDX-License-Identifier: Apache-2.0
"""`anabranch demo experts` with a few windows of each text: what is written, and that the page says what was found."""

import json
import re

import pytest

from anabranch import cli
from anabranch.data.six_domains import DOMAINS
from anabranch.jobs.demo_all_page import SHOWN
from anabranch.jobs.experts import demo as job


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PROFILED", 10), ("ASKED", 4), ("SWITCHED", 2)):
            patch.setattr(job, name, value)
        assert cli.main(["demo", "experts", "--out", str(out)]) == 0
    return out


def test_every_expert_was_switched_off_once_and_every_number_has_its_text(run):
    told = json.loads((run / "experts-demo.json").read_text())
    assert {(row["layer"], row["expert"]) for row in told["off"]} == {(i, e) for i in range(4) for e in range(8)}
    assert all(set(row["change"]) == set(DOMAINS) for row in told["off"])
    for layer in told["load"]:
        assert [sum(column) for column in zip(*layer, strict=True)] == pytest.approx([1.0] * len(DOMAINS))
    assert {"frequency", "easy_ep", "random"} <= set(told["rankings"]["rows"])
    assert {row["arm"] for row in told["seals"]} == {"as it is", "4 experts of law off", "4 random experts off"}
    assert set(told["pruned"]["losses"]) == {"easy_ep", "random, mean of 3"}


def test_the_page_says_what_was_found_and_needs_nothing_else(run):
    page = (run / "report.html").read_text()
    told = json.loads((run / "experts-demo.json").read_text())
    worst = max((found["mean"], row["layer"], row["expert"]) for row in told["off"] for found in row["change"].values())
    assert f"Expert {worst[1]}.{worst[2]} matters most" in page
    assert all(f">{domain}<" in page for domain in DOMAINS)
    assert not re.findall(r'(?:src|href)="(?!#)', page.replace('href="data:', ""))
    assert len(page) < 3_000_000


def test_options_that_would_do_nothing_are_refused(tmp_path, capsys):
    for more in (["--steps", "5"], ["--seeds", "3"], ["--resume"]):
        assert cli.main(["demo", "experts", "--out", str(tmp_path / "x"), *more]) == 2
    assert not (tmp_path / "x").exists()
    assert "would change nothing" in capsys.readouterr().err


def test_the_page_of_all_demos_shows_its_first_sentences_and_a_picture(run):
    shown = SHOWN["experts"](run)
    assert "matters most to one text" in shown.sentences[0]
    assert shown.figure.caption.startswith("From text to expert")
