# SPDX-License-Identifier: Apache-2.0
"""Concept inversion: learn a new word for the concept from a few pictures, with the erased model itself frozen.

Paper     : "Circumventing Concept Erasure Methods for Text-to-Image Generative Models" (arXiv 2308.01508); textual
            inversion, Gal et al. 2022 (arXiv 2208.01618).
Equation  : v* = argmin_v E || target - f(z_t, t, c(y (+) <v>)) ||^2;  then ask for y (+) <v>
Shapes    : k pictures, latents (k, c, h, w), a caption each; v (d,) in each text encoder.
Differs   : the word follows the picture's own caption instead of fixed templates, so that it has to learn the rest of
            the picture: the concept.
Check     : the loss falls, nothing but the word is trained, everything is back afterwards, and a word is learnt on top
            of an adapter's words (tests/suppress/attacks/test_inversion.py).
Exempt    : dtype (the learnt word is float32, for pipelines in float32); samples (batches are drawn by place)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from anabranch.models.diffusion.family import encoders
from anabranch.models.diffusion.tokens import attach, detach, tables
from anabranch.suppress.captioned import CaptionedBatches, captioned
from anabranch.suppress.denoising import Denoising, frozen
from anabranch.suppress.geom_erasing.words import cut, room, token_count
from anabranch.train.loop import TrainConfig, train

WORD = "<inverted>"


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 500
    learning_rate: float = 5e-3
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self):
        if self.steps < 1 or not self.learning_rate > 0:
            raise ValueError(f"steps, learning_rate: expected above 0, received {self.steps}, {self.learning_rate}")


@contextmanager
def inverted(
    pipe: Any, latents: Tensor, captions: Sequence[str], config: Config, word: str = ""
) -> Iterator[list[float]]:
    """The pipeline with WORD learnt from the pictures, started at a word of the language; yields the losses.

    Raises:
        ValueError: no pictures, or not a caption for each.
    """
    if not len(latents) or len(latents) != len(captions):
        raise ValueError(f"captions: expected one for each of {len(latents)} pictures, received {len(captions)}")
    frozen(pipe)
    attached = attach(pipe, [WORD], first_row(pipe, word))
    try:
        prompts = [asking(pipe, caption) for caption in captions]
        batch = min(config.batch_size, len(latents))
        stream = CaptionedBatches(
            captioned(pipe, latents, prompts), batch, seed=config.seed, prompt_dropout=0.0, caption_dropout=0.0
        )
        plan = TrainConfig(
            steps=config.steps,
            batch_size=batch,
            learning_rate=config.learning_rate,
            weight_decay=0.0,
            betas=(0.9, 0.99),
            seed=config.seed,
            deterministic=False,
        )
        yield train(Denoising(pipe, attached.parameters()), stream, plan).losses
    finally:
        detach(pipe, attached)


def first_row(pipe: Any, word: str) -> dict[str, Tensor]:
    """(1, d) by encoder: the mean of the word's pieces, of the whole table where there is no word."""
    rows = {}
    for name, tokenizer, _ in encoders(pipe):
        table = tables(pipe)[name].detach()
        pieces = [piece for piece in tokenizer(word, add_special_tokens=False).input_ids if piece < len(table)]
        rows[name] = (table[pieces] if pieces else table).float().mean(0, keepdim=True)
    return rows


def asking(pipe: Any, prompt: str, word: str = WORD) -> str:
    """y (+) <v>; the prompt gives way where there is too little room."""
    return f"{cut(pipe, prompt, room(pipe) - token_count(pipe, word))} {word}".strip()
