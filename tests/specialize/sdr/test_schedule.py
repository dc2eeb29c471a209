# SPDX-License-Identifier: Apache-2.0
"""Every path learns equally often, from its own images, and a step can be asked for without those before it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.specialize.sdr.channels import SHARED
from anabranch.specialize.sdr.schedule import PathIndices, Rounds, shared_turns


@settings(max_examples=200, deadline=None)
@given(
    num_paths=st.integers(1, 40),
    turns_a_step=st.integers(1, 4),
    share=st.floats(0.01, 0.3),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_path_has_one_turn_a_round_and_no_step_has_a_model_twice(num_paths, turns_a_step, share, seed):
    try:
        rounds = Rounds(num_paths, turns_a_step, share, seed)
    except ValueError:
        assert num_paths < turns_a_step * (turns_a_step + 1) or share * turns_a_step > 0.7  # too few to lie beside
        return
    for start in (0, rounds.steps):
        steps = [rounds.at(start + step) for step in range(rounds.steps)]
        assert all(len(set(rows)) == turns_a_step for rows in steps)
        flat = [row for rows in steps for row in rows]
        assert sorted(row for row in flat if row != SHARED) == list(range(num_paths))
        assert flat.count(SHARED) == rounds.shared_turns >= share / (1 - share) * num_paths - 1e-6


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 12), st.integers(1, 2), st.integers(0, 60), st.integers(0, 1000))
def test_visits_and_turns_count_what_a_slow_loop_counts(num_paths, turns_a_step, num_steps, seed):
    rounds = Rounds(num_paths, turns_a_step, 0.2, seed)
    counted: dict[int, int] = {}
    for step in range(num_steps):
        assert rounds.visits(step) == [counted.get(row, 0) for row in rounds.at(step)]
        for row in rounds.at(step):
            counted[row] = counted.get(row, 0) + 1
    for row in (*range(num_paths), SHARED):
        assert rounds.turns_of(row, num_steps) == counted.get(row, 0)


def test_a_path_sees_its_images_only_and_all_of_them_in_an_epoch():
    labels = torch.arange(120) % 3
    members = [(labels == k).nonzero()[:, 0] for k in range(3)]
    rounds = Rounds(3, 2, 0.2, seed=1)
    indices = PathIndices(rounds, members, 120, batch_size=20)
    seen = {row: [] for row in (0, 1, 2, SHARED)}
    for step in range(4 * rounds.steps):  # 4 turns of 10 images each are an epoch of 40
        for row, part in zip(rounds.at(step), indices.at(step).chunk(2), strict=True):
            seen[row] += part.tolist()
    for row in range(3):
        assert sorted(seen[row]) == members[row].tolist()
    assert set(labels[seen[SHARED]].tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 2, 0.7), "shared_share: expected at most one turn of the shared model in a step of 2 turns with 4 paths"),
        ((3, 2, 0.0), "paths_a_step: expected a divisor of 3 where the shared model has no turn, received 2"),
        ((0, 2, 0.2), "schedule: expected paths"),
    ],
)
def test_impossible_schedules_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        shared_turns(*arguments)


def test_a_batch_has_to_divide_among_the_turns():
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 2 turns a step, received 9"):
        PathIndices(Rounds(4, 2, 0.2, seed=0), [torch.arange(3)] * 4, 12, batch_size=9)
