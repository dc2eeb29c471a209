# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.reuse.serve.placement import Chunk, Cost, Devices, Plan, balanced, contiguous, cost, least_loaded, native

HEAVY = st.lists(st.one_of(st.integers(0, 50), st.integers(0, 100_000)), min_size=1, max_size=24)


def test_a_plan_by_hand():
    """Two devices, 100 tokens, cap 55: expert 0 (70) leaves 45 at home, where expert 1 (10) is still to come."""
    plan = least_loaded([70, 10, 15, 5], [0, 0, 1, 1], 2, min_chunk=1)
    assert plan.cap == 55
    assert plan.chunks == (
        Chunk(0, 0, 0, 45), Chunk(0, 1, 45, 70), Chunk(1, 0, 0, 10), Chunk(2, 1, 0, 15), Chunk(3, 1, 0, 5),
    )  # fmt: skip
    assert plan.load == [55, 45]
    assert plan.transfers == [(0, 1)]


def test_chunks_go_to_the_least_loaded_that_is_by_hand():
    """Three devices, 90 tokens, cap 30: 80 of expert 0 at home 30, then 29 to device 2 (one waits there), 21 to 1."""
    plan = least_loaded([80, 9, 1], [0, 1, 2], 3, factor=1.0, min_chunk=1)
    assert plan.chunks == (
        Chunk(0, 0, 0, 30), Chunk(0, 2, 30, 59), Chunk(0, 1, 59, 80), Chunk(1, 1, 0, 9), Chunk(2, 2, 0, 1),
    )  # fmt: skip
    assert plan.load == [30, 30, 30]


def test_small_chunks_stay_together_unless_forced_by_hand():
    """As before with chunks of 25 or more: 29 to device 2; the 21 that are left are all that is left."""
    plan = least_loaded([80, 9, 1], [0, 1, 2], 3, factor=1.0, min_chunk=25)
    assert plan.load == [30, 30, 30]
    # none has room for 40: 40 go to device 2, the last 10 to device 1, and expert 2 finds its home too full
    forced = least_loaded([80, 9, 1], [0, 1, 2], 3, factor=1.0, min_chunk=40)
    assert forced.chunks[:3] == (Chunk(0, 0, 0, 30), Chunk(0, 2, 30, 70), Chunk(0, 1, 70, 80))
    assert forced.transfers == [(0, 1), (0, 2), (2, 1)]
    assert forced.load == [30, 20, 40]


def all_to_one(tokens, owner, num_devices, cap, min_chunk):
    """The rest that finds no room for a chunk, all to the device that was least loaded: highest load."""
    load = native(tokens, owner, num_devices).load
    for e in sorted(range(len(owner)), key=lambda e: -tokens[e]):
        load[owner[e]] -= tokens[e]
        mine = max(0, min(tokens[e], cap - load[owner[e]]))
        load[owner[e]], left = load[owner[e]] + mine, tokens[e] - mine
        while left:
            device = min((d for d in range(num_devices) if d != owner[e]), key=lambda d: load[d])
            size = min(left, cap - load[device])
            size = size if size >= min_chunk or size == left else left
            load[device], left = load[device] + size, left - size
    return max(load)


def test_what_finds_no_room_for_a_chunk_is_spread_and_not_put_on_one_device():
    """Nine devices, cap 98: 702 tokens leave home, eight have room for 88 each, which is no chunk of 100."""
    tokens, owner = [800, *[10] * 8], list(range(9))
    plan = least_loaded(tokens, owner, 9, factor=1.0, min_chunk=100)
    assert plan.cap == 98
    assert max(plan.load) <= 98 + 99
    assert all_to_one(tokens, owner, 9, plan.cap, 100) > 5 * plan.cap
    assert all_to_one(tokens, owner, 9, plan.cap, 1) == max(
        least_loaded(tokens, owner, 9, factor=1.0, min_chunk=1).load
    )


@settings(max_examples=300, deadline=None)
@given(HEAVY, st.integers(1, 8), st.sampled_from([1.0, 1.1, 1.5]), st.sampled_from([1, 7, 1024]), st.data())
def test_every_token_is_placed_once_and_no_load_is_above_the_cap_and_a_chunk(tokens, P, factor, min_chunk, data):
    owner = data.draw(st.lists(st.integers(0, P - 1), min_size=len(tokens), max_size=len(tokens)))
    plan = least_loaded(tokens, owner, P, factor=factor, threshold=1.0, min_chunk=min_chunk)
    for expert, count in enumerate(tokens):
        own = [chunk for chunk in plan.chunks if chunk.expert == expert]
        edges = [0, *(chunk.stop for chunk in own)]
        assert [chunk.start for chunk in own] == edges[:-1]
        assert edges[-1] == count
        assert all(chunk.stop > chunk.start for chunk in own)
    assert sum(plan.load) == sum(tokens)
    assert max(plan.load) <= plan.cap + min_chunk - 1
    assert all(device != owner[expert] for expert, device in plan.transfers)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=8), st.integers(1, 6), st.sampled_from([1.0, 1.3]))
def test_an_even_load_moves_nothing(tokens, P, threshold):
    """Every device has the same tokens, however they differ by expert; so has a load below the threshold."""
    counts = [count for _ in range(P) for count in tokens]
    plan = least_loaded(counts, contiguous(len(counts), P), P, factor=1.0, threshold=threshold, min_chunk=1)
    assert plan.transfers == []
    assert plan.load == [sum(tokens)] * P


def test_below_the_threshold_nothing_moves_by_hand():
    assert least_loaded([62, 38], [0, 1], 2, min_chunk=1).transfers == []  # 1.24 of the mean
    assert least_loaded([66, 34], [0, 1], 2, min_chunk=1).transfers == [(0, 1)]  # 1.32
    assert least_loaded([62, 38], [0, 1], 2, threshold=1.2, min_chunk=1).load == [55, 45]
    assert least_loaded([0, 0], [0, 1], 2).chunks == ()


def test_the_cap_holds_all_tokens_where_rounding_down_twice_does_not():
    """11 tokens on 3 devices: equal shares rounded down are 9 in all, two tokens would have no place."""
    assert 3 * int(1.0 * (11 // 3)) < 11
    plan = least_loaded([11, 0, 0], [0, 1, 2], 3, factor=1.0, min_chunk=1)
    assert plan.cap == 4
    assert sorted(plan.load) == [3, 4, 4]


def test_modelled_cost_by_hand():
    devices = Devices(token_seconds=2, expert_bytes=1000, token_bytes=10, bandwidth=100)
    tokens, owner = [80, 9, 1], [0, 1, 2]
    # the owner sends its matrices twice: 20 seconds; each device computes 30 tokens; device 1 holds two experts
    moved = least_loaded(tokens, owner, 3, factor=1.0, min_chunk=1)
    assert cost(moved, devices) == Cost(60, 20, 2000, 2 * 1000 + 300)
    assert cost(native(tokens, owner, 3), devices) == Cost(160, 0, 0, 1000 + 800)
    assert cost(moved, devices).seconds == 80


def test_matrices_travel_once_however_many_chunks():
    plan = Plan((Chunk(0, 1, 0, 5), Chunk(0, 0, 5, 9), Chunk(0, 1, 9, 12)), (0,), 2, 8)
    assert plan.transfers == [(0, 1)]
    assert plan.load == [4, 8]


def test_owners_in_one_piece():
    assert contiguous(8, 4) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert contiguous(5, 2) == [0, 0, 0, 1, 1]


def test_wrong_uses_say_what_was_expected():
    with pytest.raises(UsageError, match=r"(?s)no home.*2 owners of 0 to 1.*received: \[0, 2\]"):
        least_loaded([1, 2], [0, 2], 2)
    with pytest.raises(UsageError, match=r"(?s)factor and a min_chunk of at least 1.*factor 0.9"):
        least_loaded([1, 2], [0, 1], 2, factor=0.9)
    with pytest.raises(UsageError, match="fewer than no tokens"):
        native([1, -2], [0, 1], 2)


# owners by load


def test_owners_by_load_by_hand():
    """9 and 8 apart, 7 to the lighter one (8), 1 to the other; by order the first device would have 17 of 25."""
    assert balanced([9, 8, 7, 1], 2) == [0, 1, 1, 0]
    assert balanced([5, 5, 5], 4) == [0, 1, 2]
    assert balanced([100, 1, 1, 1], 2) == [0, 1, 1, 0]  # memory first: two experts each, however busy one is


@settings(max_examples=200, deadline=None)
@given(HEAVY, st.integers(1, 9))
def test_owners_by_load_share_memory_evenly_and_are_within_the_heaviest_of_the_best(tokens, devices):
    owner = balanced(tokens, devices)
    most = -(-len(tokens) // devices)
    load = [sum(n for n, home in zip(tokens, owner, strict=True) if home == device) for device in range(devices)]
    assert all(owner.count(device) <= most for device in range(devices))
    assert all(0 <= home < devices for home in owner)
    assert max(load) <= most * max(tokens)
    if len(tokens) <= devices:
        assert max(load) == max(tokens)
