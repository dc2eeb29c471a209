# SPDX-License-Identifier: Apache-2.0
"""The control of `experts tune`: as many random experts of every layer, trained alike on the same text.

OUT/training/control-0, ...    checkpoints and metrics.jsonl of each of them
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from anabranch.data.streams import derived_seed
from anabranch.jobs.experts.written import Changed, averaged
from anabranch.jobs.progress import say
from anabranch.models.mixtures.adapter import exchange, read_experts
from anabranch.specialize.expert_tuning import by_layer

Experts = Mapping[str, Sequence[int]]


def as_many(mask_LN: Tensor, seed: int) -> Tensor:
    """(L, N) bool: random experts, of every layer as many as in the mask."""
    generator = torch.Generator().manual_seed(seed)
    places_LN = torch.rand(mask_LN.shape, generator=generator).argsort(-1).argsort(-1)
    return places_LN < mask_LN.sum(-1, keepdim=True)


@contextmanager
def passing(model: Any, experts: Experts) -> Iterator[None]:
    """What these experts learn inside the `with` is gone after it, bit for bit."""
    before = read_experts(model, experts, base="")
    try:
        yield
    finally:
        exchange(model, before)


def controlled(
    model: Any, mask_LN: Tensor, layers: Sequence[str], learn: Callable[[int, Experts], dict[str, Changed]], *,
    num: int, seed: int,
) -> dict[str, dict[str, Changed]]:  # fmt: skip
    """A row for the table, averaged over draws; none where no draw is asked for.

    learn    trains these experts in place, for the draw of this number; returns the changes of the losses
    """
    found = []
    for draw in range(num):
        experts = by_layer(as_many(mask_LN, derived_seed("random experts", seed, draw)), layers)
        say(f"control {draw + 1} of {num}: {sum(map(len, experts.values()))} random experts")
        with passing(model, experts):
            found.append(learn(draw, experts))
    return {f"random experts, mean of {num}": averaged(found)} if found else {}
