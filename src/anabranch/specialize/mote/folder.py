# SPDX-License-Identifier: Apache-2.0
"""A mixture of step experts on disk: a stock LoRA folder an expert, the tokenizer, and mote.json, which knows the rest.

FOLDER/mote.json   steps and their tokens, alpha, who reads the question, fingerprints of base and tokenizer
FOLDER/NAME        an adapter that PEFT alone opens; the last one has the rows of the steps' tokens beside its LoRA
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from anabranch.errors import AnabranchError, UsageError
from anabranch.mixture.lora_router import GatedLora
from anabranch.models.language.folder import ALONE
from anabranch.specialize.mote.mote import Config, MoTE, need_peft, quiet
from anabranch.specialize.mote.steps import Steps, add_step_tokens
from anabranch.train.publish import is_safe_name

MANIFEST, FORMAT = "mote.json", 1
PLAIN = ("r", "alpha", "lora_alpha", "dropout", "shared", "question", "train_tokens", "assign")
"""Settings that the manifest holds as they are."""
OWN = ("format", "adapters", "steps", "token_ids", "targets", *PLAIN, "base", "tokenizer")
"""What `save` itself says; anything else in a manifest is its maker's."""
TOKENIZERS = frozenset(
    {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"}
    | {"vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "additional_chat_templates"}
)
"""Files of which a tokenizer writes some; those of another kind, left beside them, would be read."""


def save(mote: MoTE, folder: str | Path, *, facts: Mapping[str, Any] | None = None) -> None:
    """OUT/mote.json, the tokenizer, and a stock LoRA adapter an expert in OUT/NAME."""
    folder, config = Path(folder), mote.settings
    if any(isinstance(module, GatedLora) for module in mote.model.modules()):
        raise UsageError(
            "the routers of this mixture would be lost", expected="experts that are chosen by ids",
            received="experts behind gates that learn",
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name in config.adapters:
        save_adapter(mote.model, name, folder / name)
    mote.tokenizer.save_pretrained(folder)
    manifest = {
        "format": FORMAT,
        "adapters": list(config.adapters),
        "steps": asdict(config.steps),
        "token_ids": list(mote.tokens.ids),
        "targets": config.targets if isinstance(config.targets, str) else list(config.targets),
        **{name: getattr(config, name) for name in PLAIN},
        "base": fingerprint(mote.model),
        "tokenizer": tokenizer_hash(mote.tokenizer),
        **(facts or {}),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def files_of(folder: Path) -> frozenset[str]:
    """What `save` wrote there before, or another tokenizer's may be."""
    with suppress(UsageError):  # a damaged one names no adapters
        return TOKENIZERS | {str(name) for name in read_manifest(folder)["adapters"]}
    return TOKENIZERS


def save_adapter(model: Any, name: str, folder: Path) -> None:
    """As PEFT would, which fails where another adapter has rows of tokens and this one has none."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in model.state_dict().items():
        mine = (("lora_A." in key or "lora_B." in key) and f".{name}." in key) or key.endswith(f"tokens_delta.{name}")
        if mine and tensor.data_ptr() not in seen:  # a tied head shows the embedding's rows a second time
            seen.add(tensor.data_ptr())
            plain = key.replace(f".{name}.weight", ".weight").removesuffix(f".{name}")
            tensors[plain] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config[name]
    inference, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(folder)
    finally:
        config.inference_mode = inference


def load(base: nn.Module, folder: str | Path, *, strict: bool = True, trainable: bool = False) -> MoTE:
    """The folder's experts on their base model.

    Raises:
        UsageError: not a folder that `save` wrote, a newer format, experts that differ, or (strict) another base.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    with damage_told(folder):
        return put_on(base, folder, manifest, strict=strict, trainable=trainable)


def put_on(base: nn.Module, folder: Path, manifest: dict[str, Any], *, strict: bool, trainable: bool) -> MoTE:
    from transformers import AutoTokenizer

    peft = need_peft()
    config = Config(
        steps=Steps(**{key: tuple(value) for key, value in manifest["steps"].items()}),
        targets=tuple(manifest["targets"]) if isinstance(manifest["targets"], list) else manifest["targets"],
        **{key: manifest[key] for key in PLAIN},
    )
    if strict and manifest["base"] != fingerprint(base):
        raise UsageError(
            f"{folder} was made for another base model",
            expected=f"weights with the fingerprint {manifest['base']}",
            received=fingerprint(base),
            hint="the model that it was trained on; strict=False to try all the same",
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, **ALONE)
    tokens = add_step_tokens(base, tokenizer, config.steps)
    check_experts(folder, config)
    with quiet():
        options = {"is_trainable": trainable, "local_files_only": True}
        first, *others = config.adapters  # the rows of tokens come last: PEFT seeks them in every later adapter
        model = peft.PeftModel.from_pretrained(base, folder / first, adapter_name=first, **options)
        for name in others:
            model.load_adapter(folder / name, adapter_name=name, **options)
        model.base_model.set_adapter(list(config.adapters), inference_mode=not trainable)
    mote = MoTE(model, tokenizer, config, tokens)
    mote.facts = {name: value for name, value in manifest.items() if name not in OWN}
    return mote.train(trainable)


@contextmanager
def damage_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except AnabranchError:
        raise
    except Exception as error:  # readers of tokenizers and of weights raise what belongs to no family
        raise UsageError(
            f"the experts in {folder} are damaged", expected="its files as they were written",
            received=f"{type(error).__name__}: {str(error)[:300]}", hint="copy the folder again",
        ) from error  # fmt: skip


def read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        received = "a folder without it" if folder.is_dir() else "no such folder"
        raise UsageError(f"{folder} holds no step experts", expected=f"a folder with {MANIFEST}", received=received)
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read", expected="JSON", received=str(error)) from error
    said = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if said != FORMAT:
        raise UsageError(f"{file}: another format", expected=FORMAT, received=said, hint="a newer anabranch")
    refuse_paths(manifest, file)
    return manifest


def refuse_paths(manifest: dict[str, Any], file: Path) -> None:
    """
    Raises:
        UsageError: the manifest is torn, or an expert is called what leads out of the folder.
    """
    try:
        names = [*manifest["steps"]["names"], *manifest["adapters"]]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{file} is torn", expected="adapters and steps", received=repr(error)) from None
    for name in names:
        if not isinstance(name, str) or "/" in name or not is_safe_name(name):
            raise UsageError(f"{file} names an expert {name!r}", expected="the name of a folder in this one")


def check_experts(folder: Path, config: Config) -> None:
    """
    Raises:
        UsageError: an adapter is missing, or they differ in rank or in the layers that they are on.
    """
    found = {}
    for name in config.adapters:
        file = folder / name / "adapter_config.json"
        if not file.is_file():
            raise UsageError(f"{folder} has no expert {name!r}", expected=", ".join(config.adapters), received="none")
        if not (weights := folder / name / "adapter_model.safetensors").is_file():
            raise UsageError(f"the expert {name!r} has no weights", expected=weights, received="no such file")
        said = json.loads(file.read_text(encoding="utf-8"))
        found[name] = (said["r"], tuple(sorted(said["target_modules"])))
    if len(set(found.values())) > 1:
        told = "; ".join(f"{name}: rank {r} on {', '.join(layers)}" for name, (r, layers) in found.items())
        raise UsageError(f"the experts of {folder} differ", expected="one rank, the same layers", received=told)


def fingerprint(model: nn.Module) -> str:
    """Of the base model's own weights: names, shapes and 64 values spread over each; of embeddings, the old rows."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base_tensors(model).items()):
        flat = tensor.detach().flatten()
        few = flat[:: max(1, len(flat) // 64)][:64].float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + few.numpy().tobytes())
    return digest.hexdigest()[:32]


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the layers that adapters are put on and of the norms between them, by the base model's own names.

    Embedding and head are left out: they grow with the tokens of the steps.
    """
    found = {}
    for name, tensor in model.state_dict().items():
        if "lora_" in name or "token" in name or "embed" in name or name.endswith(("wte.weight", "head.weight")):
            continue
        found[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor
    return found


def tokenizer_hash(tokenizer: Any) -> str:
    told = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(told.encode()).hexdigest()[:32]
