# SPDX-License-Identifier: Apache-2.0
"""The figures are what the layer computes now, and are drawn in the colours of the page."""

import sys
from xml.etree import ElementTree

import pytest

from tests.docs.pages import DOCS

sys.path.insert(0, str(DOCS / "figures"))

import draw


@pytest.mark.parametrize("name", sorted(draw.FIGURES))
def test_the_file_is_what_the_script_draws(name):
    assert (DOCS / f"figures/{name}.svg").read_text(encoding="utf-8") == draw.FIGURES[name]()


def test_every_figure_is_shown_with_words_for_those_who_cannot_see_it():
    page = (DOCS / "layer.md").read_text(encoding="utf-8")
    for name in draw.FIGURES:
        before, found, _ = page.partition(f"](figures/{name}.svg)")
        assert found, name
        assert len(before.rpartition("![")[2]) > 20, name
        assert ElementTree.fromstring(draw.FIGURES[name]()).find("{http://www.w3.org/2000/svg}title").text


def test_no_colour_is_written_into_a_shape():
    """Colours are classes: one written into a shape would stay as it is in the dark."""
    for name, figure in draw.FIGURES.items():
        body = ElementTree.fromstring(figure())
        assert not [shape for shape in body.iter() if {"fill", "stroke", "style"} & set(shape.attrib)], name
