# SPDX-License-Identifier: Apache-2.0
"""Where the words of a prompt look: attention of the picture's places to given text tokens.

Equation  : a = softmax(q k / sqrt(d)) of the picture's queries; summed over the words' tokens, averaged over heads,
            layers and timesteps. U-Nets: keys are the text. Joint attention: keys are picture and text together.
Shapes    : N prompts, L text tokens, latents (N, c, S, S); maps (N, h, w), each value the share of a place's attention.

A recording processor computes the shares beside the one it stands for, which goes on to do the work: outputs are bit
for bit the same. Layers of a quarter to half of the latents' side are averaged, where there are any: coarser ones say
little about places, finer ones look at textures.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.errors import UsageError
from anabranch.models.diffusion.family import denoiser, encoders, family
from anabranch.models.diffusion.noising import noising
from anabranch.models.diffusion.prompts import encode_prompts, tokenize

COARSEST, FINEST = 0.25, 0.5
"""Of the latents' side."""


class Attention:
    """What was recorded: for every side of layers the sum of their maps and how many there were."""

    def __init__(self, places: Tensor, side: int):
        self.places, self.side = places, side
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def add(self, shares: Tensor) -> None:
        """(N, Q) of one layer at one timestep, Q the places of a square."""
        side = isqrt(shares.shape[1])
        square = shares.unflatten(1, (side, side)).cpu()
        self.sums[side] = self.sums.get(side, torch.zeros_like(square)) + square
        self.counts[side] = self.counts.get(side, 0) + 1

    def maps(self) -> Tensor:
        """(N, h, w) mean over layers and timesteps, at the size of the finest layer."""
        if not self.sums:
            raise UsageError("no attention to text was seen", expected="a denoiser that attends to its prompt")
        middle = [side for side in self.sums if COARSEST * self.side <= side <= FINEST * self.side]
        chosen = middle or list(self.sums)
        size = (max(chosen),) * 2
        fine = [F.interpolate(self.sums[s][:, None], size, mode="bilinear", align_corners=False) for s in chosen]
        return torch.stack(fine).sum(0)[:, 0] / sum(self.counts[side] for side in chosen)


class Recorder:
    """An attention processor that notes the shares of the chosen tokens and lets another one do the work."""

    def __init__(self, inner: Any, attention: Attention):
        self.inner, self.attention = inner, attention

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if encoder_hidden_states is not None:
            count = len(self.attention.places)
            branches = len(hidden_states) // count
            rows = slice(count, 2 * count) if branches > 1 else slice(count)  # guidance: the prompt comes second
            self.attention.add(
                token_shares(attn, hidden_states[rows], encoder_hidden_states[rows], self.attention.places)
            )
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)


@torch.no_grad()
def token_shares(attn: nn.Module, picture: Tensor, text: Tensor, places: Tensor) -> Tensor:
    """(N, Q): what each place of the picture gives to the tokens that are true in places (N, L), mean over heads."""

    def heads(values: Tensor, norm: nn.Module | None) -> Tensor:
        split = values.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return (split if norm is None else norm(split)).float()

    queries = heads(attn.to_q(picture), attn.norm_q)
    if attn.add_k_proj is None:
        text = attn.norm_encoder_hidden_states(text) if attn.norm_cross else text
        keys = heads(attn.to_k(text), attn.norm_k)
    else:
        context = heads(attn.add_k_proj(text), attn.norm_added_k)
        keys = torch.cat([heads(attn.to_k(picture), attn.norm_k), context], dim=2)
    before = keys.shape[2] - text.shape[1]
    wanted = F.pad(places, (before, text.shape[1] - places.shape[1])).to(keys.device).float()
    total = 0.0
    for head in range(attn.heads):  # one at a time: all of a large picture's would not fit
        logits = queries[:, head] @ keys[:, head].transpose(1, 2) * queries.shape[-1] ** -0.5
        total = total + (logits.softmax(-1) @ wanted[:, :, None])[..., 0]
    return total / attn.heads


@contextmanager
def recorded(pipe: Any, places: Tensor) -> Iterator[Attention]:
    """Attention to the text tokens that are true in places (N, L), in every call of the denoiser with N prompts."""
    network = denoiser(pipe)
    attention = Attention(places, int(network.config.sample_size))
    layers = [part for part in network.modules() if hasattr(part, "set_processor")]
    old = [layer.processor for layer in layers]
    try:
        for layer, processor in zip(layers, old, strict=True):
            layer.set_processor(Recorder(processor, attention))
        yield attention
    finally:
        for layer, processor in zip(layers, old, strict=True):
            layer.set_processor(processor)


def token_places(pipe: Any, prompts: Sequence[str], words: Sequence[Sequence[str]]) -> Tensor:
    """(N, L) of bool: where the first text encoder finds each prompt's words.

    Raises:
        UsageError: a word that is not in its prompt, or was cut off with its end.
    """
    _, tokenizer, _ = encoders(pipe)[0]
    ids = tokenize(pipe, prompts)[0]
    places = torch.zeros_like(ids, dtype=torch.bool)
    for row, several in enumerate(words):
        for word in several:
            pieces = torch.tensor(tokenizer(word, add_special_tokens=False).input_ids)
            starts = (ids[row].unfold(0, len(pieces), 1) == pieces).all(1).nonzero()[:, 0].tolist()
            if not starts:
                raise UsageError(f"{word!r} is not in the prompt {prompts[row]!r}", hint="a shorter prompt")
            for start in starts:
                places[row, start : start + len(pieces)] = True
    return places


@torch.no_grad()
def token_maps(
    pipe: Any,
    prompts: Sequence[str],
    words: Sequence[Sequence[str]],
    latents: Tensor,
    *,
    steps: int = 8,
    seed: int = 0,
    batch_size: int = 8,
) -> Tensor:
    """(N, h, w) of pictures that exist: noised to `steps` positions, where each prompt's words look in them."""
    network, process = denoiser(pipe), noising(pipe.scheduler)
    places = token_places(pipe, prompts, words)
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(latents.shape, generator=generator)
    parts = []
    for rows in torch.arange(len(prompts)).split(batch_size):
        conditioning = encode_prompts(pipe, [prompts[i] for i in rows.tolist()])
        z, noise = (part[rows].to(network.device, network.dtype) for part in (latents, eps))
        with recorded(pipe, places[rows]) as attention:
            for step in range(steps):
                u = torch.full((len(rows),), (step + 0.5) / steps, device=network.device)
                noised = process.noise(z, noise, u)
                family(pipe).predict(pipe, noised.latents, noised.timestep, conditioning)
        parts.append(attention.maps())
    return torch.cat(parts)
