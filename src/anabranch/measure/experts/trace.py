# SPDX-License-Identifier: Apache-2.0
"""The routing of a text in the order of its tokens: what caches, placements and local consistency are judged on.

Shapes    : T tokens, L layers, K chosen per token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.models.mixtures.layers import MixtureLayer
from anabranch.models.mixtures.routing import Seen, watched


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Tokens of one document lie one after another; nothing runs from one document into the next."""

    selected: Tensor  # (T, L, K) int16
    documents: Tensor  # (T,) int64, which never goes down
    num_experts: int
    layers: tuple[str, ...]

    def by_document(self) -> Iterator[Tensor]:
        """(T_d, L, K) of every document."""
        _, lengths = torch.unique_consecutive(self.documents, return_counts=True)
        yield from torch.split(self.selected, lengths.tolist())


class Recorder:
    """Collects a trace over forward passes of (B, S) padded tokens."""

    def __init__(self, layers: Sequence[MixtureLayer]):
        self.layers = tuple(layers)
        self.order = {layer.name: i for i, layer in enumerate(layers)}
        self.parts: list[Tensor] = []
        self.lengths: list[int] = []

    @contextmanager
    def recording(self, attention_mask: Tensor) -> Iterator[None]:
        """Around one forward pass: every row of the batch is a document.

        attention_mask      (B, S), 0 for padding
        """
        pass_: dict[int, Tensor] = {}

        def take(seen: Seen) -> None:
            pass_[self.order[seen.layer.name]] = seen.triple.selected_experts.to(torch.int16).cpu()

        with watched(self.layers, take):
            yield
        real_T = attention_mask.reshape(-1).bool().cpu()
        self.parts.append(torch.stack([pass_[i] for i in range(len(self.layers))], 1)[real_T])
        self.lengths += [n for n in attention_mask.bool().sum(1).tolist() if n]

    def trace(self) -> RoutingTrace:
        if not self.parts:
            raise UsageError("the trace is empty", expected="forward passes inside `recording`", received="none")
        documents = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        names = tuple(layer.name for layer in self.layers)
        return RoutingTrace(torch.cat(self.parts), documents, self.layers[0].num_experts, names)
