# SPDX-License-Identifier: Apache-2.0
"""How the load is spread, streamed in constant memory.

Equation  : c_e = rows sent to expert e,  max_violation = max_e c_e / mean_e c_e - 1,  dead = {e: c_e = 0}
Shapes    : E experts, L labels.
Unit      : what the router routes: samples for a router of samples, (unmasked) tokens for a router of tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from anabranch.mixture.routing import Routing


@dataclass
class LoadStats:
    """Sums by layer name; two streams merge into the sums of both."""

    num_labels: int = 0
    """0: keep no table of experts against labels."""
    tokens_per_expert: dict[str, Tensor] = field(default_factory=dict)  # (E,) int64
    label_table: dict[str, Tensor] = field(default_factory=dict)  # (E, L) int64

    @torch.no_grad()
    def update(self, routings: Mapping[str, Routing], labels: Tensor | None = None) -> None:
        """`labels` (B,), one for each sample; all tokens of a sample carry its label."""
        for layer, routing in routings.items():
            chosen_RE = routing.choices().long()
            if routing.mask is not None:
                chosen_RE = chosen_RE * routing.mask[:, None]
            add(self.tokens_per_expert, layer, chosen_RE.sum(0).cpu())
            if self.num_labels and labels is not None:
                label_R = labels.to(chosen_RE.device).repeat_interleave(len(chosen_RE) // len(labels))
                table_LE = chosen_RE.new_zeros(self.num_labels, routing.num_experts).index_add(0, label_R, chosen_RE)
                add(self.label_table, layer, table_LE.T.cpu())

    def merge(self, other: "LoadStats") -> Self:
        for own, others in (
            (self.tokens_per_expert, other.tokens_per_expert),
            (self.label_table, other.label_table),
        ):
            for layer, counts in others.items():
                add(own, layer, counts)
        return self

    def max_violation(self) -> dict[str, float]:
        """0: every expert has the same load; E - 1: one has it all."""
        return {
            layer: (counts.max() * len(counts) / counts.sum() - 1).item() if counts.any() else 0.0
            for layer, counts in self.tokens_per_expert.items()
        }

    def dead_experts(self) -> dict[str, list[int]]:
        return {layer: (counts == 0).nonzero()[:, 0].tolist() for layer, counts in self.tokens_per_expert.items()}


def add(sums: dict[str, Tensor], layer: str, counts: Tensor) -> None:
    sums[layer] = sums[layer] + counts if layer in sums else counts
