# SPDX-License-Identifier: Apache-2.0
"""Adversarial prompts: a few known words before every prompt, found by gradient, that lead the model to the concept.

Paper     : UnlearnDiffAtk, Zhang et al. 2023 (arXiv 2310.11868): the model's own denoising loss on pictures of the
            concept says how near a prompt is. Words are swapped as in HotFlip (Ebrahimi et al. 2018).
Equation  : delta* = argmin_delta E || target - f(z_t, t, c(delta (+) y)) ||^2
            a swap of the word at p for w is expected to change the loss by (e_w - e_p) . dL/de_p
Shapes    : k pictures, latents (k, c, h, w), a caption each; K words; embeddings (V, d) of the first text encoder.
Differs   : one prefix for all pictures, real words in place of projected embeddings, so that the attack is a text that
            can be typed; of the swaps that look best the best true one is taken, on noise that stays the same, so the
            loss never rises. Gradients are of the first encoder, losses of all.
Check     : the first-order estimate is the table's own gradient; the loss falls and never rises; nothing of the model
            changes (tests/suppress/attacks/test_adversarial.py).
Exempt    : dtype (words are drawn in float32, for pipelines in float32); samples (noise is drawn by a picture's place)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.data.streams import derived_seed
from anabranch.errors import UsageError
from anabranch.models.diffusion.family import denoiser, encoders, family
from anabranch.models.diffusion.noising import noising
from anabranch.models.diffusion.prompts import encode_ids, tokenize
from anabranch.models.diffusion.tokens import tables
from anabranch.suppress.denoising import draw, frozen, region_loss
from anabranch.suppress.geom_erasing.words import cut, room, token_count

AT = (10, 20, 40)
"""Steps after which one looks."""


@dataclass(frozen=True, kw_only=True)
class Config:
    num_words: int = 4
    steps: int = AT[-1]
    tried: int = 16
    """Swaps a step whose true loss is computed."""
    draws: int = 2
    """Noise levels a picture."""
    most: int = 16
    """Pictures that the loss is taken over."""
    seed: int = 0

    def __post_init__(self):
        for name in ("num_words", "steps", "tried", "draws", "most"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, received {getattr(self, name)}")


@dataclass(frozen=True)
class Found:
    text: str
    """What stands before the prompt."""
    loss: float


def search(pipe: Any, latents: Tensor, captions: Sequence[str], config: Config) -> list[Found]:
    """What stands before the prompt at the start and after every step: steps + 1 prefixes, their losses never rising.

    Raises:
        ValueError: no pictures, or not a caption for each.
        UsageError: so many words leave no room in a prompt.
    """
    if not len(latents) or len(latents) != len(captions):
        raise ValueError(f"captions: expected one for each of {len(latents)} pictures, received {len(captions)}")
    frozen(pipe)
    generator = torch.Generator().manual_seed(derived_seed("adversarial", config.seed))
    words, ids = plain_words(pipe)
    table = tables(pipe)[encoders(pipe)[0][0]].detach()
    target = Target(pipe, latents[: config.most], captions[: config.most], config.draws, generator)
    prefix = torch.randint(len(words), (config.num_words,), generator=generator)
    found = [Found(spoken(words, prefix), target.loss(spoken(words, prefix)))]
    for _ in range(config.steps):
        gradient = target.gradient(found[-1].text, config.num_words)
        expected = gradient @ table[ids].T - (gradient * table[ids[prefix]]).sum(1, keepdim=True)
        swapped = swaps(prefix, expected, config.tried, generator)
        losses = [target.loss(spoken(words, other)) for other in swapped]
        best = int(np.argmin(losses))
        if losses[best] < found[-1].loss:
            prefix = swapped[best]
            found.append(Found(spoken(words, prefix), losses[best]))
        else:
            found.append(found[-1])
    return found


def swaps(prefix: Tensor, expected: Tensor, count: int, generator: torch.Generator) -> list[Tensor]:
    """`count` of the 8 x count prefixes, one word changed, that promise the lowest loss; expected change (K, n)."""
    best = expected.flatten().topk(min(8 * count, expected.numel()), largest=False).indices.cpu()
    chosen = best[torch.randperm(len(best), generator=generator)[:count]]
    places, words = chosen // expected.shape[1], chosen % expected.shape[1]
    return [prefix.index_fill(0, place, int(word)) for place, word in zip(places, words, strict=True)]


class Target:
    """How badly the model denoises the pictures when so many words stand before their captions."""

    def __init__(self, pipe: Any, latents: Tensor, captions: Sequence[str], draws: int, generator: torch.Generator):
        self.pipe, network = pipe, denoiser(pipe)
        rows = latents.repeat(draws, 1, 1, 1).float()
        self.captions = list(captions) * draws
        parts = draw(len(rows), tuple(rows.shape[1:]), generator)
        level = (torch.arange(len(rows)) + parts["u"]) / len(rows)  # every part of the way to noise
        level = level[torch.randperm(len(rows), generator=generator)]
        values = [part.to(network.device, network.dtype) for part in (rows, parts["noise"])]
        self.noised = noising(pipe.scheduler).noise(*values, level.to(network.device))

    @torch.no_grad()
    def loss(self, prefix: str) -> float:
        return float(self.graph(prefix))

    def gradient(self, prefix: str, count: int) -> Tensor:
        """(K, d): dL / d embedding of each of the prefix's `count` words, which stand after the begin of the text."""
        with watched(encoders(self.pipe)[0][2].get_input_embeddings()) as embedded:
            self.graph(prefix).backward()
        gradient = embedded[0].grad
        assert gradient is not None
        return gradient.sum(0)[1 : 1 + count].float()

    def graph(self, prefix: str) -> Tensor:
        texts = [before(self.pipe, prefix, caption) for caption in self.captions]
        device = self.noised.latents.device
        conditioning = encode_ids(self.pipe, [ids.to(device) for ids in tokenize(self.pipe, texts)])
        output = family(self.pipe).predict(self.pipe, self.noised.latents, self.noised.timestep, conditioning)
        return region_loss(output, self.noised.target, None)


@contextmanager
def watched(embedding: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of an embedding, which keep their gradients."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    handle = embedding.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def plain_words(pipe: Any) -> tuple[list[str], Tensor]:
    """Words of letters that are one token in the first text encoder, and their ids (n,); no word of an adapter."""
    name, tokenizer, _ = encoders(pipe)[0]
    size = len(tables(pipe)[name])
    known = sorted(token.removesuffix("</w>") for token in tokenizer.get_vocab() if token.endswith("</w>"))
    known = [word for word in dict.fromkeys(known) if word.isalpha() and word.isascii()]
    pieces = tokenizer(known, add_special_tokens=False).input_ids if known else []
    whole = [(word, ids[0]) for word, ids in zip(known, pieces, strict=True) if len(ids) == 1 and ids[0] < size]
    if not whole:
        raise UsageError(
            "no words can be told apart in the first text encoder", expected="a tokenizer of CLIP's kind",
            received=type(tokenizer).__name__,
        )  # fmt: skip
    return [word for word, _ in whole], torch.tensor([number for _, number in whole])


def spoken(words: Sequence[str], prefix: Tensor) -> str:
    return " ".join(words[i] for i in prefix.tolist())


def before(pipe: Any, prefix: str, prompt: str) -> str:
    """delta (+) y; the prompt gives way where there is too little room.

    Raises:
        UsageError: there is no room for the prefix itself.
    """
    needed = token_count(pipe, prefix)
    left = room(pipe) - needed
    if left < 0:
        raise UsageError(
            "the words before the prompt do not fit", expected=f"at most {room(pipe)} tokens", received=needed
        )
    return f"{prefix} {cut(pipe, prompt, left)}".strip()
