# SPDX-License-Identifier: Apache-2.0
"""Which family a pipeline belongs to, and how one is opened: from a folder, never from a network.

Every family offers

    PIPELINES, DENOISER, ENCODERS     class names; attribute of the denoiser; attributes of (tokenizer, text encoder)
    TARGET_MODULES, LORA_KEYWORD      where LoRA goes by default; argument of the pipeline's `save_lora_weights`
    max_length(pipe)                  tokens of a prompt
    encode(pipe, ids, time_ids)       token ids, one tensor a text encoder -> Conditioning
    predict(pipe, latents, timestep, conditioning)    the denoiser's raw output
    call_arguments(conditioning, prefix)              the stock pipeline's arguments that stand for a prompt
    latent_size(pipe)                 side of the latents
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from anabranch.errors import UsageError, near
from anabranch.models.shards import refuse_strange_shards
from anabranch.models.shipped import folder_of

FAMILIES = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3")
INSTALL = "pip install 'anabranch[erase]'"
ALONE = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
"""No network, no pickle, no code from the folder."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError, SafetensorError)
"""What the stock loader raises on a folder that is torn; UsageError is none of them."""
WITHOUT_GUIDANCE = ("FluxPipeline", "LatentConsistencyModelPipeline", "ZImagePipeline")
"""Distilled to run without classifier-free guidance: a negative prompt does nothing there."""


def modules() -> list[ModuleType]:
    return [import_module(f"anabranch.models.diffusion.{name}") for name in FAMILIES]


def family_named(pipeline_class: str) -> ModuleType:
    for module in modules():
        if pipeline_class in module.PIPELINES:
            return module
    known = sorted(name for module in modules() for name in module.PIPELINES)
    raise UsageError(
        f"{pipeline_class}: this kind of pipeline is not supported",
        expected=f"one of {', '.join(known)}",
        received=pipeline_class,
        hint="another layout of the same model, or a family file beside anabranch/models/diffusion/family.py",
    )


def family(pipe: Any) -> ModuleType:
    """The module that knows this pipeline.

    Raises:
        UsageError: no family knows it.
    """
    return family_named(type(pipe).__name__)


def open_pipeline(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline in a folder of diffusers, or a shipped one, every weight frozen, on the accelerator if there is one.

    Raises:
        UsageError: no such folder, not a pipeline, a family that is not supported, or diffusers is missing.
    """
    folder = folder_of(folder)
    index = folder / "model_index.json"
    if not index.is_file():
        raise UsageError(
            f"{folder} is not a diffusers pipeline",
            expected="a folder with model_index.json",
            received="no such folder" if not folder.is_dir() else "a folder without it",
            hint=near(folder, "pipe.save_pretrained(folder) writes one; nothing is downloaded here"),
        )
    refuse_strange_shards(folder)
    parts = read_index(index)
    name = str(parts.get("_class_name"))
    encoder_names = [part for pair in family_named(name).ENCODERS for part in pair]
    # the stock loader wants to be told that an encoder is left out, though the folder says so
    absent = {part: None for part in encoder_names if (parts.get(part) or (None,))[0] is None}
    try:
        import diffusers
    except ImportError:
        raise UsageError("diffusers is not installed", hint=INSTALL) from None
    try:
        with quiet():
            pipe = getattr(diffusers, name).from_pretrained(folder, dtype=dtype, **ALONE, **absent)
    except UNREADABLE as error:
        raise UsageError(
            f"the pipeline {folder} cannot be opened",
            expected="weights as .safetensors and configurations, as save_pretrained wrote them",
            received=f"{type(error).__name__}: {str(error)[:300]}",
            hint="copy it again; weights in .bin files are pickles: save them again as .safetensors",
        ) from error
    pipe.set_progress_bar_config(disable=True)
    for module in networks(pipe).values():
        module.eval().requires_grad_(False)
    return pipe.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else pipe


def read_index(index: Path) -> dict[str, Any]:
    """model_index.json; every part is a pair of names, or left out."""
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{index} cannot be read", expected="JSON", received=error) from error
    if not isinstance(parts, dict):
        raise UsageError(f"{index} cannot be read", expected="a JSON object", received=type(parts).__name__)
    return parts


def save_pipeline(pipe: Any, folder: Path) -> None:
    with quiet():
        pipe.save_pretrained(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Neither progress bars nor notices of the libraries; what matters here is raised."""
    import diffusers
    import transformers

    logs = (diffusers.utils.logging, transformers.utils.logging)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()


def denoiser(pipe: Any) -> nn.Module:
    network: nn.Module = getattr(pipe, family(pipe).DENOISER)
    return network


def encoders(pipe: Any) -> list[tuple[str, Any, nn.Module]]:
    """(name, tokenizer, text encoder) of those that are there, in the order of `encode`."""
    pairs = [(name, getattr(pipe, tokens, None), getattr(pipe, name, None)) for tokens, name in family(pipe).ENCODERS]
    return [(name, tokenizer, encoder) for name, tokenizer, encoder in pairs if encoder is not None]


def networks(pipe: Any) -> dict[str, nn.Module]:
    """Every network of the pipeline by its name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def image_side(pipe: Any) -> int:
    """Pixels of the square pictures that the model was made for."""
    return int(family(pipe).latent_size(pipe) * pipe.vae_scale_factor)
