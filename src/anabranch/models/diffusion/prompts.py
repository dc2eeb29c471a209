# SPDX-License-Identifier: Apache-2.0
"""Prompts as token ids, exactly as the stock pipelines make them.

Shapes    : B prompts, L positions of a text encoder; ids (B, L) int64, one tensor a text encoder.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.models.diffusion.conditioning import Conditioning, concatenate
from anabranch.models.diffusion.family import encoders, family

CHUNK = 64


def lengths(pipe: Any) -> dict[str, int]:
    """Positions of every text encoder."""
    module = family(pipe)
    long = getattr(module, "t5_length", module.max_length)
    return {name: long(pipe) if name == "text_encoder_3" else module.max_length(pipe) for name, *_ in encoders(pipe)}


def tokenize(pipe: Any, prompts: Sequence[str]) -> list[Tensor]:
    """(B, L) ids a text encoder; what is too long is cut at the end."""
    sizes = lengths(pipe)
    return [
        tokenizer(
            list(prompts), padding="max_length", max_length=sizes[name], truncation=True, return_tensors="pt"
        ).input_ids
        for name, tokenizer, _ in encoders(pipe)
    ]


def encode_ids(pipe: Any, ids: list[Tensor], time_ids: Tensor | None = None) -> Conditioning:
    """As the family encodes; a prompt that stands in several rows is encoded once."""
    unique, inverse = torch.unique(torch.cat(ids, dim=1), dim=0, return_inverse=True)
    parts = list(unique.split([part.shape[1] for part in ids], dim=1))
    conditioning = family(pipe).encode(pipe, parts).take(inverse)
    if time_ids is not None:
        conditioning = Conditioning(embeds=conditioning.embeds, pooled=conditioning.pooled, time_ids=time_ids)
    return conditioning


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: Sequence[str]) -> Conditioning:
    """One row a prompt; equal to the stock pipeline's `encode_prompt`."""
    device = encoders(pipe)[0][2].device
    chunks = [list(prompts[start : start + CHUNK]) for start in range(0, len(prompts), CHUNK)]
    return concatenate([encode_ids(pipe, [part.to(device) for part in tokenize(pipe, chunk)]) for chunk in chunks])


@torch.no_grad()
def encode_negatives(pipe: Any, prompts: Sequence[str]) -> Conditioning:
    """`encode_prompts`, but zeros for an empty prompt where the pipeline takes them (Stable Diffusion XL)."""
    conditioning = encode_prompts(pipe, prompts)
    if not pipe.config.get("force_zeros_for_empty_prompt"):
        return conditioning
    something = torch.tensor([bool(prompt) for prompt in prompts], device=conditioning.embeds.device)
    return Conditioning(
        embeds=conditioning.embeds * something[:, None, None],
        pooled=None if conditioning.pooled is None else conditioning.pooled * something[:, None],
        time_ids=conditioning.time_ids,
    )
