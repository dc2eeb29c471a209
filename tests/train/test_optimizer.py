# SPDX-License-Identifier: Apache-2.0
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anabranch.errors import UsageError
from anabranch.train.config import TrainConfig
from anabranch.train.optimizer import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors


def config(**changes):
    return TrainConfig(**({"steps": 100, "batch_size": 4, "learning_rate": 1e-2} | changes))


def test_the_schedule_passes_through_its_corners():
    settings_ = config(warmup_steps=10, min_learning_rate=1e-3)
    assert learning_rate(0, settings_) == pytest.approx(1e-3)  # the first step moves already
    assert learning_rate(9, settings_) == learning_rate(10, settings_) == 1e-2
    assert learning_rate(55, settings_) == pytest.approx((1e-2 + 1e-3) / 2)  # half of the cosine
    assert learning_rate(100, settings_) == pytest.approx(1e-3)
    assert learning_rate(0, config()) == 1e-2


@settings(max_examples=200, deadline=None)
@given(steps=st.integers(1, 500), warmup=st.integers(0, 500), low=st.floats(0, 1e-2))
def test_the_rate_rises_then_falls_and_stays_between_its_bounds(steps, warmup, low):
    settings_ = config(steps=steps, warmup_steps=min(warmup, steps), min_learning_rate=low)
    rates = [learning_rate(step, settings_) for step in range(steps)]
    peak = max(0, settings_.warmup_steps - 1)
    assert all(earlier <= later for earlier, later in pairwise(rates[: peak + 1]))
    assert all(earlier >= later - 1e-12 for earlier, later in pairwise(rates[peak:]))
    assert max(rates) <= 1e-2 + 1e-12
    assert min(rates[peak:]) >= low - 1e-12


def slow_adamw(weight, gradients, rate, decay, beta1=0.9, beta2=0.95, eps=1e-8):
    """The paper's algorithm box, one number at a time."""
    weight, first, second = weight.tolist(), [0.0] * len(weight), [0.0] * len(weight)
    for t, gradient in enumerate(gradients, start=1):
        for i, g in enumerate(gradient.tolist()):
            weight[i] -= rate * decay * weight[i]
            first[i] = beta1 * first[i] + (1 - beta1) * g
            second[i] = beta2 * second[i] + (1 - beta2) * g * g
            weight[i] -= rate * first[i] / (1 - beta1**t) / (math.sqrt(second[i] / (1 - beta2**t)) + eps)
    return weight


def test_updates_equal_the_slow_loop_and_biases_and_norms_do_not_decay():
    module = nn.ModuleDict({"linear": nn.Linear(3, 2), "norm": nn.LayerNorm(2)}).double()
    module.register_parameter("stacked_bias", nn.Parameter(torch.randn(2, 5, dtype=torch.float64)))
    optimizer = build_optimizer(module, config(weight_decay=0.3))
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    gradients = {name: torch.randn(5, *tensor.shape, dtype=torch.float64) for name, tensor in before.items()}
    for step in range(5):
        for name, parameter in module.named_parameters():
            parameter.grad = gradients[name][step]
        optimizer.step()
    for name, parameter in module.named_parameters():
        decay = 0.3 if name == "linear.weight" else 0.0
        expected = slow_adamw(before[name].flatten(), gradients[name].flatten(1), 1e-2, decay)
        assert parameter.flatten().tolist() == pytest.approx(expected, rel=1e-9), name


def test_a_parameter_without_gradient_is_bit_identical_and_has_no_state():
    module = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    before = module[1].weight.detach().clone()
    optimizer = build_optimizer(module, config(weight_decay=0.5))
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        module[0](torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert torch.equal(module[1].weight, before)
    assert {key.partition("/")[2] for key in optimizer_tensors(module, optimizer)} == {"0.weight", "0.bias"}


def test_state_that_is_loaded_goes_on_to_the_bit():
    modules = [nn.Linear(7, 5) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    optimizers = [build_optimizer(module, config()) for module in modules]

    def step(number, which):
        for parameter in modules[which].parameters():
            parameter.grad = torch.sin(torch.arange(parameter.numel()).float() + number).reshape(parameter.shape)
        optimizers[which].step()

    for number in range(4):
        step(number, 0)
    modules[1].load_state_dict(modules[0].state_dict())
    load_optimizer_tensors(modules[1], optimizers[1], optimizer_tensors(modules[0], optimizers[0]))
    for number in range(4, 8):
        step(number, 0)
        step(number, 1)
    assert all(torch.equal(a, b) for a, b in zip(modules[0].parameters(), modules[1].parameters(), strict=True))
    with pytest.raises(UsageError, match="the checkpoint's optimiser knows 'other'"):
        load_optimizer_tensors(modules[1], optimizers[1], {"exp_avg/other": torch.zeros(1)})


def test_a_frozen_model_has_nothing_to_train():
    with pytest.raises(UsageError, match="nothing to train"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, received 0"),
        ({"batch_size": -1}, "batch_size: expected at least 1, received -1"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number >= 0, received nan"),
        ({"warmup_steps": 101}, r"warmup_steps: expected at most steps \(100\), received 101"),
        ({"min_learning_rate": 0.1}, r"min_learning_rate: expected at most learning_rate \(0.01\), received 0.1"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\)"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: expected a number > 0 or none, received 0.0"),
        ({"mixed_precision": "fp16"}, "mixed_precision: expected no or bf16, received fp16"),
    ],
)
def test_wrong_configurations_say_what_was_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
