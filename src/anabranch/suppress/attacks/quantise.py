# SPDX-License-Identifier: Apache-2.0
"""Quantise: round the weights of a network, which can undo a change that is smaller than the rounding.

Paper     : "Catastrophic Failure of LLM Unlearning via Quantization" (arXiv 2410.16454), whose attack it is.
Equation  : q = s round(W / s), s = max |W| / (2^(b - 1) - 1) over an output row; over 32 inputs of it where b < 8
Shapes    : W (rows, ...) of a linear layer or a convolution, its inputs flattened.
Differs   : weights only, to the nearest step, without calibration. LoRA is merged first, as it is before a model is
            shipped small: rounded apart, a small change would survive that the merged weights lose.
Check     : |q - W| <= s / 2, 2^b - 1 values a row at most, everything back bit for bit afterwards
            (tests/suppress/attacks/test_quantise.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

GROUP = 32
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def rounded(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """q = s round(W / s); `group` inputs share a step, all of a row where it is None."""
    if bits < 2:
        raise ValueError(f"bits: expected at least 2, received {bits}")
    flat = weight.flatten(1).float()
    size = group or flat.shape[1]
    parts = nn.functional.pad(flat, (0, -flat.shape[1] % size)).unflatten(1, (-1, size))
    step = parts.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    grid = torch.where(step > 0, parts / step, 0.0).round() * step
    return grid.flatten(1)[:, : flat.shape[1]].reshape(weight.shape).to(weight.dtype)


def layers(network: nn.Module) -> list[nn.Module]:
    """Those whose weights are rounded: all but the factors of a LoRA."""
    return [layer for name, layer in network.named_modules() if isinstance(layer, LAYERS) and "lora_" not in name]


@contextmanager
def quantised(network: nn.Module, bits: int) -> Iterator[int]:
    """The network with rounded weights, LoRA merged into them; yields the number of layers."""
    kept = [(layer, layer.weight.data) for layer in layers(network)]
    adapted = [part for part in network.modules() if hasattr(part, "merged_adapters") and not part.merged_adapters]
    try:
        with torch.no_grad():
            for layer, weight in kept:
                layer.weight.data = weight.clone()
            for part in adapted:
                part.merge()
            for layer, _ in kept:
                layer.weight.data = rounded(layer.weight.data, bits, GROUP if bits < 8 else None)
        yield len(kept)
    finally:
        for layer, weight in kept:
            layer.weight.data = weight
        for part in adapted:
            part.merged_adapters.clear()
