# SPDX-License-Identifier: Apache-2.0
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from anabranch.report import page as page_module
from anabranch.report.figures import curves
from anabranch.report.page import Figure, Page, Section, Table, render, standalone, write

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title></svg><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &amp; <!-- -->",
    "]]><![CDATA[",
    "javascript:alert(1)",
    "المجال الأول",
    "abc\u202egpj.exe",
    "nul\x00 escape\x1b[31m lone \udcff",
    "very_long_name_" * 400,
    "two\nlines\tand a tab",
    "$\\frac{",
    "🦊画像",
    "",
]


class Outline(HTMLParser):
    """What a browser would build: the open tags, and whether every one is closed in order."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def outline(html):
    parser = Outline()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def small_figure(label="accuracy"):
    table = Table(label, ["task", label], [[label, 1.5], ["other", None]])
    return Figure(Markup('<svg viewBox="0 0 1 1"></svg>'), label, label or "a picture", table)


def page_about(label):
    table = Table(label, [label, "value"], [[label, 3], ["missing", float("nan")]], [label])
    sections = [
        Section(label, [label], [small_figure(label or "–")], [table], kind) for kind in ("plain", "caution", "detail")
    ]
    return Page(label, [label, label], [(label, label)], sections)


@pytest.mark.parametrize("label", HOSTILE)
def test_hostile_labels_are_inert_and_the_page_stays_whole(label):
    html = render(page_about(label))
    seen, harmless = outline(html), outline(render(page_about("label")))
    assert seen.tags == harmless.tags
    assert [(tag, name) for tag, name, _ in seen.attributes] == [(tag, name) for tag, name, _ in harmless.attributes]
    html.encode("utf-8")
    assert not re.search("[\x00\x1b\u202e]", html)


def test_a_page_fetches_nothing_and_runs_nothing():
    html = render(page_about("label"))
    seen = outline(html)
    assert "://" not in html
    assert "@import" not in html
    assert "url(" not in html
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(seen.tags)
    assert not [name for _, name, _ in seen.attributes if name.startswith("on")]
    assert all(value.startswith("#") for _, name, value in seen.attributes if name == "href")
    policy = next(value for _, name, value in seen.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


def test_every_figure_has_words_and_a_table_and_every_table_has_headers():
    html = render(Page("title", ["verdict"], (), [Section("one", figures=[small_figure(), small_figure("loss")])]))
    figures = re.findall(r"<figure>.*?</figure>", html, re.S)
    assert len(figures) == 2
    for figure in figures:
        assert re.search(r'role="img" aria-label="[^"]+"', figure)
        assert "<figcaption>" in figure
        assert re.search(r"<details[^>]*>.*<table>.*</details>", figure, re.S)
    assert html.count('<th scope="col"') == 4
    assert html.count('<th scope="row"') == 4


def test_the_same_page_gives_the_same_bytes():
    assert render(page_about("label")) == render(page_about("label"))


def test_missing_numbers_print_as_a_dash_and_an_empty_table_says_so():
    html = render(page_about("label"))
    assert '<td class="number">–</td>' in html
    assert "nan" not in html.lower()
    empty = Section("empty", tables=[Table("Unreadable files", ["file", "reason"], [])])
    assert "Nothing was recorded." in render(Page("title", ["verdict"], (), [empty]))


def test_a_picture_that_is_not_marked_safe_is_printed_not_drawn():
    figure = Figure("<svg onload=alert(1)>", "caption", "alt", Table("t", ["a"], [["b"]]))
    assert "&lt;svg onload" in render(Page("title", ["verdict"], (), [Section("one", figures=[figure])]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Page("title", "one sentence"), "lead: expected a list of sentences, received one string"),
        (lambda: Section("title", text="one paragraph"), "text: expected a list"),
        (lambda: Section("title", kind="loud"), "kind: expected plain, caution or detail, received 'loud'"),
        (lambda: Table("t", ["a", "b"], [["only one"]]), "rows: expected 2 cells"),
        (lambda: Figure(Markup(""), "c", " ", Table("t", [], [])), "alt: expected a sentence"),
    ],
)
def test_wrong_records_say_what_was_expected(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_writing_replaces_the_page_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "run" / "report.html"
    write(Page("first", ["verdict"]), path)
    write(Page("second", ["verdict"]), path)
    assert path.read_bytes() == render(Page("second", ["verdict"])).encode()
    assert list(path.parent.iterdir()) == [path]


class Unprintable:
    def __str__(self):
        raise RuntimeError("no text")


def test_a_page_that_cannot_be_rendered_leaves_the_old_one(tmp_path):
    path = write(Page("old", ["verdict"]), tmp_path / "report.html")
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="no text"):
        write(Page("new", ["verdict"], [("fact", Unprintable())]), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_that_cannot_be_put_in_place_leaves_no_scraps(tmp_path):
    occupied = tmp_path / "report.html"
    (occupied / "something").mkdir(parents=True)
    with pytest.raises(OSError, match=r"report\.html"):
        write(Page("new", ["verdict"]), occupied)
    assert list(tmp_path.iterdir()) == [occupied]


def test_the_page_alone_imports_neither_torch_nor_matplotlib():
    code = "import sys, anabranch.report.page; print(sorted({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def blend(color, ground, opacity):
    pairs = [(int(color[i : i + 2], 16), int(ground[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(opacity * top + (1 - opacity) * below):02x}" for top, below in pairs)


def test_type_is_readable_on_every_ground_in_light_and_dark():
    """WCAG AA asks for a ratio of 4.5 between type and what is behind it."""
    from anabranch.report.maps import STRONGEST

    css = (Path(page_module.__file__).parent / "style.css").read_text()
    palettes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{.*?\}", css, re.S)
    ]
    palettes = [palette for palette in palettes if palette]
    assert len(palettes) == 2
    for colors in palettes:
        ground = colors["ground"]
        for name in ["ink", "muted", "accent", *(f"series-{index}" for index in range(1, 7))]:
            assert contrast(colors[name], ground) >= 4.5, name
        assert contrast(colors["muted"], colors["wash"]) >= 4.5
        for name in ("gain", "harm"):
            assert contrast(colors["ink"], blend(colors[name], ground, STRONGEST)) >= 4.5, name


def test_a_standalone_picture_is_xml_and_knows_its_colours():
    figure = curves({"a": ([0, 1], [1.0, 2.0], None, None)}, "x", "y", "A picture")
    text = standalone(figure)
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    used, defined = (set(re.findall(pattern, text)) for pattern in (r"var\((--[\w-]+)", r"(--[\w-]+):"))
    assert used <= defined


def test_a_page_links_to_what_lies_beside_it_and_to_nothing_else():
    page = render(Page("t", ["said"], sections=[Section("s", links=[("the page of <b>", "erase/report.html")])]))
    assert '<p class="link"><a href="erase/report.html">the page of &lt;b&gt;</a></p>' in page
    for file in ("https://example.org", "javascript:alert(1)", "/etc/passwd", "../x.html", "a/../../x", "//host/x", ""):
        with pytest.raises(ValueError, match="expected a file beside the page"):
            Section("s", links=[("elsewhere", file)])
