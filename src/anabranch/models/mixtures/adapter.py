# SPDX-License-Identifier: Apache-2.0
"""What tuning changed in the experts of a mixture, as a folder: the tuned slices alone, and which base they belong to.

FOLDER/experts.json           format, fingerprint of the base, experts by layer, sha-256 of the other file, facts
FOLDER/experts.safetensors    LAYER.experts.NAME: the values of the A tuned experts (A, ...), in the manifest's order;
                              whole/NAME: any other tensor that was tuned, such as a shared expert's

Values are kept, not differences: base and adapter give the tuned model bit by bit, and taking it out gives the base.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.models.hub.card import front_matter
from anabranch.models.hub.pretrained import Pretrained
from anabranch.models.mixtures.bank import check_expert
from anabranch.models.mixtures.fingerprint import fingerprint
from anabranch.models.mixtures.layers import MixtureLayer, mixture_layers
from anabranch.models.mixtures.surgery import FUSED
from anabranch.swap import swap_file, swap_text

MANIFEST, WEIGHTS, FORMAT, WHOLE = "experts.json", "experts.safetensors", 1, "whole/"
CARD = """\
# Tuned experts

{count} experts in {layers} layers, {weights:,} weights; all others are those of the base model, whose fingerprint is
`{base}`. `experts.json` names them.
{more}
```python
from transformers import AutoModelForCausalLM
from anabranch.models.mixtures.adapter import ExpertAdapter, merge

model = AutoModelForCausalLM.from_pretrained("path/to/the/base")
merge(model, ExpertAdapter.from_pretrained("path/to/this/folder"))  # from here on a stock model
```
"""


@dataclass(frozen=True, eq=False)
class ExpertAdapter(Pretrained):
    MARK = MANIFEST

    base: str
    """Fingerprint of the model that it is put into."""
    experts: dict[str, tuple[int, ...]]
    """By name of the layer, the tuned experts; layers without any are left out."""
    tensors: dict[str, Tensor]
    """LAYER.experts.NAME, (A, ...) each."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Tensors besides the experts, whole, by their names in the model."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the maker wants to be known, as JSON holds it."""

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.tensors | {WHOLE + name: value for name, value in self.whole.items()}
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        swap_file(lambda unfinished: save_file(plain, unfinished), folder / WEIGHTS)
        manifest = {
            "format": FORMAT, "base": self.base, "experts": self.experts, "sha256": file_hash(folder / WEIGHTS),
            "facts": self.facts,
        }  # fmt: skip
        swap_text(json.dumps(manifest, indent=1) + "\n", folder / MANIFEST)

    @classmethod
    def load(cls, folder: str | Path) -> "ExpertAdapter":
        """Raises UsageError where there is none, or where it is torn."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        file = folder / WEIGHTS
        found = file_hash(file) if file.is_file() else "no such file"
        if found != manifest["sha256"]:
            raise UsageError(
                f"{file} is torn, or of another adapter", expected=f"sha-256 {manifest['sha256']}", received=found,
                hint="copy the folder again",
            )  # fmt: skip
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise UsageError(f"{file} cannot be read", expected="tensors", received=str(error)) from None
        experts = {layer: tuple(chosen) for layer, chosen in manifest["experts"].items()}
        whole = {name.removeprefix(WHOLE): value for name, value in tensors.items() if name.startswith(WHOLE)}
        slices = {name: value for name, value in tensors.items() if not name.startswith(WHOLE)}
        return cls(manifest["base"], experts, slices, whole, manifest["facts"])

    def write_files(self, folder: Path) -> None:
        self.save(folder)

    @classmethod
    def read_files(cls, folder: Path) -> "ExpertAdapter":
        return cls.load(folder)

    def card(self) -> str:
        head = front_matter(library_name="anabranch", tags=["mixture-of-experts", "expert-tuning"])
        count, weights = sum(map(len, self.experts.values())), sum(value.numel() for value in self.tensors.values())
        more = "".join(f"\n{name}: {json.dumps(value)}\n" for name, value in self.facts.items())
        return head + CARD.format(count=count, layers=len(self.experts), weights=weights, base=self.base, more=more)


def read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        received = "a folder without it" if folder.is_dir() else "no such folder"
        raise UsageError(f"{folder} holds no tuned experts", expected=f"a folder with {MANIFEST}", received=received)
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is torn", expected="JSON", received=str(error)) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        received = manifest.get("format", "none") if isinstance(manifest, dict) else type(manifest).__name__
        raise UsageError(f"{file}: another format", expected=FORMAT, received=received, hint="a newer anabranch")
    if missing := [name for name in ("base", "experts", "sha256", "facts") if name not in manifest]:
        raise UsageError(f"{file} is torn", expected=", ".join(missing), received=", ".join(sorted(manifest)))
    return manifest


def file_hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# out of a model


def fused_of(layer: MixtureLayer) -> dict[str, nn.Parameter]:
    """The stacked parameters of a layer's experts, whatever the family has, by their names in the model."""
    found = {f"{layer.name}.experts.{name}": getattr(layer.experts, name, None) for name in FUSED}
    return {name: value for name, value in found.items() if isinstance(value, nn.Parameter)}


def read_experts(
    model: nn.Module, experts: Mapping[str, Sequence[int]], base: str, *, whole: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> ExpertAdapter:  # fmt: skip
    """What these experts are now, and `whole` besides.

    base    fingerprint of the model before it was tuned
    """
    chosen = {name: tuple(int(e) for e in own) for name, own in experts.items() if len(own)}
    tensors = {}
    for layer in mixture_layers(model):
        for name, value in fused_of(layer).items() if layer.name in chosen else ():
            tensors[name] = value.detach()[list(chosen[layer.name])].cpu()
    state = model.state_dict()
    return ExpertAdapter(
        base, chosen, tensors, {name: state[name].detach().cpu().clone() for name in whole}, dict(facts or {})
    )


def difference(base: nn.Module, tuned: nn.Module) -> ExpertAdapter:
    """The adapter that leads from one model to the other, wherever the other comes from."""
    before, after = base.state_dict(), tuned.state_dict()
    if {name: value.shape for name, value in before.items()} != {name: value.shape for name, value in after.items()}:
        raise UsageError("these are models of different shapes", expected="one base and a tuned copy of it")
    experts, fused = {}, set()
    for layer in mixture_layers(base):
        names = list(fused_of(layer))
        fused |= set(names)
        differs_N = torch.stack([(before[name] != after[name]).flatten(1).any(1) for name in names]).any(0)
        experts[layer.name] = differs_N.nonzero().flatten().tolist()
    others = [name for name in before if name not in fused and not torch.equal(before[name], after[name])]
    return read_experts(tuned, experts, fingerprint(base), whole=others)


# into a model


def check_adapter(model: nn.Module, adapter: ExpertAdapter, *, base: str | None = None) -> None:
    """
    base    the model's fingerprint, where it is known

    Raises:
        UsageError: another base, or slices that do not fit.
    """
    found = fingerprint(model) if base is None else base
    if found != adapter.base:
        raise UsageError(
            "these experts were tuned on another base model", expected=f"weights with the fingerprint {adapter.base}",
            received=found, hint="the model as it was before tuning, with no other adapter in it",
        )  # fmt: skip
    layers = {layer.name: layer for layer in mixture_layers(model)}
    state = model.state_dict()
    shapes = {name: tuple(state[name].shape) if name in state else None for name in adapter.whole}
    received = {name: tuple(value.shape) for name, value in adapter.whole.items()}
    for name, chosen in adapter.experts.items():
        if name not in layers:
            raise UsageError(f"the model has no mixture {name!r}", expected=f"such as {next(iter(layers))}")
        for expert in chosen:
            check_expert(layers[name], expert)
        shapes |= {key: (len(chosen), *value.shape[1:]) for key, value in fused_of(layers[name]).items()}
    received |= {name: tuple(value.shape) for name, value in adapter.tensors.items()}
    if shapes != received:
        odd = sorted(name for name in shapes.keys() | received.keys() if shapes.get(name) != received.get(name))
        raise UsageError(f"{odd[0]} does not fit the model", expected=shapes.get(odd[0]), received=received.get(odd[0]))


@torch.no_grad()
def exchange(model: nn.Module, adapter: ExpertAdapter) -> ExpertAdapter:
    """The adapter's values into the model, unchecked; returns what was there, which undoes it."""
    before = read_experts(model, adapter.experts, adapter.base, whole=list(adapter.whole))
    for layer in mixture_layers(model):
        for name, value in fused_of(layer).items() if layer.name in adapter.experts else ():
            value[list(adapter.experts[layer.name])] = adapter.tensors[name].to(value)
    state = model.state_dict()
    for name, tensor in adapter.whole.items():
        state[name].copy_(tensor)
    return before


def merge(model: nn.Module, adapter: ExpertAdapter) -> None:
    """The tuned model, for good: a stock model of its family, which transformers alone saves and loads."""
    check_adapter(model, adapter)
    exchange(model, adapter)


@contextmanager
def applied(model: nn.Module, adapter: ExpertAdapter) -> Iterator[None]:
    """The tuned model inside the `with`, the base bit for bit after it."""
    check_adapter(model, adapter)
    before = exchange(model, adapter)
    try:
        yield
    finally:
        exchange(model, before)
