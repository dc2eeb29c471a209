# SPDX-License-Identifier: Apache-2.0
"""PEFT's trained rows of an embedding without a copy of the whole table in every forward.

Equation  : embedding   out_t = delta_k where token t is the k-th trained one, else W[t]
            head        out = h W^T with the trained columns replaced by h delta^T
Shapes    : tokens (B, N), h (B, N, D), W (V, D), delta (K, D).
Differs   : from PEFT's layer in nothing but cost: that writes delta into a copy of W, 28 million numbers a token for a
            model of 135 million.
Check     : values and gradients are PEFT's (tests/mixture/test_token_rows.py)
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def light_token_rows(model: nn.Module) -> list[str]:
    """Exchange the forward of every layer of trained rows; the names of these layers, none where nothing is trained."""
    found = {name: module for name, module in model.named_modules() if hasattr(module, "trainable_tokens_delta")}
    for module in found.values():
        lighten(module)
    return list(found)


def lighten(layer: Any) -> None:
    if not isinstance(layer, LightRows):
        layer.__class__ = light(type(layer))  # type: ignore[arg-type]  # mypy: no metaclass is hashable


@cache
def light(kind: Any) -> Any:
    """One class for all layers of a kind."""
    return type(f"Light{kind.__name__}", (LightRows, kind), {"kind": kind})


class LightRows(nn.Module):
    """What `light_token_rows` makes of PEFT's layer."""

    def forward_adapters(self: Any, x: Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> Tensor:
        base, trained = self.base_layer, [name for name in active_adapters if name in self.trainable_tokens_delta]
        plain = isinstance(base, nn.Embedding) or (isinstance(base, nn.Linear) and base.bias is None)
        if self.disable_adapters or self.merged or len(trained) != 1 or not plain:
            y: Tensor = self.kind.forward_adapters(self, x, active_adapters, *args, **kwargs)
            return y
        delta, index = self.trainable_tokens_delta[trained[0]], self.token_indices[trained[0]]
        if isinstance(base, nn.Linear):
            out: Tensor = base(x)
            columns = nn.functional.linear(x, delta.to(x.dtype)).to(out.dtype)
            return out.index_copy_(-1, torch.tensor(index, device=out.device), columns)
        scale = self._get_embed_scale()
        rows = delta if scale is None else delta * scale
        out = base(x)
        place = x[..., None] == torch.tensor(index, device=x.device)
        chosen = nn.functional.embedding(place.int().argmax(-1), rows.to(out.dtype))
        return torch.where(place.any(-1, keepdim=True), chosen, out)
