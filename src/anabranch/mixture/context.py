# SPDX-License-Identifier: Apache-2.0
"""What the samples of a forward pass belong to, and how the mixture layers of a model learn it.

    with route(model, Context(ids={"cluster": cluster_ids})):
        loss = model(pixel_values).loss

Any model works: the context does not travel through its signatures, `route` hands it to each mixture layer and takes it
back, also after an exception. Contexts nest; other models and other threads never see them.

Randomness: each layer receives one seed drawn from `generator`, so what a layer draws depends on nothing but the
context. Ranks that pass generators in the same state draw the same noise.

Gradient checkpointing runs a block again in the backward pass, when the `with` may be left or another context entered.
The context is therefore packed with the tensors that autograd saves (the inputs of a checkpointed block are among them,
with either value of `use_reentrant`), and unpacking these just before the block is run again restores it. The hooks
cost about 3 % on a very small model, so they are set only if a module has `gradient_checkpointing` switched on, as
transformers does, or if the caller passes `recompute=True`. A second run whose context is unknown is an error, never a
guess; hooks that other code sets around a block (activation offloading) hide ours and lead to it.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from anabranch.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from anabranch.mixture.routing import Routing


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    ids: Mapping[str, Tensor] = field(default_factory=dict)
    """Name to (B,) int64, the cluster, task or domain of each sample; or to (B, N), the step of each token.
    Not to be changed in place: layers keep what they make of them."""
    training: bool | None = None
    """Whether routers explore (gate noise). None: as the layer's own train or eval mode."""
    generator: torch.Generator | None = None
    """Where gate noise comes from; needed only by routers that draw some. Same state on every rank."""
    rows: Tensor | None = None
    """(B,) positions of these samples in the global batch. None: they are the whole batch."""
    batch: int | None = None
    """Size of the global batch; goes with `rows`."""
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What layers compute from the ids alone, and share."""
    mask: Tensor | None = None
    """(B, N) bool, False for padding: such tokens count in no loss and no statistic."""

    def __post_init__(self) -> None:
        if (self.rows is None) != (self.batch is None):
            raise ValueError("rows, batch: expected both or neither, received one")
        for name, ids in self.ids.items():
            if ids.ndim not in (1, 2) or ids.is_floating_point():
                raise ValueError(
                    f"ids[{name!r}]: expected integers (B,) or (B, N), received {ids.dtype} {tuple(ids.shape)}"
                )


@dataclass(frozen=True, eq=False)
class Frame:
    """A context as one layer sees it."""

    context: Context
    seed: int | None

    def known(self, key: str) -> Tensor:
        if key not in self.context.ids:
            hint = did_you_mean(key, self.context.ids) if self.context.ids else f"Context(ids={{{key!r}: ...}})"
            raise UsageError(f"the context says nothing about the {key} of the samples", hint=hint)
        return self.context.ids[key]

    def token_ids(self, key: str, batch: int, length: int) -> Tensor:
        """(B, N), or (B, 1) where the context knows samples only."""
        ids = self.known(key)
        if ids.shape not in ((batch,), (batch, length)):
            raise UsageError(
                f"the context does not fit the batch: {key} ids of shape {tuple(ids.shape)}",
                expected=f"({batch}, {length}), one for each token the layer received, or ({batch},)",
                received=tuple(ids.shape),
            )
        return ids if ids.ndim == 2 else ids[:, None]

    def ids(self, key: str, length: int) -> Tensor:
        ids = self.known(key)
        if ids.ndim != 1 or len(ids) != length:
            raise UsageError(
                f"the context does not fit the batch: {len(ids)} {key} ids for {length} samples",
                expected=f"{length} ids, one for each sample the layer received",
                received=f"{len(ids)} ids",
            )
        return ids

    def mask(self, batch: int, length: int) -> Tensor | None:
        """The mask as one row (B * N,)."""
        mask = self.context.mask
        if mask is not None and mask.shape != (batch, length):
            raise UsageError("the mask does not fit the batch", expected=(batch, length), received=tuple(mask.shape))
        return None if mask is None else mask.flatten()

    def generator(self) -> torch.Generator:
        if self.seed is None:
            raise UsageError("gate noise needs a generator", hint="Context(..., generator=torch.Generator())")
        return torch.Generator().manual_seed(self.seed)


class Slot(threading.local):
    """One layer's view of the present: its frame, and its last routing until someone takes it.

    Copies of a layer start with an empty slot: neither contexts nor autograd graphs are copied.
    """

    active: Frame | None = None
    replayed: Frame | None = None
    routing: "Routing | None" = None

    def __reduce__(self) -> "tuple[type[Slot], tuple[()]]":
        return Slot, ()

    def current(self) -> Frame | None:
        return self.replayed if in_backward() else self.active


def in_backward() -> bool:
    """Whether a backward pass is running in this thread: a forward seen then is one of gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def route(model: nn.Module, context: Context, *, recompute: bool | None = None) -> Iterator[None]:
    """Within the `with`, every mixture layer of `model` knows `context`.

    `recompute=True` announces `torch.utils.checkpoint` inside the model; transformers' own switch is seen without it.
    """
    own = [vars(module) for module in model.modules()]
    slots = [slot for attributes in own if isinstance(slot := attributes.get("slot"), Slot)]
    if not slots:
        raise UsageError("this model has no mixture layer, nothing would be routed", received=type(model).__name__)
    if recompute is None:
        recompute = any(attributes.get("gradient_checkpointing", False) for attributes in own)
    frames = [Frame(context, seed) for seed in layer_seeds(context.generator, len(slots))]
    before = [slot.active for slot in slots]
    for slot, frame in zip(slots, frames, strict=True):
        slot.active, slot.replayed, slot.routing = frame, None, None
    try:
        with saved_tensors_hooks(Tensor.detach, replay(slots, frames)) if recompute else nullcontext():
            yield
    finally:
        for slot, frame_before in zip(slots, before, strict=True):
            slot.active = frame_before


def replay(slots: list[Slot], frames: list[Frame]) -> Callable[[Tensor], Tensor]:
    """An unpack hook that also announces the context in which the tensor was saved."""

    def unpack(tensor: Tensor) -> Tensor:
        for slot, frame in zip(slots, frames, strict=True):
            slot.replayed = frame
        return tensor

    return unpack


def layer_seeds(generator: torch.Generator | None, num_layers: int) -> list[int] | list[None]:
    if generator is None:
        return [None] * num_layers
    seeds: list[int] = torch.randint(2**62, (num_layers,), generator=generator, device=generator.device).tolist()
    return seeds


def missing_context(need: str, example: str) -> UsageError:
    """The error for a layer that cannot do without a context, and was told nothing."""
    if in_backward():
        return UsageError(
            "gradient checkpointing runs a mixture layer again in the backward pass, where its context is unknown",
            hint="route(model, context, recompute=True)",
        )
    return UsageError(
        f"a mixture layer ran without a context: it has to know {need}",
        expected="the forward inside `with route(model, context):`",
        hint=f"Context({example})",
    )
