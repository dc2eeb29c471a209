# SPDX-License-Identifier: Apache-2.0
"""Least-loaded expert parallelism, run: a plan's tokens and matrices travel, results and gradients come back.

Paper     : LLEP (arXiv 2601.17111) and its released code.
Equation  : y_t = sum_k w_tk E_{i_tk}(x_t), whatever the plan: it says only where each E_i(x_t) is computed;
            dL/dE_e = sum over the devices that ran e, added up where e is owned; L: all processes' losses, summed
Shapes    : T tokens of a process, K chosen, D width, N experts of which a process owns n, P processes; matrices
            (n, ...) by name; R rows (token-expert pairs) of a process. An expert's tokens: by process, token, slot.
Differs   : processes on CPUs under gloo, one exchange after the other, nothing overlaps: it shows that a plan is exact,
            not that it is fast. Every process joins every exchange, forward and backward, also one without a row.
Check     : one process that emulates a plan, and two that run it, give the output and the gradients of the plain
            mixture; a process that dies or stops answering ends in an error (tests/reuse/serve/test_llep.py).
Exempt    : experts (owners and chunks go by the numbers of experts)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from anabranch.errors import UsageError
from anabranch.models.mixtures.layers import MixtureLayer
from anabranch.models.mixtures.surgery import FUSED
from anabranch.reuse.serve.exchange import exchange
from anabranch.reuse.serve.placement import Chunk, Plan, least_loaded

Compute = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""One expert's matrices and (T, D) to its output (T, D), unweighted and differentiable."""
Planner = Callable[[Sequence[int], Sequence[int], int], Plan]
"""Tokens of every expert, owners and the number of processes to a plan; must decide alike in every process."""


def of_layer(layer: MixtureLayer) -> tuple[dict[str, Tensor], Compute]:
    """The parameters of a transformers block, stacked, and what one expert of its family computes."""
    stacked = {name: value for name, value in layer.experts.named_parameters() if name in FUSED}
    transposed = bool(getattr(layer.experts, "is_transposed", False))

    def compute(own: Mapping[str, Tensor], hidden_states: Tensor) -> Tensor:
        gate_up, down = own["gate_up_proj"], own["down_proj"]
        if transposed:
            gate_up, down = gate_up.T, down.T
        linear = torch.nn.functional.linear
        inner = layer.experts._apply_gate(linear(hidden_states, gate_up, own.get("gate_up_proj_bias")))
        return linear(inner, down, own.get("down_proj_bias"))

    return stacked, compute


def emulate(
    plan: Plan, compute: Compute, matrices: Mapping[str, Tensor], hidden_states: Tensor, selected_experts: Tensor,
    routing_weights: Tensor,
) -> Tensor:  # fmt: skip
    """Every device's part of the plan, one after the other in one process: (T, D) to (T, D)."""
    num_experts = len(next(iter(matrices.values())))
    counts_N = torch.bincount(selected_experts.flatten(), minlength=num_experts)
    placed_N = [sum(c.stop - c.start for c in plan.chunks if c.expert == e) for e in range(num_experts)]
    if counts_N.tolist() != placed_N:
        raise UsageError("the plan is for other tokens", expected=f"{counts_N.tolist()} by expert", received=placed_N)
    rows_R, first_N = by_expert(selected_experts, counts_N)
    out_TD = torch.zeros_like(hidden_states)
    for chunk in sorted(plan.chunks, key=lambda c: c.device):
        rows = rows_R[first_N[chunk.expert] + chunk.start : first_N[chunk.expert] + chunk.stop]
        tokens = rows // selected_experts.shape[1]
        outputs = compute({name: value[chunk.expert] for name, value in matrices.items()}, hidden_states[tokens])
        out_TD = out_TD.index_add(0, tokens, outputs * routing_weights.flatten()[rows, None].to(outputs.dtype))
    return out_TD


def by_expert(selected: Tensor, counts: Tensor) -> tuple[Tensor, list[int]]:
    """The rows (token * K + slot) in the order of their experts, and where each expert's begin."""
    return selected.flatten().argsort(stable=True), (counts.cumsum(0) - counts).tolist()


# several processes


def dispatch(
    compute: Compute, matrices: Mapping[str, Tensor], owner: Sequence[int], hidden_states: Tensor,
    selected_experts: Tensor, routing_weights: Tensor, *, group: dist.ProcessGroup, planner: Planner = least_loaded,
) -> Tensor:  # fmt: skip
    """This process's tokens through experts that lie with all: (T, D) to (T, D).

    matrices    of the experts that this process owns, in their order
    owner       of every expert: the rank in the group

    Every process calls it at the same point, with as many tokens as it has, and calls backward if one does.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if any(len(value) != list(owner).count(rank) for value in matrices.values()):
        raise UsageError(
            f"process {rank} holds other experts than it owns", expected=f"{list(owner).count(rank)} of each matrix",
            received={name: len(value) for name, value in matrices.items()},
        )  # fmt: skip
    counts_N = torch.bincount(selected_experts.flatten(), minlength=len(owner))
    counts_PN = exchange(counts_N.repeat(size, 1), [1] * size, [1] * size, group)
    plan = planner(counts_PN.sum(0).tolist(), owner, size)
    job = Job.of(plan, counts_PN.tolist(), rank, group, compute, matrices)
    rows_R, first_N = by_expert(selected_experts, counts_N)
    rows_R = torch.cat([rows_R[:0], *(rows_R[first_N[e] + low : first_N[e] + high] for e, low, high in job.slices)])
    tokens_R = rows_R // selected_experts.shape[1]
    outputs_RD = Travel.apply(job, hidden_states[tokens_R], *matrices.values())
    weights_R1 = routing_weights.flatten()[rows_R, None].to(outputs_RD.dtype)
    return torch.zeros_like(hidden_states).index_add(0, tokens_R, outputs_RD * weights_R1)


@dataclass(frozen=True, eq=False)
class Job:
    """What one process sends, receives and computes under a plan."""

    group: dist.ProcessGroup
    compute: Compute
    names: tuple[str, ...]
    slices: list[tuple[int, int, int]]
    """Own rows in the order of sending: expert, first and end among the own rows of that expert."""
    rows_out: list[int]
    rows_in: list[int]
    """Rows to and from every process."""
    pieces: list[tuple[int, int]]
    """What comes in, in order: expert and rows; by process, then by chunk."""
    lent: list[int]
    """Own experts by place, in the order of sending."""
    lent_out: list[int]
    lent_in: list[int]
    """Experts to and from every process."""
    own: dict[int, int]
    """Owned experts to places among the own."""
    foreign: dict[int, int]
    """Experts that come in to places among those."""

    @classmethod
    def of(
        cls, plan: Plan, counts: Sequence[Sequence[int]], rank: int, group: dist.ProcessGroup, compute: Compute,
        matrices: Mapping[str, Tensor],
    ) -> "Job":  # fmt: skip
        size = plan.num_devices
        chunks = sorted(plan.chunks, key=lambda c: c.device)
        shares = [[share(c, counts, source) for c in chunks] for source in range(size)]
        rows_out, rows_in = [0] * size, [0] * size
        for chunk, (low, high) in zip(chunks, shares[rank], strict=True):
            rows_out[chunk.device] += high - low
        pieces = []
        for source in range(size):
            for chunk, (low, high) in zip(chunks, shares[source], strict=True):
                if chunk.device == rank:
                    rows_in[source] += high - low
                    pieces.append((chunk.expert, high - low))
        own = {e: i for i, e in enumerate(e for e, home in enumerate(plan.owner) if home == rank)}
        lending = sorted((to, e) for e, to in plan.transfers if plan.owner[e] == rank)
        coming = sorted((plan.owner[e], e) for e, to in plan.transfers if to == rank)
        return cls(
            group, compute, tuple(matrices), [(c.expert, *s) for c, s in zip(chunks, shares[rank], strict=True)],
            rows_out, rows_in, pieces, [own[e] for _, e in lending], tally([to for to, _ in lending], size),
            tally([home for home, _ in coming], size), own, {e: i for i, (_, e) in enumerate(coming)},
        )  # fmt: skip

    def run(self, rows: Tensor, own: Sequence[Tensor], foreign: Sequence[Tensor]) -> Tensor:
        """Everything that came in through its expert, in the order in which it came."""
        outputs = [rows[:0]]
        for (expert, _), piece in zip(self.pieces, rows.split([size for _, size in self.pieces]), strict=True):
            places, stacks = (self.own, own) if expert in self.own else (self.foreign, foreign)
            matrices = {name: stack[places[expert]] for name, stack in zip(self.names, stacks, strict=True)}
            if len(piece):
                outputs.append(self.compute(matrices, piece))
        return torch.cat(outputs)


def share(chunk: Chunk, counts: Sequence[Sequence[int]], source: int) -> tuple[int, int]:
    """The part of the chunk that comes from a process: first and end among its own rows of the expert."""
    before = sum(row[chunk.expert] for row in counts[:source])
    low = min(max(chunk.start - before, 0), counts[source][chunk.expert])
    return low, max(low, min(chunk.stop - before, counts[source][chunk.expert]))


def tally(ranks: Sequence[int], size: int) -> list[int]:
    return [ranks.count(rank) for rank in range(size)]


class Travel(torch.autograd.Function):
    """Rows and lent matrices out, outputs back; in the backward pass the same ways the other way round.

    One function, not a chain of exchanges: a process that runs no foreign expert would otherwise have no reason to
    join the exchange of gradients, and the others would wait for it.
    """

    @staticmethod
    def forward(ctx: Any, job: Job, rows: Tensor, *own: Tensor) -> Tensor:
        ctx.job = job
        came = exchange(rows, job.rows_out, job.rows_in, job.group)
        foreign = [exchange(value[job.lent], job.lent_out, job.lent_in, job.group) for value in own]
        with torch.enable_grad():
            ctx.inputs = [value.detach().requires_grad_() for value in (came, *own, *foreign)]
            ctx.outputs = job.run(ctx.inputs[0], ctx.inputs[1 : 1 + len(own)], ctx.inputs[1 + len(own) :])
        return exchange(ctx.outputs.detach(), job.rows_in, job.rows_out, job.group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        job, num = ctx.job, len(ctx.job.names)
        came = exchange(gradient, job.rows_out, job.rows_in, job.group)
        found = torch.autograd.grad(ctx.outputs, ctx.inputs, came, allow_unused=True, materialize_grads=True)
        rows = exchange(found[0], job.rows_in, job.rows_out, job.group)
        lent = torch.tensor(job.lent, dtype=torch.int64)
        own = []
        for mine, theirs in zip(found[1 : 1 + num], found[1 + num :], strict=True):
            back = exchange(theirs, job.lent_in, job.lent_out, job.group)
            own.append(mine.index_add(0, lent, back))
        return None, rows, *own
