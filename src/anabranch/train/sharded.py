# SPDX-License-Identifier: Apache-2.0
"""Fully sharded data parallelism: a process keeps its part of every parameter, gradient and moment.

torch's `fully_shard` gathers the parameters of a unit just before the unit needs them and scatters their gradients.
Units are the members of module lists (the blocks of a transformer), and all that is left over. Experts are no units of
their own: which of them run depends on the rows of a process, and a gathering that one process sits out never ends.

    shards = Shards(objective, device)   # parameters are DTensors from here on
    shards.follow_first()                # before a step: buffers of the first process, as in data parallelism
    loss.backward()
    shards.finish_backward()
    shards.restore(origin)               # the very Parameter objects of before, whole again

A parameter without a gradient in any process keeps None, so that AdamW skips it as it does in one process. Parameters
that the objective itself moves in its forward (it names some in `follows`) and scalars stay whole in every process.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.mixture.experts import Bank

__all__ = ["Shards", "first_row", "local", "whole"]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, without asking the others."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of one that is sharded all processes ask together."""
    return cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def first_row(tensor: Tensor) -> int:
    """Which row of the whole tensor is the first that this process holds."""
    if not hasattr(tensor, "to_local"):
        return 0
    mesh = cast(Any, tensor).device_mesh
    return min(-(-len(tensor) // int(mesh.size())) * int(mesh.get_local_rank()), len(tensor))


@dataclass
class Home:
    """A module as it was: its class, its hooks, its parameters, and which attributes came with the sharding."""

    module: nn.Module
    kind: type[nn.Module]
    parameters: dict[str, nn.Parameter | None]
    hooks: dict[str, dict[Any, Any]]
    attributes: set[str]
    added: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, module: nn.Module) -> "Home":
        own = vars(module)
        hooks = {name: dict(value) for name, value in own.items() if "_hooks" in name and isinstance(value, dict)}
        return cls(module, type(module), dict(module._parameters), hooks, set(own))

    def put_back(self) -> None:
        own = vars(self.module)
        self.module.__class__ = self.kind
        for name in self.added:
            own.pop(name, None)
        for name, hooks in self.hooks.items():
            own[name].clear()
            own[name].update(hooks)
        self.module._parameters.update(self.parameters)


class Shards:
    def __init__(self, objective: nn.Module, device: torch.device):
        self.objective, self.world = objective, dist.get_world_size()
        roots = computing(objective)
        modules = {id(module): module for root in (*roots, objective) for module in root.modules()}
        self.homes = [Home.of(module) for module in modules.values()]
        self.names = {id(p): name for name, p in objective.named_parameters() if p.requires_grad}
        self.order = list(self.names.values())
        self.used: set[str] = set()
        self.parted: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        """By the id of a parameter as it was: it, and its shard."""
        whole = kept_whole(objective, roots)
        for parameter in whole:
            parameter.data = parameter.data.to(device)
        self.whole = [parameter for parameter in whole if parameter.requires_grad]
        self.units = [unit for root in roots for unit in self.shard(root, device, whole)]
        self.register_elsewhere(objective)
        self.watch()

    # Sharding and back ---------------------------------------------------------------------------------------------

    def shard(self, root: nn.Module, device: torch.device, whole: set[nn.Parameter]) -> list[nn.Module]:
        """One unit after the other, each freed before the next one: at most one is on the device as a whole."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.world,))
        parts = [] if moves_parameters(self.objective) else list(units(root))
        before = {id(home.module): home for home in self.homes}
        for part in (*parts, root):
            fully_shard(part, mesh=mesh, ignored_params=whole)
            self.let_go(before)
        sharded = cast(Any, root)
        if not hasattr(sharded, "set_reduce_scatter_unused_params"):
            raise UsageError("sharding needs a newer torch", expected="torch 2.13", received=torch.__version__)
        sharded.set_reduce_scatter_unused_params(True)  # which experts saw a row differs from process to process
        return [*parts, root]

    def let_go(self, before: dict[int, Home]) -> None:
        """Empty the parameters that have shards now; their objects come back in `restore`."""
        for home in before.values():
            home.added = set(vars(home.module)) - home.attributes
            for name, parameter in home.parameters.items():
                now = home.module._parameters[name]
                if parameter is not None and now is not parameter and id(parameter) not in self.parted:
                    self.parted[id(parameter)] = (parameter, cast(nn.Parameter, now))
                    parameter.data = parameter.data.new_empty(0)

    def register_elsewhere(self, objective: nn.Module) -> None:
        """An objective may name parameters that live in modules that it only holds."""
        for module in objective.modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in self.parted:
                    module._parameters[name] = self.parted[id(parameter)][1]

    @torch.no_grad()
    def restore(self, origin: torch.device) -> None:
        """Every process has the whole model again, in the objects that it had before."""
        from torch.distributed._composable_state import _module_state_mapping

        for unit in self.units:
            cast(Any, unit).reshard()
        for parameter, shard in self.parted.values():
            parameter.data = cast(Any, shard.detach()).full_tensor().to(origin)
            parameter.grad = None
        for home in self.homes:
            home.put_back()
            _module_state_mapping.pop(home.module, None)  # torch lets a module be sharded once in its life

    # Which parameters were used ------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Learn from the gathered parameters of a unit, once it has run, whether a backward pass reaches them."""
        places = {
            (id(home.module), name): self.names[id(parameter)]
            for home in self.homes
            for name, parameter in home.parameters.items()
            if id(parameter) in self.names
        }
        seen: set[int] = set()

        def look(unit: nn.Module, arguments: Any, output: Any) -> None:
            if id(unit) in seen:
                return
            seen.add(id(unit))
            for module in unit.modules():
                for name, parameter in module._parameters.items():
                    place = (id(module), name)
                    if parameter is not None and place in places and not hasattr(parameter, "to_local"):
                        cast(Any, parameter).register_post_accumulate_grad_hook(self.noting(places[place]))

        for unit in self.units:
            unit.register_forward_hook(look, prepend=True)  # before the unit's parameters are let go

    def noting(self, name: str) -> Callable[[Tensor], None]:
        return lambda parameter: self.used.add(name)

    # A step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def follow_first(self) -> None:
        """Buffers of the first process, one message for each type of number."""
        self.used.clear()
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.objective.buffers():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        for buffers in by_type.values():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            dist.broadcast(flat, 0)
            parts = torch.split(flat, [buffer.numel() for buffer in buffers])
            for buffer, values in zip(buffers, parts, strict=True):
                buffer.copy_(values.view_as(buffer))

    @torch.no_grad()
    def finish_backward(self) -> None:
        """The mean gradient of what stays whole; torch has seen to the rest."""
        for parameter in self.whole:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.world

    def usage(self, device: torch.device) -> Tensor:
        """(P,) 1 for each trained parameter that this process's backward pass reached."""
        return torch.tensor([float(name in self.used) for name in self.order], device=device)

    def forget_unused(self, usage: list[float]) -> None:
        """`usage` is the mean over processes."""
        parameters = dict(self.objective.named_parameters())
        for name, share in zip(self.order, usage, strict=True):
            if not share:
                parameters[name].grad = None

    @torch.no_grad()
    def square(self) -> Tensor:
        """This process's part of the squared norm of the gradient."""
        whole = {id(parameter) for parameter in self.whole}
        counted = [
            local(parameter.grad)
            for parameter in self.objective.parameters()
            if parameter.grad is not None and (id(parameter) not in whole or dist.get_rank() == 0)
        ]
        return nn.utils.get_total_norm(counted, foreach=True).float() ** 2

    @torch.no_grad()
    def clip(self, max_norm: float, norm: float) -> None:
        """As `clip_grads_with_norm_` does, on what this process holds."""
        factor = min(1.0, max_norm / (norm + 1e-6))
        for parameter in self.objective.parameters():
            if parameter.grad is not None:
                local(parameter.grad).mul_(factor)


def computing(objective: nn.Module) -> list[nn.Module]:
    """The modules in whose forward passes the objective's parameters are used: it, unless it says otherwise."""
    if hasattr(objective, "computing"):
        return list(cast(Any, objective).computing())
    return [objective]


def moves_parameters(objective: nn.Module) -> bool:
    """Whether the objective moves parameters in its own forward, and reads others there: all have to be whole then."""
    return hasattr(objective, "follows")


def kept_whole(objective: nn.Module, roots: list[nn.Module]) -> set[nn.Parameter]:
    moved = moves_parameters(objective)
    parameters = [p for root in roots for p in root.parameters()]
    return {p for p in parameters if p.ndim == 0 or (moved and not p.requires_grad)}


def units(root: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost module lists, where they have parameters and run as a whole."""
    for child in root.children():
        if isinstance(child, Bank):
            continue
        members = list(child) if isinstance(child, nn.ModuleList) else []
        for member in members:
            if isinstance(member, nn.ModuleList | nn.ModuleDict):
                yield from units(member)
            elif any(True for _ in member.parameters()):
                yield member
        if not members:
            yield from units(child)
