# SPDX-License-Identifier: Apache-2.0
"""PreMoe: a library of tasks; a query finds its task by the first mixture layer alone and brings only those experts.

Paper     : arXiv 2505.17639, expert pruning (PEP) and retrieval (TAER).
Equation  : PEP: the M highest scores of each layer.  TAER: task = argmin_t || q - P_t ||_2, q the query's pattern of
            the first layer, P_t the stored one; the expert of rank j in P_t stands for that of rank j in layer l of
            the task; kept in layer l: those that the M highest of q stand for.
Shapes    : L layers, N experts, G groups of the selection; scores (L, N), a pattern (N,).
Differs   : the scores are handed in, any ranking will do; where a family selects by groups, ranks are those within a
            group, so that every group keeps as many.
Check     : a query equal to a stored pattern finds its task and that task's PEP list
            (tests/reuse/prune/test_premoe.py).
Exempt    : samples (a query has one pattern); experts (a pattern and a library know experts by their numbers)

A pattern and the scores it is compared with have to be made alike. `first_layer` runs a query no further than needed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.models.mixtures.layers import MixtureLayer
from anabranch.reuse.calibration import Batch, reading, real_tokens, run
from anabranch.reuse.prune.keep import Keep, Protect, check_count, check_scores, uniform
from anabranch.swap import swap_file, swap_text

FORMAT = "anabranch task library 1"


def pep(layers: Sequence[MixtureLayer], scores: Tensor, num_keep: int, protect: Protect = ()) -> Keep:
    """The M highest scores of each layer."""
    return uniform(layers, scores, num_keep, protect)


def ranks(row: Tensor, num_groups: int) -> Tensor:
    """(G, N / G): the experts of each group from its highest score down; equals by index."""
    grouped = row.double().view(num_groups, -1)
    first = torch.arange(num_groups)[:, None] * grouped.shape[1]
    return grouped.sort(dim=1, descending=True, stable=True).indices + first


@dataclass(frozen=True, eq=False)
class TaskLibrary:
    """What is known of each task: the pattern of its first layer, and which experts stand for one another."""

    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    num_groups: int
    patterns: Tensor  # (tasks, N) float64
    order: Tensor  # (tasks, L, G, N / G) int64

    @classmethod
    def of(cls, layers: Sequence[MixtureLayer], scores: Mapping[str, Tensor]) -> "TaskLibrary":
        """From each task's scores (L, N)."""
        if not scores:
            raise UsageError("a library needs a task", expected="at least one", received=0)
        for task_scores in scores.values():
            check_scores(layers, task_scores)
        groups = layers[0].num_groups
        patterns = torch.stack([value[0].double().cpu() for value in scores.values()])
        order = torch.stack([torch.stack([ranks(row.cpu(), groups) for row in value]) for value in scores.values()])
        return cls(tuple(scores), tuple(layer.name for layer in layers), groups, patterns, order)

    def retrieve(self, pattern: Tensor) -> str:
        """argmin_t || q - P_t ||_2; the first among equals."""
        if tuple(pattern.shape) != tuple(self.patterns.shape[1:]) or not bool(torch.isfinite(pattern).all()):
            raise UsageError(
                "the query's pattern is no row of scores", expected=f"{self.patterns.shape[1]} finite numbers",
                received=f"shape {tuple(pattern.shape)}",
            )  # fmt: skip
        distances = (self.patterns - pattern.double().cpu()).norm(dim=1)
        return self.tasks[int(distances.argmin())]

    def keep(self, layers: Sequence[MixtureLayer], pattern: Tensor, num_keep: int) -> Keep:
        """The experts to bring for a query, by name of the layer."""
        self.check_model(layers)
        check_count(layers, num_keep)
        order = self.order[self.tasks.index(self.retrieve(pattern))]
        wanted = ranks(pattern.cpu(), self.num_groups)[:, : num_keep // self.num_groups]
        rank_of = (order[0][:, None] == wanted[..., None]).int().argmax(-1)  # (G, M / G), in the stored first layer
        chosen = order.gather(2, rank_of.expand(len(order), -1, -1)).flatten(1)
        return {name: sorted(row) for name, row in zip(self.layers, chosen.tolist(), strict=True)}

    def check_model(self, layers: Sequence[MixtureLayer]) -> None:
        mine = (self.layers, self.patterns.shape[1], self.num_groups)
        theirs = (tuple(layer.name for layer in layers), layers[0].num_experts, layers[0].num_groups)
        if mine != theirs:
            raise UsageError("the library is of another model", expected=mine, received=theirs)

    def save(self, folder: Path) -> None:
        """library.safetensors and library.json; the second is written last."""
        folder.mkdir(parents=True, exist_ok=True)
        header = {"format": FORMAT, "tasks": self.tasks, "layers": self.layers, "num_groups": self.num_groups}
        tensors = {"patterns": self.patterns, "order": self.order.contiguous()}
        (folder / "library.json").unlink(missing_ok=True)  # a save cut short must not pair old names with new tensors
        swap_file(lambda unfinished: save_file(tensors, unfinished), folder / "library.safetensors")
        swap_text(json.dumps(header, indent=2), folder / "library.json")

    @classmethod
    def load(cls, folder: Path) -> "TaskLibrary":
        from safetensors import SafetensorError

        try:
            header = json.loads((folder / "library.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "library.safetensors")
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise UsageError(f"{folder} cannot be read", expected="a task library", received=str(error)) from None
        found = header.get("format", "no such header") if isinstance(header, dict) else type(header).__name__
        if found != FORMAT:
            raise UsageError(f"{folder} holds no task library", expected=FORMAT, received=found)
        try:
            tasks, layers, num_groups = tuple(header["tasks"]), tuple(header["layers"]), int(header["num_groups"])
            library = cls(tasks, layers, num_groups, tensors["patterns"], tensors["order"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            received = f"{type(error).__name__}: {error}"
            raise UsageError(f"{folder} is torn", expected="tasks, layers, num_groups", received=received) from None
        if library.order.shape[:2] != (len(tasks), len(layers)):
            expected = f"orders of {len(tasks)} tasks in {len(layers)} layers"
            raise UsageError(f"{folder} is torn", expected=expected, received=tuple(library.order.shape))
        return library


class Reached(Exception):
    """No error: the way out of a forward pass."""


def first_layer(model: Any, layer: MixtureLayer, batch: Batch) -> Tensor:
    """(T, N), the router's logits of the real tokens at this layer; nothing behind it is run."""
    held: list[Tensor] = []

    def reached(module: nn.Module, inputs: tuple[Any, ...], triple: tuple[Tensor, ...]) -> None:
        held.append(triple[0])
        raise Reached

    hook = layer.router.register_forward_hook(reached)
    try:
        with reading(model):
            run(model, batch)
    except Reached:
        pass
    finally:
        hook.remove()
    return held[0][real_tokens(batch)]
