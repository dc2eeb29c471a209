# SPDX-License-Identifier: Apache-2.0
"""The experts of a layer, one by one, whatever the storage: fused, transposed, interleaved, with biases or without.

Equation  : E_e(x) = W_down act(W_gate x + b_gate, W_up x + b_up) + b_down
Shapes    : N experts, D width, M width of an expert: gate and up (M, D), down (D, M), biases (M,), (M,) and (D,).

Everything handed out is a view: writing into it writes into the model, bit by bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.models.mixtures.layers import MixtureLayer


@dataclass(frozen=True, eq=False)
class Expert:
    """Views of one expert's matrices, in one orientation for every family."""

    gate: Tensor  # (M, D)
    up: Tensor  # (M, D)
    down: Tensor  # (D, M)
    gate_bias: Tensor | None = None  # (M,)
    up_bias: Tensor | None = None  # (M,)
    down_bias: Tensor | None = None  # (D,)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}


class ExpertBank:
    """`bank[e]` are the views of expert e; `len(bank)` how many there are."""

    def __init__(self, layer: MixtureLayer):
        self.layer = layer
        self.experts = layer.experts
        self.transposed = bool(getattr(self.experts, "is_transposed", False))
        self.concatenated = bool(getattr(self.experts, "is_concatenated", True))

    def __len__(self) -> int:
        return self.layer.num_experts

    def __iter__(self) -> Iterator[Expert]:
        return (self[expert] for expert in range(len(self)))

    def __getitem__(self, expert: int) -> Expert:
        check_expert(self.layer, expert)
        gate_up, down = self.experts.gate_up_proj.data[expert], self.experts.down_proj.data[expert]
        if self.transposed:
            gate_up, down = gate_up.T, down.T
        biases: tuple[Tensor | None, ...] = (None, None, None)
        if getattr(self.experts, "has_bias", False):
            biases = (
                *self.halves(self.experts.gate_up_proj_bias.data[expert]),
                self.experts.down_proj_bias.data[expert],
            )
        return Expert(*self.halves(gate_up), down, *biases)

    def halves(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """(2 M, ...) to gate and up, (M, ...) each."""
        if self.concatenated:
            return gate_up[: len(gate_up) // 2], gate_up[len(gate_up) // 2 :]
        return gate_up[::2], gate_up[1::2]

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        """(T, M) and (T, M) to (T, M), as the family does it."""
        joined = torch.cat((gate, up), -1) if self.concatenated else torch.stack((gate, up), -1).flatten(-2)
        activated: Tensor = self.experts._apply_gate(joined)
        return activated

    def run(self, expert: int, hidden_states: Tensor) -> Tensor:
        """E_e(x), unweighted: (T, D) to (T, D)."""
        own = self[expert]
        linear = torch.nn.functional.linear
        gate, up = linear(hidden_states, own.gate, own.gate_bias), linear(hidden_states, own.up, own.up_bias)
        return linear(self.activate(gate, up), own.down, own.down_bias)


def run_slots(layer: MixtureLayer, hidden_states: Tensor, selected_experts: Tensor) -> Tensor:
    """E_e(x) of every token and slot, unweighted, by the model's own implementation: (T, D), (T, K) to (T, K, D)."""
    num_tokens, top_k = selected_experts.shape
    rows = hidden_states.repeat_interleave(top_k, 0)
    ones = torch.ones(len(rows), 1, dtype=hidden_states.dtype, device=rows.device)
    forward = type(layer.experts).forward  # not the instance's: it may be watched
    outputs: Tensor = forward(layer.experts, rows, selected_experts.reshape(-1, 1), ones)
    return outputs.view(num_tokens, top_k, -1)


def check_expert(layer: MixtureLayer, expert: int) -> None:
    if not 0 <= expert < layer.num_experts:
        raise UsageError(
            f"{layer.name} has no expert {expert}", expected=f"0 to {layer.num_experts - 1}", received=expert
        )
