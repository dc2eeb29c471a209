# SPDX-License-Identifier: Apache-2.0
"""Send rows to their experts and bring the results back.

Equation  : y_r = sum_k w_rk E_{i_rk}(x_r)
Shapes    : R rows (samples with all their tokens, or single tokens), K chosen.
Paths     : everything on one expert: the plain dense call, bit for bit. One expert a row and rows already sorted by
            expert: views, no gather. Otherwise rows are sorted once, and put back once.
            The weight multiplies the output, which in a feed-forward network is narrower than the hidden layer.
"""

from typing import Any

from torch import Tensor

from anabranch.mixture.experts import Bank
from anabranch.mixture.routing import Routing


def dispatch(hidden_states: Tensor, routing: Routing, bank: Bank, **extras: Any) -> Tensor:
    """(B, N, D) -> (B, N, D); by sample (B, ...) -> (B, ...), as the experts do it."""
    if routing.per == "sample":
        return combine(hidden_states, routing.selected_experts, routing.routing_weights, bank, **extras)
    x_TD = hidden_states.flatten(0, 1)
    y_TD = combine(x_TD, routing.selected_experts, routing.routing_weights, bank, **extras)
    return y_TD.view(*hidden_states.shape[:-1], -1)


def combine(rows: Tensor, selected_RK: Tensor, weights_RK: Tensor, bank: Bank, **extras: Any) -> Tensor:
    top_k, choices, weights = selected_RK.shape[1], selected_RK.flatten(), weights_RK.flatten()
    if top_k == 1 and bool((choices[1:] >= choices[:-1]).all()):
        return scaled(run(rows, choices, bank, **extras), weights)
    order = choices.argsort(stable=True)
    y = scaled(run(rows.index_select(0, order // top_k), choices[order], bank, **extras), weights[order])
    back = y.new_zeros(len(rows), *y.shape[1:])
    return back.index_copy(0, order, y) if top_k == 1 else back.index_add(0, order // top_k, y)


def run(sent: Tensor, choices: Tensor, bank: Bank, **extras: Any) -> Tensor:
    """Rows through the experts of sorted choices."""
    experts, sizes = choices.unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
    if len(experts) == 1:
        return bank.run(int(experts), sent, **extras)
    return bank.run_sorted(sent, experts.tolist(), sizes.tolist(), **extras)


def scaled(y: Tensor, weights: Tensor) -> Tensor:
    return y * weights.to(y.dtype).view(-1, *[1] * (y.ndim - 1))
