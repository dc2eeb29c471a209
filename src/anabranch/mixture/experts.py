# SPDX-License-Identifier: Apache-2.0
"""Banks of experts, whatever an expert is: a feed-forward network, a whole transformer block.

`ModuleBank`   any modules of one class, called with the rows of their samples.
`ExpertBank`   two-layer feed-forward networks (fc1, activation_fn, fc2) as separate modules: the form to train. Weights
               of neighbouring experts are neighbours in memory, so that a sorted batch needs one product, not E.
`StackedBank`  the same networks as four 3-D parameters: the form in which other tools store experts.

Surgery (`take, drop, permute, merge, grow`) returns a new bank and leaves the old one alone. An expert that is
frozen, or that received no row, has no gradient (None, not zero), so weight decay cannot move it. In a `StackedBank`
all experts share a gradient, and decay moves all of them.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.mixture.grouped import grouped_linear


class Bank(nn.Module):
    """What a `Mixture` asks of its experts, and the surgery that follows from `tensors` and `take`."""

    @property
    def num_experts(self) -> int:
        raise NotImplementedError

    def tensors(self, expert: int) -> dict[str, Tensor]:
        """The parameters of one expert, as views: writing into them changes the bank."""
        raise NotImplementedError

    def run(self, expert: int, rows: Tensor, **extras: Any) -> Tensor:
        raise NotImplementedError

    def take(self, experts: Sequence[int]) -> Self:
        """A new bank of copies of these experts, in this order; an expert may be named twice."""
        raise NotImplementedError

    def run_sorted(self, rows: Tensor, experts: Sequence[int], sizes: Sequence[int], **extras: Any) -> Tensor:
        """The first sizes[0] rows through experts[0], the next sizes[1] rows through experts[1], and so on."""
        parts = torch.split(rows, list(sizes))
        return torch.cat([self.run(expert, part, **extras) for expert, part in zip(experts, parts, strict=True)])

    def drop(self, experts: Iterable[int]) -> Self:
        gone = set(experts)
        return self.take([expert for expert in range(self.num_experts) if expert not in gone])

    def permute(self, order: Sequence[int]) -> Self:
        if sorted(order) != list(range(self.num_experts)):
            raise UsageError("not a permutation of the experts", expected=f"0..{self.num_experts - 1}", received=order)
        return self.take(order)

    @torch.no_grad()
    def merge(self, weights: Tensor) -> Self:
        """New expert m = sum over e of weights[m, e] * old expert e; weights (M, E)."""
        if weights.ndim != 2 or weights.shape[1] != self.num_experts:
            raise UsageError(
                "the merge weights do not fit", expected=f"(M, {self.num_experts})", received=tuple(weights.shape)
            )
        merged = self.take([0] * len(weights))
        sources = [self.tensors(expert) for expert in range(self.num_experts)]
        for row_E, tensors in zip(weights, (merged.tensors(m) for m in range(len(weights))), strict=True):
            for name, tensor in tensors.items():
                stack = torch.stack([source[name] for source in sources])
                tensor.copy_(torch.tensordot(row_E.to(tensor), stack, dims=1))
        return merged

    def grow(self, sources: Sequence[int], *, noise: float, generator: torch.Generator) -> Self:
        """All experts, then a noisy copy of each of `sources`."""
        grown = self.take([*range(self.num_experts), *sources])
        grown.perturb(range(self.num_experts, grown.num_experts), noise, generator)
        return grown

    @torch.no_grad()
    def perturb(self, experts: Iterable[int], noise: float, generator: torch.Generator) -> None:
        """Add N(0, (noise * std)^2) to each tensor of these experts, std being the tensor's own."""
        for expert in experts:
            for tensor in self.tensors(expert).values():
                if tensor.numel() > 1:
                    normal = torch.randn(tensor.shape, generator=generator).to(tensor)
                    tensor.add_(normal * (noise * tensor.std()))


class ModuleBank(Bank):
    """Experts are modules of one class."""

    def __init__(self, experts: Iterable[nn.Module]):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        if not len(self.experts):
            raise ValueError("experts: expected at least one, received none")

    @classmethod
    def from_template(
        cls,
        template: nn.Module,
        num_experts: int,
        *,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Copies of a (trained) module; relative noise, such as 1e-2, breaks their ties."""
        bank = cls(copy.deepcopy(template) for _ in range(num_experts))
        if noise:
            if generator is None:
                raise ValueError("generator: expected one with noise > 0, received None")
            bank.perturb(range(num_experts), noise, generator)
        return bank

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    def __getitem__(self, expert: int) -> nn.Module:
        return self.experts[expert]

    def tensors(self, expert: int) -> dict[str, Tensor]:
        return dict(self.experts[expert].named_parameters())

    def run(self, expert: int, rows: Tensor, **extras: Any) -> Tensor:
        return cast(Tensor, self.experts[expert](rows, **extras))

    def take(self, experts: Sequence[int]) -> Self:
        return type(self)(self.extract(expert) for expert in experts)

    def extract(self, expert: int) -> nn.Module:
        """A module of the template's class with memory of its own: put in its place, it makes the model a dense one."""
        return copy.deepcopy(self.experts[expert])

    def freeze(self, experts: Iterable[int]) -> None:
        for expert in experts:
            self.experts[expert].requires_grad_(False)

    def frozen(self) -> list[int]:
        return [e for e, expert in enumerate(self.experts) if not any(p.requires_grad for p in expert.parameters())]


class ExpertBank(ModuleBank):
    """Experts are feed-forward networks y = fc2(activation_fn(fc1(x)))."""

    def __init__(self, experts: Iterable[nn.Module]):
        super().__init__(experts)
        for expert in self.experts:
            parts = {name for name, part in expert.named_children() if not isinstance(part, nn.Identity)}
            if parts != {"fc1", "activation_fn", "fc2"}:
                raise UsageError(
                    "this is not a two-layer feed-forward network",
                    expected="modules fc1, activation_fn, fc2",
                    received=", ".join(sorted(parts)) or "none",
                    hint="ModuleBank takes any module",
                )
        self.pack()

    def extract(self, expert: int, scale: float = 1.0) -> nn.Module:
        """As in ModuleBank; `scale` is a constant gate value to fold into the second layer."""
        dense = super().extract(expert)
        if scale != 1.0:
            with torch.no_grad():
                for parameter in cast(nn.Module, dense.fc2).parameters():
                    parameter.mul_(scale)
        return dense

    def run_sorted(self, rows: Tensor, experts: Sequence[int], sizes: Sequence[int], **extras: Any) -> Tensor:
        chosen = [cast(Any, self.experts[expert]) for expert in experts]
        autocast = torch.is_autocast_enabled(rows.device.type)
        alike = all(plain(expert, rows.dtype) for expert in chosen) and len({e.fc1.weight.shape for e in chosen}) == 1
        if extras or autocast or not alike:
            return super().run_sorted(rows, experts, sizes, **extras)
        per_sample = rows[0].numel() // rows.shape[-1]
        x_TD, row_sizes = rows.flatten(0, -2), [size * per_sample for size in sizes]
        h_TH = grouped_linear(x_TD, row_sizes, [e.fc1.weight for e in chosen], [e.fc1.bias for e in chosen])
        h_TH = chosen[0].activation_fn(h_TH)
        y_TD = grouped_linear(h_TH, row_sizes, [e.fc2.weight for e in chosen], [e.fc2.bias for e in chosen])
        return y_TD.view(*rows.shape[:-1], -1)

    @torch.no_grad()
    def pack(self) -> None:
        """Lay the weights of the experts one after another in memory. Parameters stay the same objects."""
        for layer in ("fc1", "fc2"):
            weights = [getattr(expert, layer).weight for expert in self.experts]
            if len({(weight.shape, weight.dtype, weight.device) for weight in weights}) == 1:
                for weight, home in zip(weights, torch.stack(weights), strict=True):
                    weight.data = home

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        moved = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.pack()  # .to(...) gives every parameter memory of its own
        return cast(Self, moved)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.pack()  # so does deepcopy

    def stacked(self) -> "StackedBank":
        tensors = [self.tensors(expert) for expert in range(self.num_experts)]
        return StackedBank(tensors, cast(nn.Module, self[0].activation_fn))


def plain(expert: nn.Module, dtype: torch.dtype) -> bool:
    """Whether calling the module does no more than its formula: no adapter in it, no hook, no learned activation."""
    parts = expert._modules
    fc1, fc2, activation_fn = cast(Any, parts["fc1"]), cast(Any, parts["fc2"]), cast(nn.Module, parts["activation_fn"])
    return (
        type(fc1) is type(fc2) is nn.Linear
        and fc1.weight.dtype == fc2.weight.dtype == dtype
        and fc1.bias is not None
        and fc2.bias is not None
        and not (activation_fn._parameters or activation_fn._modules)
        and not any(m._forward_hooks or m._forward_pre_hooks for m in (expert, fc1, fc2, activation_fn))
    )


class StackedBank(Bank):
    """Feed-forward experts as `fc1_weight (E, H, D), fc1_bias (E, H), fc2_weight (E, D, H), fc2_bias (E, D)`."""

    names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")

    def __init__(self, experts: Sequence[dict[str, Tensor]], activation_fn: nn.Module):
        super().__init__()
        self.activation_fn = copy.deepcopy(activation_fn)
        for name in self.names:
            stack = torch.stack([tensors[name].detach() for tensors in experts])
            self.register_parameter(name.replace(".", "_"), nn.Parameter(stack))

    @property
    def stacks(self) -> dict[str, Tensor]:
        return {name: getattr(self, name.replace(".", "_")) for name in self.names}

    @property
    def num_experts(self) -> int:
        return len(self.stacks["fc1.weight"])

    def tensors(self, expert: int) -> dict[str, Tensor]:
        return {name: stack[expert] for name, stack in self.stacks.items()}

    def run(self, expert: int, rows: Tensor, **extras: Any) -> Tensor:
        if extras:
            raise UsageError("stacked experts take nothing but hidden states", received=", ".join(extras))
        w1, b1, w2, b2 = self.tensors(expert).values()
        return nn.functional.linear(self.activation_fn(nn.functional.linear(rows, w1, b1)), w2, b2)

    def take(self, experts: Sequence[int]) -> Self:
        return type(self)([self.tensors(expert) for expert in experts], self.activation_fn)

    def separate(self, template: nn.Module) -> ExpertBank:
        """The same experts as copies of a module with fc1, activation_fn, fc2."""
        bank = ExpertBank.from_template(template, self.num_experts)
        with torch.no_grad():
            for expert in range(self.num_experts):
                for name, tensor in bank.tensors(expert).items():
                    tensor.copy_(self.tensors(expert)[name])
        return bank
