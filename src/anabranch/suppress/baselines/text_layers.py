# SPDX-License-Identifier: Apache-2.0
"""The layers through which a denoiser reads its prompt: cross-attention, or the text side of joint attention."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from anabranch.models.diffusion.family import denoiser, family

JOINT = ["add_k_proj", "add_v_proj"]


def cross_attention(pipe: Any) -> list[str]:
    """Endings of the layers where the image attends to the text; of joint attention, the text's keys and values."""
    return JOINT if is_joint(pipe) else [f"attn2.{name}" for name in family(pipe).TARGET_MODULES]


def keys_and_values(pipe: Any) -> list[str]:
    return JOINT if is_joint(pipe) else ["attn2.to_k", "attn2.to_v"]


def other_attention(pipe: Any) -> list[str]:
    """Endings of the attention layers that are left."""
    if is_joint(pipe):
        return [name for name in family(pipe).TARGET_MODULES if name not in JOINT]
    return [f"attn1.{name}" for name in family(pipe).TARGET_MODULES]


def is_joint(pipe: Any) -> bool:
    return set(JOINT) <= set(family(pipe).TARGET_MODULES)


def weights_of(pipe: Any, endings: Sequence[str], *, others: bool = False) -> dict[str, nn.Parameter]:
    """Parameters of the denoiser's layers with one of the endings, or of all `others`, set to be trained."""
    found = {}
    for name, parameter in denoiser(pipe).named_parameters():
        layer = name.rpartition(".")[0]
        if any(f".{layer}".endswith(f".{ending}") for ending in endings) != others:
            found[name] = parameter.requires_grad_(True)
    return found
