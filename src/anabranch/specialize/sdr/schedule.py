# SPDX-License-Identifier: Apache-2.0
"""Which sub-net learns from which images when: pure functions of (seed, step), so a resumed run needs no replay.

Round     : every path has one turn a round, in a new random order, and the shared model has A turns, A the least number
            that makes the round whole steps and the shared model's part of it at least `shared_share`.
Step      : M turns side by side, each with its part of the batch; never two of one model in the same step.
Images    : a path draws from the clusters below it in the tree, an epoch at a time, small ones more often.
Shapes    : K paths, M turns a step, B images a step, B / M a turn; N images in all.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from anabranch.data.streams import ShuffledIndices, derived_seed
from anabranch.specialize.sdr.channels import SHARED


class Rounds:
    """Rows of the paths, or SHARED, that have their turn at a step."""

    def __init__(self, num_paths: int, turns_a_step: int, shared_share: float, seed: int):
        self.num_paths, self.turns_a_step, self.seed = num_paths, turns_a_step, seed
        self.shared_turns = shared_turns(num_paths, turns_a_step, shared_share)
        self.steps = (num_paths + self.shared_turns) // turns_a_step

    def at(self, step: int) -> list[int]:
        """M rows."""
        round_, place = divmod(step, self.steps)
        return self._round(round_)[place * self.turns_a_step : (place + 1) * self.turns_a_step]

    def _round(self, round_: int) -> list[int]:
        generator = torch.Generator().manual_seed(derived_seed("round", self.seed, round_))
        order = torch.randperm(self.num_paths, generator=generator).tolist()
        with_shared = set(torch.randperm(self.steps, generator=generator)[: self.shared_turns].tolist())
        turns: list[int] = []
        for step in range(self.steps):
            own = self.turns_a_step - (step in with_shared)
            turns += [*order[:own], *([SHARED] if step in with_shared else [])]
            order = order[own:]
        return turns

    def visits(self, step: int) -> list[int]:
        """For each turn of a step, how many turns the same model had before."""
        round_, place = divmod(step, self.steps)
        start = place * self.turns_a_step
        turns = self._round(round_)
        earlier = turns[:start].count(SHARED)
        return [
            round_ * self.shared_turns + earlier if row == SHARED else round_
            for row in turns[start : start + self.turns_a_step]
        ]

    def turns_of(self, row: int, num_steps: int) -> int:
        """Turns of a model in the first `num_steps` steps."""
        rounds, rest = divmod(num_steps, self.steps)
        each = self.shared_turns if row == SHARED else 1
        return rounds * each + self._round(rounds)[: rest * self.turns_a_step].count(row)


def shared_turns(num_paths: int, turns_a_step: int, shared_share: float) -> int:
    """A: turns of the shared model in a round of `num_paths` turns of paths.

    Raises:
        ValueError: the shared model would have to learn twice in one step, or the paths do not fill whole steps.
    """
    if num_paths < 1 or turns_a_step < 1 or not 0 <= shared_share < 1:
        received = f"{num_paths} paths, {turns_a_step} turns, share {shared_share}"
        raise ValueError(f"schedule: expected paths, turns a step and a share below 1, received {received}")
    if shared_share == 0:
        if num_paths % turns_a_step:
            expected = f"a divisor of {num_paths} where the shared model has no turn"
            raise ValueError(f"paths_a_step: expected {expected}, received {turns_a_step}")
        return 0
    least = max(math.ceil(num_paths * shared_share / (1 - shared_share) - 1e-9), 1)
    turns = least + -(num_paths + least) % turns_a_step
    if turns > (num_paths + turns) // turns_a_step:
        raise ValueError(
            f"shared_share: expected at most one turn of the shared model in a step of {turns_a_step} turns with "
            f"{num_paths} paths, received {shared_share}"
        )
    return turns


class PathIndices:
    """Indices (B,) of a step's images, turn after turn."""

    def __init__(self, rounds: Rounds, members: Sequence[Tensor], num_images: int, batch_size: int):
        """`members[k]` (n_k,) are the images that path k learns from; the shared model learns from all."""
        if batch_size % rounds.turns_a_step:
            raise ValueError(
                f"batch_size: expected a multiple of {rounds.turns_a_step} turns a step, received {batch_size}"
            )
        self.rounds, self.members, self.share = rounds, members, batch_size // rounds.turns_a_step
        self._of_path = [
            ShuffledIndices(len(rows), self.share, derived_seed("path", rounds.seed, k))
            for k, rows in enumerate(members)
        ]
        self._of_all = ShuffledIndices(num_images, self.share, derived_seed("shared", rounds.seed))

    def at(self, step: int) -> Tensor:
        chosen = []
        for row, visit in zip(self.rounds.at(step), self.rounds.visits(step), strict=True):
            if row == SHARED:
                chosen.append(self._of_all.at(visit))
            else:
                chosen.append(self.members[row][self._of_path[row].at(visit)])
        return torch.cat(chosen)


class Views(Protocol):
    """A stream whose batches have `row` (B,) beside the views."""

    def batch(self, step: int) -> dict[str, Tensor]: ...


class PathBatches:
    """A stream of views with, for each row, `path` (B,) whose turn it belongs to, and `turns` (B, M) of the step."""

    def __init__(self, views: Views, rounds: Rounds):
        self.views, self.rounds = views, rounds

    def batch(self, step: int) -> dict[str, Tensor]:
        made = self.views.batch(step)
        turns_M = torch.tensor(self.rounds.at(step))
        size = len(made["row"])
        return made | {
            "path": turns_M.repeat_interleave(size // len(turns_M)),
            "turns": turns_M.expand(size, -1),
        }
