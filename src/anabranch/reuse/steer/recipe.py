# SPDX-License-Identifier: Apache-2.0
"""What is done to a model's routing, as a small file: made by any method, applied, undone, or baked into a checkpoint.

    with recipe.applied(layers):                      every forward pass inside is steered; afterwards all is as before
    recipe.bake(layers)                               for what a stock checkpoint can say

A step is one kind of change on one set of experts. Two kinds of *off* are different interventions: `empty` leaves the
slot empty, `refill` lets the next expert move up and the family weigh anew.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import UsageError, did_you_mean
from anabranch.models.hub.card import front_matter
from anabranch.models.hub.pretrained import Pretrained
from anabranch.models.mixtures.bank import check_expert
from anabranch.models.mixtures.layers import MixtureLayer, Triple
from anabranch.models.mixtures.routing import biased, changed, forced, off_empty, off_refill, scaled
from anabranch.swap import swap_text

FORMAT = "anabranch steering recipe 1"
KINDS = {
    "empty": "weight 0, the slot stays empty",
    "empty_keep_sum": "weight 0, the token's other weights make up for it",
    "refill": "the next expert moves up, the family weighs anew",
    "scale": "weight times amount where the expert is selected anyway",
    "scale_keep_sum": "the same, then the token's weights are brought to their former sum",
    "bias": "amount added to the logit; selection and weights follow",
    "promote": "above all other experts of the token",
    "suppress": "below all other experts of the token",
}
WITH_AMOUNT = ("scale", "scale_keep_sum", "bias")
RESCORED = ("refill", "bias", "promote", "suppress")
"""Start from the logits: selection and weights of the layer are made anew."""
BAKED = ("empty", "scale")
"""What a stock checkpoint can say in any family: the expert's output is multiplied."""
CARD = """\
{head}# A steering recipe

What is done to the routing of a mixture of experts while it runs; its weights stay as they are.

{done}

Made by {made_by}, for the model with the fingerprint `{model}`. `steer.json` names the layers and experts.

```python
from anabranch.models.mixtures.layers import open_layers
from anabranch.reuse.steer.recipe import Recipe

with Recipe.from_pretrained("path/to/this/folder").applied(open_layers(model)):
    model.generate(...)
```

What it does to answers was not measured when this card was written.
"""
LARGEST = 1e4
"""Amounts beyond it leave no model standing."""


@dataclass(frozen=True, kw_only=True)
class Step:
    kind: str
    experts: tuple[tuple[str, int], ...]
    """(name of the layer, expert)."""
    amount: float | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UsageError(f"there is no kind of steering {self.kind!r}", hint=did_you_mean(self.kind, KINDS))
        if not self.experts:
            raise UsageError(
                f"the step {self.kind} names no expert: it would do nothing", expected="one or more", received="none"
            )
        if (self.amount is None) == (self.kind in WITH_AMOUNT):
            expected = "an amount" if self.kind in WITH_AMOUNT else "no amount"
            raise UsageError(f"the step {self.kind} cannot be used", expected=expected, received=self.amount)
        if self.amount is not None and not abs(self.amount) <= LARGEST:
            raise UsageError(
                f"the amount of the step {self.kind} cannot be used", expected=f"a number up to {LARGEST:g}",
                received=self.amount,
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe(Pretrained):
    MARK = "steer.json"

    steps: tuple[Step, ...]
    made_by: str = "manual"
    model: str = ""
    """Fingerprint of the model that it was made on."""

    @contextmanager
    def applied(self, layers: Sequence[MixtureLayer]) -> Iterator[None]:
        """Raises UsageError where a step names what the model does not have."""
        masks = [self.masks(step, layers) for step in self.steps]
        self.refuse_undone(masks)
        touched = [layer for layer in layers if any(layer.name in mask for mask in masks)]

        def change(layer: MixtureLayer, triple: Triple) -> Triple:
            for step, mask in zip(self.steps, masks, strict=True):
                if layer.name in mask:
                    triple = acted(step, layer, triple, mask[layer.name])
            return triple

        with changed(touched, change):
            yield

    def refuse_undone(self, masks: Sequence[dict[str, Tensor]]) -> None:
        """A step that scores anew would undo what an earlier one did to the weights of the same layer."""
        weighed: dict[str, str] = {}
        for step, mask in zip(self.steps, masks, strict=True):
            if step.kind in RESCORED and (lost := sorted(set(mask) & set(weighed))):
                raise UsageError(
                    f"{step.kind} on {lost[0]} would undo {weighed[lost[0]]} there: it scores anew",
                    expected=f"{step.kind} before it", received=f"{weighed[lost[0]]}, then {step.kind}",
                    hint="another order of the steps, or of --steer",
                )  # fmt: skip
            weighed |= {} if step.kind in RESCORED else dict.fromkeys(mask, step.kind)

    @torch.no_grad()
    def bake(self, layers: Sequence[MixtureLayer]) -> list[str]:
        """Write it into the weights, in place; returns the tensors that were changed.

        Raises:
            UsageError: nothing was changed: a step that no checkpoint can say, or unknown experts.
        """
        for step in self.steps:
            if step.kind not in BAKED:
                raise UsageError(
                    f"no checkpoint can say {step.kind}: {KINDS[step.kind]}", expected=f"{' or '.join(BAKED)} alone",
                    received=step.kind, hint="steer while the model runs, or prune where experts are off for good",
                )  # fmt: skip
        masks = [self.masks(step, layers) for step in self.steps]
        touched = []
        for step, mask in zip(self.steps, masks, strict=True):
            for layer in layers:
                if layer.name in mask:
                    touched += scale_output(layer, mask[layer.name], 0.0 if step.kind == "empty" else step.amount)
        return sorted(set(touched))

    def masks(self, step: Step, layers: Sequence[MixtureLayer]) -> dict[str, Tensor]:
        """(N,) bool by layer, for the layers that the step names."""
        known = {layer.name: layer for layer in layers}
        found: dict[str, Tensor] = {}
        for name, expert in step.experts:
            if name not in known:
                raise UsageError(f"the model has no mixture layer {name}", hint=did_you_mean(name, known))
            check_expert(known[name], expert)
            found.setdefault(name, torch.zeros(known[name].num_experts, dtype=torch.bool))[expert] = True
        for name, mask in found.items():
            refuse_too_many(step, known[name], mask)
        return found

    def save(self, file: Path) -> None:
        steps = [
            {"kind": step.kind, "experts": [list(pair) for pair in step.experts]}
            | ({} if step.amount is None else {"amount": step.amount})
            for step in self.steps
        ]
        told = {"format": FORMAT, "made_by": self.made_by, "model": self.model, "steps": steps}
        swap_text(json.dumps(told, indent=1) + "\n", file)

    @classmethod
    def load(cls, file: Path) -> "Recipe":
        """Raises UsageError where the file is no recipe."""
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{file} cannot be read", expected="a steering recipe", received=str(error)) from None
        if not isinstance(told, dict) or told.get("format") != FORMAT:
            received = told.get("format", "no format") if isinstance(told, dict) else type(told).__name__
            raise UsageError(f"{file} is no steering recipe", expected=FORMAT, received=received)
        try:
            steps = tuple(step_of(given) for given in told["steps"])
            return cls(steps=steps, made_by=str(told["made_by"]), model=str(told["model"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{file} is torn", expected="made_by, model and steps", received=repr(error)) from None

    def write_files(self, folder: Path) -> None:
        self.save(folder / self.MARK)

    @classmethod
    def read_files(cls, folder: Path) -> "Recipe":
        return cls.load(folder / cls.MARK)

    def card(self) -> str:
        done = "\n".join(
            f"* {step.kind}{'' if step.amount is None else f' {step.amount:g}'}: {len(step.experts)} experts "
            f"({KINDS[step.kind]})"
            for step in self.steps
        )
        head = front_matter(library_name="anabranch", tags=["mixture-of-experts", "steering"])
        return CARD.format(head=head, done=done, made_by=self.made_by, model=self.model or "not recorded")


def step_of(given: dict[str, Any]) -> Step:
    experts = tuple((str(layer), int(expert)) for layer, expert in given["experts"])
    return Step(kind=given["kind"], experts=experts, amount=given.get("amount"))


def acted(step: Step, layer: MixtureLayer, triple: Triple, mask: Tensor) -> Triple:
    """One step on one layer's decision."""
    keep_sum = step.kind.endswith("keep_sum")
    if step.kind.startswith("empty"):
        return off_empty(triple, mask, keep_sum=keep_sum)
    if step.kind.startswith("scale"):
        return scaled(triple, mask, amount_of(step), keep_sum=keep_sum)
    if step.kind == "refill":
        return off_refill(layer, triple, mask)
    if step.kind == "bias":
        return biased(layer, triple, amount_of(step) * mask)
    none = torch.zeros_like(mask)
    return forced(layer, triple, mask, none) if step.kind == "promote" else forced(layer, triple, none, mask)


def amount_of(step: Step) -> float:
    assert step.amount is not None
    return step.amount


def scale_output(layer: MixtureLayer, mask: Tensor, factor: float | None) -> list[str]:
    """The experts' last matrix, and its bias, times the factor."""
    assert factor is not None
    touched = []
    for name in ("down_proj", "down_proj_bias"):
        value = getattr(layer.experts, name, None)
        if value is not None:
            value.data[mask.to(value.device)] *= factor
            touched.append(f"{layer.name}.experts.{name}")
    return touched


def refuse_too_many(step: Step, layer: MixtureLayer, mask: Tensor) -> None:
    count = int(mask.sum())
    if step.kind == "promote" and count > layer.top_k:
        raise UsageError(
            f"{layer.name}: more experts are promoted than a token is sent to", expected=f"at most {layer.top_k}",
            received=count,
        )  # fmt: skip
    if step.kind == "refill" and layer.num_experts - count < layer.top_k:
        raise UsageError(
            f"{layer.name}: too few experts are left for a token", expected=f"at least {layer.top_k}",
            received=layer.num_experts - count,
        )  # fmt: skip
