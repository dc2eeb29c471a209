# SPDX-License-Identifier: Apache-2.0
"""Streams as wide as what flows, and their table."""

import re

import numpy as np
import pytest

from anabranch.report.flow import HEIGHT, flow, places


def test_blocks_fit_without_touching():
    sizes = np.array([100.0, 50.0, 150.0])
    tops = places(sizes)
    assert tops[0] >= 0
    assert tops[-1] + sizes[-1] <= HEIGHT + 1e-9
    assert (tops[1:] - (tops[:-1] + sizes[:-1]) >= 0).all()


def test_every_share_is_in_the_table_and_thin_streams_are_left_out_of_the_picture():
    figure = flow([[99.0, 1.0], [40.0, 60.0]], ["law", "maths"], ["expert 0", "expert 1"], "From text to expert")
    assert figure.table.columns == ["from", "expert 0", "expert 1"]
    assert figure.table.rows[0][1:] == ["99.0", "1.0"]
    assert "law mostly to expert 0" in figure.alt
    assert "maths mostly to expert 1" in figure.alt
    assert len(re.findall("<path", str(figure.svg))) == 3 + 4  # streams above 2 %, and a block a name


def test_names_can_not_break_out_of_the_picture():
    figure = flow([[1.0]], ["<script>alert(1)</script>"], ["&"], "t")
    assert "<script" not in str(figure.svg)


@pytest.mark.parametrize("shares", [[[1.0, 2.0]], [[np.nan]], [[-1.0]], [[0.0]]])
def test_what_is_no_flow_is_refused(shares):
    with pytest.raises(ValueError, match="shares: expected"):
        flow(shares, ["a"], ["b"], "t")
