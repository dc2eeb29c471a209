# SPDX-License-Identifier: Apache-2.0
"""Which images come at which step: pure functions of (seed, step), so that a resumed run needs no replay.

Shuffled  : the pool in a new random order every epoch, laid end to end and cut into batches; a batch may cross epochs,
            and a pool smaller than the batch simply passes several times.
Stratified: every group gives the same number of items to every batch, in group order (group 0 first), each group
            shuffled by itself; small groups pass more often than large ones.
Shapes    : N items in the pool, B items a batch, G groups.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def derived_seed(*parts: object) -> int:
    """A seed for one purpose, unrelated to the seeds of all other purposes."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def epoch_order(num_items: int, seed: int, epoch: int) -> Tensor:
    """(N,) int64: the order of the pool in one epoch."""
    generator = torch.Generator().manual_seed(derived_seed("epoch order", seed, epoch))
    return torch.randperm(num_items, generator=generator)


class ShuffledIndices:
    def __init__(self, num_items: int, batch_size: int, seed: int):
        if num_items < 1 or batch_size < 1:
            raise ValueError(f"num_items, batch_size: expected at least 1, received {num_items}, {batch_size}")
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        # Only saves time: a batch lies in one or two epochs, and neighbouring steps in the same ones.
        self._order = lru_cache(maxsize=2)(lambda epoch: epoch_order(num_items, seed, epoch))

    def at(self, step: int) -> Tensor:
        """(B,) int64 indices of the batch of one step."""
        place, end, pieces = step * self.batch_size, (step + 1) * self.batch_size, []
        while place < end:
            epoch, offset = divmod(place, self.num_items)
            pieces.append(self._order(epoch)[offset : offset + end - place])
            place += len(pieces[-1])
        return torch.cat(pieces)

    def epochs(self, num_steps: int) -> float:
        """How many times the pool has passed after `num_steps`."""
        return num_steps * self.batch_size / self.num_items


class StratifiedIndices:
    def __init__(self, groups: Tensor, batch_size: int, seed: int):
        """`groups` (N,) names the group of each item, 0 to G - 1."""
        sizes = torch.bincount(groups)
        if (sizes == 0).any():
            raise ValueError(
                f"groups: expected every group 0..{len(sizes) - 1} to have items, received {sizes.tolist()}"
            )
        if batch_size < 1 or batch_size % len(sizes):
            raise ValueError(f"batch_size: expected a multiple of {len(sizes)} groups, received {batch_size}")
        self.num_groups, self.batch_size, self.seed = len(sizes), batch_size, seed
        self._members = [(groups == group).nonzero()[:, 0] for group in range(len(sizes))]
        self._within = [
            ShuffledIndices(len(members), batch_size // len(sizes), derived_seed("group", seed, group))
            for group, members in enumerate(self._members)
        ]

    def at(self, step: int) -> Tensor:
        """(B,) int64 indices: B / G of group 0, then B / G of group 1, and so on."""
        pairs = zip(self._members, self._within, strict=True)
        return torch.cat([members[within.at(step)] for members, within in pairs])

    def epochs(self, num_steps: int) -> list[float]:
        """For each group, how many times it has passed after `num_steps`."""
        return [within.epochs(num_steps) for within in self._within]
