# SPDX-License-Identifier: Apache-2.0
"""What erasing leaves behind: a folder of plain files, with and without which a pipeline is bit for bit known.

pytorch_lora_weights.safetensors   LoRA of the denoiser, where LoRA was trained: pipe.load_lora_weights(folder)
denoiser/                          the whole denoiser instead, where it was trained: SomeModel.from_pretrained
negative.safetensors               POLICY -> negative_prompt_embeds (1, L, D), POLICY.pooled -> negative_pooled_...
geom_tokens.safetensors            ENCODER/WORD -> embedding (d,), left out on request: they also make the concept
geom_config.json                   grid, names, base, detector, settings, what was measured
README.md                          how to use it, with and without this package

`apply` puts all of it into a pipeline and `remove` takes it out; nothing of the pipeline is ever written to.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from anabranch.errors import UsageError, did_you_mean
from anabranch.models.diffusion.conditioning import Conditioning
from anabranch.models.diffusion.family import denoiser, encoders, family, networks, quiet
from anabranch.models.diffusion.prompts import encode_negatives, encode_prompts
from anabranch.models.diffusion.tokens import Attached, attach, detach
from anabranch.suppress.geom_erasing.adapter_folder import (
    CONFIG,
    FORMAT,
    NEGATIVE,
    TOKENS,
    WHOLE,
    Adapter,
    damage_told,
    read_adapter,
    ready_negatives,
)
from anabranch.suppress.geom_erasing.bins import Bin
from anabranch.suppress.geom_erasing.negatives import negative_prompts
from anabranch.suppress.geom_erasing.words import Vocabulary, room, token_count
from anabranch.suppress.lora import load_lora, remove_lora, save_lora
from anabranch.train.touch import digest

READY = ("name", "prior", "all")
"""Policies whose negative prompt is the same for every picture, so that it can lie ready in a file."""


@dataclass(kw_only=True)
class Applied:
    """An adapter in a pipeline; `arguments` is what a call of the stock pipeline takes in addition."""

    pipe: Any
    adapter: Adapter
    attached: Attached | None
    policy: str
    old_denoiser: nn.Module | None = None

    def negative(
        self,
        policy: str | None = None,
        count: int = 1,
        *,
        own: str = "",
        seed: int = 0,
        detected: Sequence[Sequence[Bin]] | None = None,
    ) -> Conditioning:
        """The negative prompts of `count` pictures; `own` is what the user does not want besides, put after ours."""
        policy = policy or self.policy
        if policy == "none":
            return encode_negatives(self.pipe, [own]).repeat(count)
        if self.attached is None:
            return self.ready(policy, own).repeat(count)
        texts = self.texts(policy, count, seed=seed, detected=detected)
        needed = max(token_count(self.pipe, text) for text in dict.fromkeys(texts)) + token_count(self.pipe, own)
        if needed > room(self.pipe):
            raise UsageError(
                "the negative prompt is too long",
                expected=f"at most {room(self.pipe)} tokens",
                received=f"{needed} with your own words",
                hint="fewer words of your own, or the policy name",
            )
        return encode_prompts(self.pipe, [f"{text} {own}".strip() for text in texts])

    def texts(
        self, policy: str, count: int, *, seed: int = 0, detected: Sequence[Sequence[Bin]] | None = None
    ) -> list[str]:
        adapter = self.adapter
        drawn = [bins for bins, times in zip(adapter.training_bins, adapter.counts, strict=True) for _ in range(times)]
        most = room(self.pipe) - token_count(self.pipe, adapter.vocabulary.name)
        return negative_prompts(
            policy, adapter.vocabulary, count, training_bins=drawn, most=most, seed=seed, detected=detected
        )

    def ready(self, policy: str, own: str = "") -> Conditioning:
        """From the file: all there is where the words themselves were not published."""
        found = {} if self.adapter.trained == "baked" else ready_negatives(self.adapter.folder)
        if not found:
            raise UsageError(
                "a baked adapter needs no negative prompt and has none",
                expected="policy none",
                received=policy,
                hint="the adapter that it was baked from has them",
            )
        if policy not in found or own:
            raise UsageError(
                "this adapter came without its words",
                expected=f"one of the negatives in {NEGATIVE}: {', '.join(sorted(found))}, with no words of your own",
                received=f"policy {policy}" + (f" with {own!r}" if own else ""),
            )
        encoder = encoders(self.pipe)[0][2]
        return found[policy].to(encoder.device, encoder.dtype)

    def arguments(self, policy: str | None = None, **options: Any) -> dict[str, Tensor]:
        """Keyword arguments for one call of the pipeline with one prompt; not together with `negative_prompt`."""
        given: dict[str, Tensor] = family(self.pipe).call_arguments(self.negative(policy, **options), "negative_")
        return given


def fingerprint(pipe: Any) -> str:
    """Of denoiser and text encoders: names, shapes, and 64 values spread over every tensor."""
    digest = hashlib.sha256()
    parts = {"denoiser": denoiser(pipe)} | {name: encoder for name, _, encoder in encoders(pipe)}
    for part, module in parts.items():
        for name, tensor in module.state_dict().items():
            flat = tensor.detach().flatten()
            few = flat[:: max(1, len(flat) // 64)][:64].float().cpu()
            digest.update(f"{part}.{name}{tuple(tensor.shape)}".encode() + few.numpy().tobytes())
    return digest.hexdigest()[:32]


def save_adapter(
    pipe: Any,
    folder: Path,
    vocabulary: Vocabulary,
    attached: Attached,
    training_bins: Sequence[Sequence[Bin]],
    config: dict[str, Any],
    *,
    publish_tokens: bool = True,
) -> None:
    """Fill an empty folder. `config` has at least trained, concept and base (the fingerprint from before training)."""
    if config["trained"] == "lora":
        save_lora(pipe, folder)
    elif config["trained"] == "denoiser":
        with quiet():
            denoiser(pipe).save_pretrained(folder / WHOLE)
    rows = {
        f"{name}/{word}": row
        for name, table in attached.rows().items()
        for word, row in zip(attached.words, table.cpu(), strict=True)
    }
    if publish_tokens:
        save_file({name: row.contiguous() for name, row in rows.items()}, folder / TOKENS)
    kinds = sorted({tuple(bins) for bins in training_bins})
    counts = [sum(tuple(bins) == kind for bins in training_bins) for kind in kinds]
    written = config | {
        "format": FORMAT,
        "family": family(pipe).__name__.rsplit(".", 1)[-1],
        "name": vocabulary.name,
        "new_name": vocabulary.new_name,
        "grid": [vocabulary.grid.columns, vocabulary.grid.rows],
        "training_bins": [[list(place) for place in kind] for kind in kinds],
        "training_counts": counts,
    }
    adapter = Adapter(
        folder=folder, vocabulary=vocabulary, rows=attached.rows(),
        training_bins=[list(kind) for kind in kinds], counts=counts, config=written,
    )  # fmt: skip
    save_negatives(Applied(pipe=pipe, adapter=adapter, attached=attached, policy="name"), folder)
    (folder / CONFIG).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def save_negatives(applied: Applied, folder: Path) -> None:
    tensors = {}
    for policy in READY:
        try:
            conditioning = applied.negative(policy)
        except UsageError:  # no boxes to draw from, or no room for every bin
            continue
        tensors[policy] = conditioning.embeds.cpu().contiguous()
        if conditioning.pooled is not None:
            tensors[f"{policy}.pooled"] = conditioning.pooled.cpu().contiguous()
    save_file(tensors, folder / NEGATIVE)


def apply(pipe: Any, folder: str | Path, *, policy: str | None = None, strength: float = 1.0) -> Applied:
    """Put an adapter into a pipeline of the model that it was made for.

    policy     of negative prompts, the adapter's own when left out.
    strength   of the LoRA.

    Raises:
        UsageError: another model, a damaged adapter, one that is in already, or a strength that would do nothing.
    """
    if not 0 < strength < float("inf"):
        raise UsageError(
            "this strength would do nothing, or the opposite",
            expected="a number above 0; 1 is what was trained",
            received=strength,
            hint="leave the adapter out to see the model as it is",
        )
    adapter = read_adapter(folder)
    if getattr(pipe, "_anabranch", None) is not None:
        raise UsageError("the pipeline holds an adapter already", hint="remove(pipe) first")
    check_base(pipe, adapter)
    if strength != 1 and not adapter.has_lora:
        raise UsageError(
            f"strength would change nothing: {adapter.trained} was trained, and there is no LoRA to scale",
            expected=1,
            received=strength,
        )
    attached = None if adapter.rows is None else attach(pipe, adapter.vocabulary.words(), adapter.rows)
    try:
        with damage_told(adapter.folder):
            old = put_denoiser(pipe, adapter, strength)
    except UsageError:
        if attached is not None:
            detach(pipe, attached)
        raise
    policy = policy or str(adapter.config.get("policy", "name"))
    applied = Applied(pipe=pipe, adapter=adapter, attached=attached, policy=policy, old_denoiser=old)
    pipe._anabranch = applied
    return applied


def put_denoiser(pipe: Any, adapter: Adapter, strength: float) -> nn.Module | None:
    """LoRA into the denoiser, or another denoiser in its place; the old one, where it was replaced."""
    if adapter.has_lora:
        load_lora(pipe, adapter.folder, strength)
    if adapter.trained != "denoiser":
        return None
    old: nn.Module = denoiser(pipe)
    with quiet():
        own = {"local_files_only": True, "use_safetensors": True}  # the stock loader would else open a pickle
        new = type(old).from_pretrained(adapter.folder / WHOLE, dtype=old.dtype, **own)
    setattr(pipe, family(pipe).DENOISER, new.to(old.device).eval().requires_grad_(False))
    return old


def remove(pipe: Any) -> None:
    """The pipeline as it was before `apply`, to the bit."""
    applied: Applied | None = getattr(pipe, "_anabranch", None)
    if applied is None:
        raise UsageError("the pipeline holds no adapter", hint="apply(pipe, folder) puts one in")
    if applied.attached is not None:
        detach(pipe, applied.attached)
    if applied.adapter.has_lora:
        remove_lora(pipe)
    if applied.old_denoiser is not None:
        setattr(pipe, family(pipe).DENOISER, applied.old_denoiser)
    pipe._anabranch = None


def check_base(pipe: Any, adapter: Adapter) -> None:
    kind = family(pipe).__name__.rsplit(".", 1)[-1]
    if adapter.config["family"] != kind:
        raise UsageError(
            f"{adapter.folder} was made for another kind of model",
            expected=f"a pipeline of {adapter.config['family']}",
            received=kind,
            hint=did_you_mean(kind, [adapter.config["family"]]),
        )
    found = fingerprint(pipe)
    if adapter.config["base"] != found:
        raise UsageError(
            f"{adapter.folder} was made for another base model",
            expected=f"weights with the fingerprint {adapter.config['base']}",
            received=found,
            hint=f"the model it was trained on: {adapter.config.get('model', 'not recorded')}",
        )


def hashes(pipe: Any) -> dict[str, str]:
    """sha-256 of every tensor of every network of the pipeline, new words and LoRA among them."""
    return {f"{part}.{name}": value for part, net in networks(pipe).items() for name, value in digest(net).items()}
