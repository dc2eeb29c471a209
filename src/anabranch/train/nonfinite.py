# SPDX-License-Identifier: Apache-2.0
"""Where did the first NaN or infinity come from? Asked once, after a step that must not be applied."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.train.sharded import computing, local


def first_non_finite(objective: nn.Module, batch: Mapping[str, Tensor], forward: Callable[[], Any]) -> str:
    """Name the first non-finite thing in the order of cause: the batch, a parameter, a module's output, a gradient.

    `batch` is the global one, so that every process can name a bad row; `forward` repeats the failed forward pass of
    this process. The gradients of the failed step must still be there.
    """
    for name, tensor in batch.items():
        if not _finite(tensor):
            return f"the batch entry {name!r}"
    for name, parameter in (pair for root in _roots(objective) for pair in root.named_parameters()):
        if not _finite(parameter):
            return f"the parameter {name!r}, before this step"
    module = _first_module(objective, forward)
    if module is not None:
        return f"the output of the module {module!r}"
    for name, parameter in objective.named_parameters():
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"the gradient of {name!r}"
    return "only the norm over all gradients, or a value of another process"


def _first_module(objective: nn.Module, forward: Callable[[], Any]) -> str | None:
    found: list[str] = []

    def remember(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if not found and not all(map(_finite, _tensors(output))):
                found.append(name or type(module).__name__)

        return hook

    modules = {module: name for root in reversed(_roots(objective)) for name, module in root.named_modules()}
    handles = [module.register_forward_hook(remember(name)) for module, name in modules.items()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _roots(objective: nn.Module) -> list[nn.Module]:
    """What computes may be held where torch does not see it, so that no checkpoint has it."""
    return [objective, *(module for module in computing(objective) if module is not objective)]


def _tensors(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _finite(tensor: Tensor) -> bool:
    tensor = local(tensor)  # what another process holds is its own to name, and asking it would have to be agreed
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
