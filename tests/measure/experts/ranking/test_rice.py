# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.measure.experts.ranking import rice
from anabranch.measure.experts.ranking.batches import Batch, read_stats
from anabranch.models.mixtures.families import tiny
from tests.measure.experts.handmade import handmade, recorded


def test_closed_forms():
    # 20 tokens, 4 of them x: expert 0 exactly at x, 1 at a quarter of both, 2 never at x, 3 never, 4 always
    stats = handmade({"x": 4, "rest": 16}, count={"x": [[4, 1, 0, 0, 4]], "rest": [[0, 4, 16, 0, 16]]})
    assert rice.rank(stats, "x", ["rest"])[0].tolist() == pytest.approx([1, 0, -1, -1, 0], abs=1e-12)


def slow_npmi(together, marker, expert, total):
    if together == 0:
        return -1.0
    p_xe = together / total
    return math.log(p_xe / ((marker / total) * (expert / total))) / -math.log(p_xe)


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 12), min_size=3, max_size=3),
    shares=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    sign=st.floats(-2, 2),
)
def test_equals_the_slow_formula_and_stays_between_its_bounds(tokens, shares, sign):
    counts = [round(share * of) for share, of in zip(shares, tokens, strict=True)]
    names = ["x", "y", "rest"]
    stats = handmade(
        dict(zip(names, tokens, strict=True)), count={n: [[c]] for n, c in zip(names, counts, strict=True)}
    )
    total, chosen = sum(tokens), sum(counts)
    x, y = (slow_npmi(counts[i], tokens[i], chosen, total) for i in (0, 1))
    assert float(rice.rank(stats, "x", ["y", "rest"])) == pytest.approx(x, abs=1e-9)
    assert -1 - 1e-9 <= x <= 1 + 1e-9
    signed = rice.rank(stats, "x", ["y", "rest"], signs={"x": 1.0, "y": sign})
    assert float(signed) == pytest.approx(x + sign * y, abs=1e-9)


def test_the_markers_own_position_counts_also_behind_padding():
    model, marker = tiny("OLMoE"), 5
    ids = torch.randint(10, 90, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # on the left
    for b, s in ((0, 4), (1, 0), (2, 7)):
        ids[b, s] = marker
    batch = Batch(ids, mask, (ids != marker).long(), torch.zeros(3, dtype=torch.int64))
    stats = read_stats(model, [batch], ["marker", "rest"], num_folds=1)
    for layer, seen in enumerate(recorded(model, batch)):
        count = torch.zeros(8)
        for row in (0 * 8 + 4, 1 * 8 + 0, 2 * 8 + 7):
            count[seen.triple.selected_experts[row]] += 1
        assert stats.of("count", "marker")[layer].tolist() == count.tolist()
    assert bool((rice.rank(stats, "marker", ["rest"])[stats.of("count", "marker") == 0] == -1).all())


def test_a_marker_that_was_not_read_is_named():
    stats = handmade({"<think>": 1, "rest": 3}, count={"<think>": [[1]], "rest": [[1]]})
    with pytest.raises(UsageError, match=r"'<thnik>' is not among the tokens[\s\S]*did you mean <think>"):
        rice.rank(stats, "<think>", ["rest"], signs={"<thnik>": 1})
    with pytest.raises(UsageError, match="ranked against other labels"):
        rice.rank(stats, "<think>")
