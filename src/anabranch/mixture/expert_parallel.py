# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism: the experts of a layer lie with several processes, and rows travel to them and back.

Equation  : y_r = sum_k w_rk E_{i_rk}(x_r), wherever E_i lies.  Loss L = (1 / P) sum of the processes' losses:
            dL/dE_e = (1 / P) sum over processes of dL_p/dE_e, complete where e is owned; nothing is left to reduce
Shapes    : R rows of a process (tokens, or samples with all their tokens), K chosen, E experts, P processes; every
            process may have another R, also none.
Exchange  : counts (P, E) to all; rows to the owners of their experts; outputs back. In the backward pass the two last
            ways the other way round. Every process takes part in every exchange, whether it has rows or not.
Order     : an owner computes an expert's rows in the order of processes, then of rows: as one process would that has
            the rows of all.

    layer = ExpertParallel(mixture, owner=[0, 0, 1, 1])   # every process builds the whole layer, then keeps its part
    loss.backward()
    average_gradients(model)                              # of what all processes have; experts have theirs

`owner` comes from outside: experts in their order, or by the load that was seen (anabranch.reuse.serve.placement).
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from anabranch.errors import UsageError
from anabranch.mixture.context import Slot
from anabranch.mixture.dispatch import run, scaled
from anabranch.mixture.experts import Bank
from anabranch.mixture.layer import Mixture
from anabranch.mixture.routing import Routing


class ExpertParallel(Mixture):
    """Takes the place of a `Mixture`, of which it keeps the router, the universal expert and its own experts."""

    def __init__(self, whole: Mixture, owner: Sequence[int], group: dist.ProcessGroup | None = None):
        nn.Module.__init__(self)
        check_owners(owner, whole.bank.num_experts, dist.get_world_size(group))
        self.group, self.owner = group, tuple(owner)
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.router, self.universal, self.slot = whole.router, whole.universal, Slot()
        self.own = [expert for expert, home in enumerate(self.owner) if home == self.rank]
        self.template = (whole.bank.take([0]).requires_grad_(False),)
        """One expert, for `whole`; a tuple is no sub-module."""
        self.experts = whole.bank.take(self.own) if self.own else None
        self.train(whole.training)

    @property
    def bank(self) -> Bank:  # type: ignore[override]
        if self.experts is None:
            raise UsageError(f"process {self.rank} owns no expert", expected="one of the others", received=self.owner)
        return self.experts

    def through_experts(self, hidden_states: Tensor, routing: Routing, **extras: Any) -> Tensor:
        if routing.per == "sample":
            return self.combine(hidden_states, routing, **extras)
        y_RD = self.combine(hidden_states.flatten(0, 1), routing, **extras)
        return y_RD.view(hidden_states.shape)

    def combine(self, rows: Tensor, routing: Routing, **extras: Any) -> Tensor:
        choices, top_k = routing.selected_experts.flatten(), routing.selected_experts.shape[1]
        counts_PE = self.share_counts(choices)
        order = self.places.to(choices.device)[choices].argsort(stable=True)
        out, into = self.splits(counts_PE)
        link = torch.ones((), device=rows.device, requires_grad=torch.is_grad_enabled())
        came = exchange(rows.index_select(0, order // top_k), link, out, into, self.group, float(self.world))
        y = self.compute(came, counts_PE[:, self.own], **extras)
        y = exchange(y, link, into, out, self.group, 1 / self.world)
        y = scaled(y, routing.routing_weights.flatten()[order])
        return torch.zeros_like(rows).index_add(0, order // top_k, y.to(rows.dtype))

    @property
    def places(self) -> Tensor:
        """(E,) the order in which rows are sent: by owner, then by expert."""
        by_owner = sorted(range(len(self.owner)), key=lambda expert: (self.owner[expert], expert))
        return torch.tensor(by_owner).argsort()

    def share_counts(self, choices: Tensor) -> Tensor:
        """(P, E) on the CPU: how many rows each process has for each expert."""
        own_E = torch.bincount(choices, minlength=len(self.owner))
        found = [torch.empty_like(own_E) for _ in range(self.world)]
        dist.all_gather(found, own_E, group=self.group)
        return torch.stack(found).cpu()

    def splits(self, counts_PE: Tensor) -> tuple[list[int], list[int]]:
        """Rows to and from every process."""
        homes = torch.tensor(self.owner)
        out = torch.zeros(self.world, dtype=torch.int64).index_add(0, homes, counts_PE[self.rank])
        return out.tolist(), counts_PE[:, self.own].sum(1).tolist()

    def compute(self, came: Tensor, counts_Pe: Tensor, **extras: Any) -> Tensor:
        """Rows by process and expert, through their experts, in the order in which they came."""
        if not len(came):
            return came + 0 * came.sum()  # no expert runs, but the way back through this process stays
        per_process = torch.arange(counts_Pe.shape[1]).repeat(len(counts_Pe))
        choices = per_process.repeat_interleave(counts_Pe.flatten()).to(came.device)
        order = choices.argsort(stable=True)
        y = run(came.index_select(0, order), choices[order], self.bank, **extras)
        if y.shape != came.shape:
            raise UsageError(
                "these experts change the shape of their rows: a process without rows could not know it",
                expected=tuple(came.shape), received=tuple(y.shape),
            )  # fmt: skip
        return torch.zeros_like(came).index_copy(0, order, y.to(came.dtype))

    @torch.no_grad()
    def whole(self) -> Mixture:
        """The plain layer with all experts, in every process: for a checkpoint, or another placement."""
        bank = self.template[0].take([0] * len(self.owner)).requires_grad_(True)
        for expert, home in enumerate(self.owner):
            mine = self.bank.tensors(self.own.index(expert)) if home == self.rank else {}
            for name, tensor in bank.tensors(expert).items():
                if home == self.rank:
                    tensor.copy_(mine[name])
                source = home if self.group is None else dist.get_global_rank(self.group, home)
                dist.broadcast(tensor, source, group=self.group)
        return Mixture(self.router, bank, universal=self.universal).train(self.training)


def check_owners(owner: Sequence[int], num_experts: int, world: int) -> None:
    if len(owner) != num_experts or not all(0 <= home < world for home in owner):
        raise UsageError(
            "these experts have no home", expected=f"{num_experts} owners of 0 to {world - 1}", received=list(owner)
        )


def exchange(
    rows: Tensor, link: Tensor, out: Sequence[int], into: Sequence[int], group: dist.ProcessGroup | None, factor: float
) -> Tensor:
    """`out[p]` rows to process p, `into[p]` rows from it; gradients travel back, times `factor`.

    link     a number that requires a gradient, so that a process whose rows need none joins the way back
    factor   1 / P on the way home, which makes gradients of experts those of the mean loss; P on the way out, which
             gives the rows theirs back
    """
    return cast(Tensor, Exchange.apply(rows, link, list(out), list(into), group, factor))  # type: ignore[no-untyped-call]


class Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, link: Tensor, out: list[int], into: list[int], group: Any, by: float) -> Tensor:
        ctx.out, ctx.into, ctx.group, ctx.factor = out, into, group, by
        return travel(rows, out, into, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        back = travel(gradient, ctx.into, ctx.out, ctx.group) * ctx.factor
        return back, gradient.new_zeros(()), None, None, None, None


def travel(rows: Tensor, out: list[int], into: list[int], group: dist.ProcessGroup | None) -> Tensor:
    came = rows.new_empty(sum(into), *rows.shape[1:])
    dist.all_to_all_single(came, rows.contiguous(), into, out, group=group)
    return came


def expert_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Of the experts that this process owns."""
    for module in model.modules():
        if isinstance(module, ExpertParallel) and module.experts is not None:
            yield from module.experts.parameters()


@torch.no_grad()
def average_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Of all parameters but those of experts the mean gradient; None where no process has one."""
    own = {id(parameter) for parameter in expert_parameters(model)}
    common = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    if not common:
        return
    has = torch.tensor([float(p.grad is not None) for p in common], device=common[0].device)
    dist.all_reduce(has, group=group)
    for parameter, anywhere in zip(common, has.tolist(), strict=True):
        if anywhere:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient, group=group)
            parameter.grad = gradient / dist.get_world_size(group)
