# SPDX-License-Identifier: Apache-2.0
"""Unified Concept Editing: move what the text's keys and values make of a word, in closed form.

Paper     : Gandikota et al. 2023 (arXiv 2308.14761), eq. 7.
Equation  : W* = (lam W + sum_e v_e c_e^T + sum_p W c_p c_p^T) (lam I + sum_e c_e c_e^T + sum_p c_p c_p^T)^-1
               = W + sum_e (v_e - W c_e) c_e^T (lam I + sum_e c_e c_e^T + sum_p c_p c_p^T)^-1,   v_e = W c_guide
Shapes    : W (O, D); c (rows, D), the embedding of a text's last token; E edits, P preserved texts.
Differs   : the second form, in float64, which is W itself without edits. Where text attends jointly with the image its
            keys and values differ from layer to layer, so `context_embedder` is edited, the one linear map of the text
            (a T5 part gives a second c); the pooled text is left as it is.
Check     : stacked least squares, lam -> 0, no edits (tests/suppress/baselines/test_uce.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.models.diffusion.family import denoiser, encoders
from anabranch.models.diffusion.prompts import encode_prompts, lengths
from anabranch.suppress.baselines.text_layers import is_joint, keys_and_values
from anabranch.train.touch import TouchReport, digest, touch_report


@dataclass(frozen=True, kw_only=True)
class Config:
    lam: float = 0.5
    """How strongly W is held where no text is named."""
    edit_scale: float = 1.0
    preserve_scale: float = 1.0

    def __post_init__(self):
        if not self.lam > 0 or self.edit_scale < 0 or self.preserve_scale < 0:
            received = f"{self.lam}, {self.edit_scale}, {self.preserve_scale}"
            raise ValueError(
                f"lam, edit_scale, preserve_scale: expected above 0, at least 0 twice, received {received}"
            )


@dataclass(frozen=True, kw_only=True)
class Edited:
    before: dict[str, Tensor]
    """Of the edited weights, by their names in the denoiser; `put` takes them back."""
    touched: TouchReport


def closed_form(weight: Tensor, edits: Tensor, guides: Tensor, preserved: Tensor, config: Config) -> Tensor:
    """W* in W's own precision; edits and guides (E, D), preserved (P, D), weight (O, D)."""
    if len(edits) == 0:
        return weight.clone()
    W, c, g, p = (tensor.detach().double() for tensor in (weight, edits, guides, preserved))
    held = config.lam * torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
    held = held + config.edit_scale * c.T @ c + config.preserve_scale * p.T @ p
    moved = config.edit_scale * (g - c) @ W.T  # (E, O): v_e - W c_e
    return (W + torch.linalg.solve(held, c.T @ moved).T).to(weight.dtype)


def last_tokens(pipe: Any, texts: Sequence[str]) -> Tensor:
    """c of every text (rows, D): its last token's embedding, one row a text and another for its T5 part."""
    embeds = encode_prompts(pipe, ["", *texts]).embeds[1:]
    sizes, places = lengths(pipe), {}
    for name, tokenizer, _ in encoders(pipe):
        start = sizes["text_encoder"] if name == "text_encoder_3" else 0
        ids = [tokenizer(text, truncation=True, max_length=sizes[name]).input_ids for text in texts]
        places[start] = [start + max(0, len(row) - 2) for row in ids]  # the end of the text comes after it
    rows = torch.arange(len(texts))
    return torch.cat([embeds[rows, torch.tensor(place, dtype=torch.long)] for place in places.values()])


def text_weights(pipe: Any) -> dict[str, nn.Parameter]:
    """The matrices that are edited, by their names in the denoiser."""
    endings = ["context_embedder"] if is_joint(pipe) else keys_and_values(pipe)
    endings = [f".{ending}{inner}.weight" for ending in endings for inner in ("", ".base_layer")]
    named = denoiser(pipe).named_parameters()
    return {name: parameter for name, parameter in named if f".{name}".endswith(tuple(endings))}


@torch.no_grad()
def edit(
    pipe: Any, config: Config, words: Sequence[str], guides: Sequence[str], preserved: Sequence[str] = ()
) -> Edited:
    """Let every word mean its guide, "" for nothing, and keep what is preserved.

    Raises:
        CheckFailed: an edited weight did not change, or another one did.
    """
    if len(words) != len(guides):
        raise ValueError(f"guides: expected one a word ({len(words)}), received {len(guides)}")
    network, weights = denoiser(pipe), text_weights(pipe)
    before, digests = {name: weight.detach().clone() for name, weight in weights.items()}, digest(network)
    c, g, p = (last_tokens(pipe, texts) for texts in (words, guides, preserved))
    put(pipe, {name: closed_form(weight, c, g, p, config) for name, weight in weights.items()})
    touched = touch_report(digests, digest(network), named=list(weights) if words else [])
    return Edited(before=before, touched=touched)


@torch.no_grad()
def put(pipe: Any, weights: Mapping[str, Tensor]) -> None:
    """Write weights of the denoiser: the edited ones of another time, or `Edited.before` to undo."""
    parameters = dict(denoiser(pipe).named_parameters())
    for name, tensor in weights.items():
        parameters[name].copy_(tensor)
