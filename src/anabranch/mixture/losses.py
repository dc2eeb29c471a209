# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses on a routing: balance, small logits, confidence.

Equation  : importance  CV^2(load), load_e = sum_r p_re, CV^2(v) = Var(v) / (Mean(v)^2 + 1e-10), population variance
            hard        the same with load_e = number of rows sent to e; the gradient is that of the soft load
            balance     E * sum_e f_e q_e, f_e = share of the R * K choices that went to e, q_e = mean of p_e
            z           mean over r of (log sum exp l_r)^2
            entropy     mean over r of -sum_e p_re log p_re
Shapes    : R rows (samples or tokens), E experts, K chosen.
Scopes    : batch: the rows of this process. global: the rows of all processes; the value does not depend on their
            number, and the gradient is right after data parallelism has averaged it. sequence: each sample by itself.
Differs   : the balance loss is 1 for uniform routing with any E and K (transformers: K). Neither 1 nor less proves
            balance: uniform p with every row on one expert gives 1 as well. Judge by `LoadStats.max_violation`.
Check     : importance 0 for uniform loads, E - 1 for one-hot ones; balance 1 and E / K (tests/mixture/test_losses.py).
"""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.mixture.routing import Routing

Scope = Literal["sequence", "batch", "global"]


def importance_loss(routing: Routing, scope: Scope = "batch") -> Tensor:
    """CV^2(load), load_e = sum_r p_re"""
    load_E = (routing.scores * counted(routing)[:, None]).sum(0)
    return cv_squared(over_ranks(load_E, scope))


def hard_load_importance(routing: Routing, scope: Scope = "batch") -> Tensor:
    """CV^2(load), load_e = number of rows sent to e, with the gradient of sum_r p_re.

    Top-1 loads can be one-hot while probabilities are nearly uniform; this sees the difference.
    """
    straight_RE = routing.choices() + routing.scores - routing.scores.detach()
    return cv_squared(over_ranks((straight_RE * counted(routing)[:, None]).sum(0), scope))


def cv_squared(load_E: Tensor) -> Tensor:
    """Var(v) / (Mean(v)^2 + 1e-10)"""
    return load_E.var(correction=0) / (load_E.mean() ** 2 + 1e-10)


def balance_loss(routing: Routing, scope: Scope = "batch") -> Tensor:
    """E * sum_e f_e q_e; the gradient flows through q only."""
    if scope == "sequence" and routing.per == "sample":
        raise UsageError("scope sequence needs a router of tokens: here each sample is one row", hint="batch or global")
    groups = routing.num_samples if scope == "sequence" else 1
    counted_R1 = counted(routing)[:, None]
    rows_G1, chosen_GE, probability_GE = (
        over_ranks(x.view(groups, -1, x.shape[1]).sum(1), scope)
        for x in (counted_R1, routing.choices() * counted_R1, routing.scores * counted_R1)
    )
    share_GE = chosen_GE / (rows_G1 * routing.selected_experts.shape[1]).clamp(min=1)
    mean_GE = probability_GE / rows_G1.clamp(min=1)
    return (routing.num_experts * (share_GE * mean_GE).sum(1)).mean()


def router_z_loss(routing: Routing) -> Tensor:
    """mean_r (log sum_e exp l_re)^2"""
    return mean_over_rows(routing.router_logits.logsumexp(1) ** 2, routing)


def entropy(routing: Routing) -> Tensor:
    """mean_r -sum_e p_re log p_re"""
    p_RE = routing.scores
    return mean_over_rows(-(p_RE * p_RE.clamp(min=torch.finfo(p_RE.dtype).tiny).log()).sum(1), routing)


def counted(routing: Routing) -> Tensor:
    """(R,) 1 for real rows, 0 for padding."""
    if routing.mask is None:
        return routing.scores.new_ones(len(routing.scores))
    return routing.mask.to(routing.scores)


def mean_over_rows(values_R: Tensor, routing: Routing) -> Tensor:
    weights_R = counted(routing)
    return (values_R * weights_R).sum() / weights_R.sum().clamp(min=1)


def over_ranks(local: Tensor, scope: Scope) -> Tensor:
    """The sum over all processes for scope global.

    Each process knows the gradient of its own part only; the factor makes up for the mean that data parallelism takes.
    """
    if scope != "global" or not (dist.is_available() and dist.is_initialized()):
        return local
    total = local.detach().clone()
    dist.all_reduce(total)
    own = local * dist.get_world_size()
    return total + (own - own.detach())
