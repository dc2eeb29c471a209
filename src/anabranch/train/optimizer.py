# SPDX-License-Identifier: Apache-2.0
"""AdamW, or SGD with momentum, with a cosine schedule, and their state as named tensors.

Paper     : Loshchilov & Hutter 2019 (arXiv 1711.05101).
Equation  : warm-up  lr(s) = peak (s + 1) / warmup                                         for s < warmup
            cosine   lr(s) = low + (peak - low) (1 + cos(pi (s - warmup) / (steps - warmup))) / 2   after
Differs   : the first step of the warm-up already moves (s + 1, not s); biases and one-dimensional parameters do not
            decay.
Check     : tests/train/test_optimizer.py
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.train.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """lr(s) for the step that follows `step` finished ones: a function of nothing else, so there is no state."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * share + config.min_learning_rate * (1 - share)


def build_optimizer(objective: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Over the parameters that require a gradient; those without a gradient in a step are left as they are."""
    trainable = {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise UsageError("nothing to train", expected="at least one parameter with requires_grad", received="none")
    # Biases of stacked experts are two-dimensional, hence the look at the name as well.
    plain = {name for name, parameter in trainable.items() if parameter.ndim < 2 or name.endswith("bias")}
    groups = [
        {"params": [p for name, p in trainable.items() if name not in plain], "weight_decay": config.weight_decay},
        {"params": [p for name, p in trainable.items() if name in plain], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # One fused call a step: for small models the loop over tensors costs more than the arithmetic.
    if config.optimizer == "sgd":
        # not fused: that form expects either all tensors of a group to have momentum, or none
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.betas[0], foreach=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def optimizer_tensors(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as `STATISTIC/PARAMETER` -> tensor; parameters that were never updated have none."""
    return {
        f"{statistic}/{name}": tensor
        for name, parameter in objective.named_parameters()
        for statistic, tensor in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    objective: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Undo `optimizer_tensors`."""
    parameters = dict(objective.named_parameters())
    for key, tensor in tensors.items():
        statistic, _, name = key.partition("/")
        if name not in parameters:
            raise UsageError(f"the checkpoint's optimiser knows {name!r}, the model does not", hint="the same model")
        parameter = parameters[name]
        optimizer.state[parameter][statistic] = tensor.to(parameter.device, copy=True)
