# SPDX-License-Identifier: Apache-2.0
"""What a denoiser is told about the prompt, whatever the family: one record with a row a prompt.

Shapes    : B prompts, L text tokens, D width of the text embeddings, P of the pooled one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    embeds: Tensor  # (B, L, D)
    pooled: Tensor | None = None  # (B, P)
    time_ids: Tensor | None = None  # (B, 6): original height and width, crop top and left, target height and width

    def __len__(self) -> int:
        return len(self.embeds)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        """The same record with every tensor changed."""
        return Conditioning(**{name: None if value is None else change(value) for name, value in vars(self).items()})

    def take(self, rows: Tensor) -> "Conditioning":
        return self.map(lambda tensor: tensor[rows])

    def repeat(self, count: int) -> "Conditioning":
        """A single prompt for `count` images."""
        return self.map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Conditioning":
        return self.map(lambda tensor: tensor.to(device, dtype))


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """One record of all rows, in order."""
    columns = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    return Conditioning(**{name: None if values[0] is None else torch.cat(values) for name, values in columns.items()})
