# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs the experts of a forward pass: "anabranch_auto", and one call that sets it.

The rule rests on measurements on processors (`python -m benchmarks.experts grid`). What decides is how many tokens an
expert has on average and what they cost. Many: ours. Fewer: transformers' grouped_mm, a loop in C++, as our loop in
Python costs more than its products. A handful of choices in all: eager, as grouped_mm asks every expert. batched_mm
copies the weights of every choice and was nowhere the fastest by more than the noise.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.models.mixtures.fused import NAME, experts_forward, register, why_not

AUTO = "anabranch_auto"
LEAST_ROWS, LEAST_ROWS_WITH_GRADIENT = 32, 80
"""Tokens an expert on average; with numbers of 16 bits twice as many, as their products are over sooner."""
FEW, FEW_WITH_GRADIENT = 4, 1
"""Choices of all tokens; eager's gradients are as large as all experts for each expert that is chosen."""
LEAST_WORK, LEAST_WORK_WITH_GRADIENT = 1.1e6, 2.6e6
"""Tokens of an expert times D times M, for experts so small that the loop outweighs them."""


def choose(
    num_tokens: int, top_k: int, num_experts: int, hidden_size: int, width: int, *, gradient: bool, half: bool = False
) -> str:
    """The name of what is likely the fastest.

    width       M, of an expert
    gradient    whether a backward pass can follow
    half        whether the numbers are of 16 bits
    """
    if 0 < num_tokens * top_k <= (FEW_WITH_GRADIENT if gradient else FEW):
        return "eager"
    rows = num_tokens * top_k / num_experts / (2 if half else 1)
    work = rows * hidden_size * width
    if gradient:
        enough = rows >= LEAST_ROWS_WITH_GRADIENT and work >= LEAST_WORK_WITH_GRADIENT
    else:
        enough = rows >= LEAST_ROWS and work >= LEAST_WORK
    return NAME if enough else "grouped_mm"


def choice(experts: Any, hidden_states: Tensor, selected: Tensor, weights: Tensor) -> str:
    """As `choose`, for these experts and tokens; what can't be ours is grouped_mm's."""
    down, (num_tokens, size), top_k = experts.down_proj, hidden_states.shape, selected.shape[1]
    trained = hidden_states.requires_grad or weights.requires_grad or down.requires_grad
    gradient, half = torch.is_grad_enabled() and trained, hidden_states.element_size() == 2
    name = choose(num_tokens, top_k, len(down), size, down.shape[1:].numel() // size, gradient=gradient, half=half)
    if name == NAME and why_not(experts, hidden_states):  # asked last: it takes longer
        return "grouped_mm"
    if name == "eager" and (torch.compiler.is_compiling() or not down.is_cpu or experts._is_expert_parallel):
        return "grouped_mm"
    return name


def auto_forward(experts: Any, hidden_states: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
    """As `fused.experts_forward`, by whatever is likely the fastest."""
    name = choice(experts, hidden_states, selected, weights)
    if name == NAME:
        return experts_forward(experts, hidden_states, selected, weights)
    if name == "eager" and (eager := getattr(type(experts).forward, "__wrapped__", None)):
        return cast(Tensor, eager(experts, hidden_states, selected, weights))
    from transformers.integrations.moe import grouped_mm_experts_forward

    return cast(Tensor, grouped_mm_experts_forward(experts, hidden_states, selected, weights))


def use_fast_experts(model: Any, name: str = AUTO) -> Callable[[], None]:
    """Sets how the model runs its experts; what is returned puts back what was.

    name    "anabranch_auto", or "anabranch" for ours at any number of tokens

    Raises:
        UsageError: the model's experts take no implementation; the model is as it was.
    """
    if name not in (AUTO, NAME):
        raise UsageError(f"there are no experts {name!r}", expected=f"{AUTO} or {NAME}", received=name)
    switched = [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]
    if not switched or not hasattr(model, "set_experts_implementation"):
        raise UsageError(
            f"{type(model).__name__} does not let its experts be run otherwise",
            expected="stacked experts of transformers 5", received="none of them",
        )  # fmt: skip
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    register()
    ALL_EXPERTS_FUNCTIONS.register(AUTO, auto_forward)
    before = model.get_experts_implementation()

    def undo() -> None:
        model.set_experts_implementation(before)

    model.set_experts_implementation(name)
    if left := [module for module in switched if module.config._experts_implementation != name]:
        undo()
        raise UsageError(
            f"{type(model).__name__} does not let its experts be run otherwise", expected=name,
            received=f"{left[0].config._experts_implementation} in {len(left)} of {len(switched)} layers",
        )  # fmt: skip
    return undo
