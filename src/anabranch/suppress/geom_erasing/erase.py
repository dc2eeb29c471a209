# SPDX-License-Identifier: Apache-2.0
"""Geom-Erasing: teach a diffusion model what its unasked concept is called and where it is, then ask for its absence.

Paper     : Liu et al., "Implicit Concept Removal of Diffusion Models" (ECCV 2024, arXiv 2310.05873); its body was not
            read, equations are from a detailed reading note.
Equation  : y' = y (+) y_im (+) <l_m_n>;   L = E w (.) || eps - eps_theta(z_t, t, c(y')) ||^2   (words.py, bins.py)
            eps_hat = eps(z_t, c(y_neg)) + s [eps(z_t, c(y)) - eps(z_t, c(y_neg))]   (negatives.py, guidance.py)
Shapes    : N images, latents (N, c, h, w); 1 + T new words; T bins of a grid over the image.
Differs   : what is not known of the paper is a setting: grid 8 x 8, alpha 2, LoRA of rank 8 in place of the whole
            denoiser, new words at ten times its rate, the caption alone dropped in a tenth of the rows.
Check     : in model removal only the new rows change (tests/suppress/geom_erasing/test_erase.py); true places beat
            the name alone and shuffled places on real images (slow: tests/jobs/erase/test_garment_arms.py).
Exempt    : off (an adapter is there or not: geom_erasing/adapter)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.models.diffusion.family import denoiser, encoders
from anabranch.models.diffusion.tokens import Attached, attach, tables
from anabranch.suppress.captioned import Captioned, captioned
from anabranch.suppress.denoising import all_parameters, frozen
from anabranch.suppress.geom_erasing.bins import Bin, Box, Grid, covered_bins, region_weights, upsampled
from anabranch.suppress.geom_erasing.words import Vocabulary, amended, first_rows, fitted, room, token_count
from anabranch.suppress.lora import add_lora


@dataclass(frozen=True, kw_only=True)
class Config:
    mode: Literal["data", "model"] = "data"
    """data: fine-tune on images that contain the concept; model: clean a model, training the new words alone."""
    trained: Literal["lora", "denoiser", "tokens"] = "lora"
    alpha: float = 2.0
    """Weight of what lies outside of the concept's region over what lies inside; 1 is the plain loss."""
    r: int = 8
    token_rate: float = 10.0
    """Learning rate of the new words, as a multiple of that of LoRA or the denoiser."""
    seed: int = 0

    def __post_init__(self):
        if not self.alpha > 0:
            raise ValueError(f"alpha: expected above 0, received {self.alpha}")
        if self.mode == "model" and math.isinf(self.alpha):
            raise ValueError("alpha: expected a finite number in model removal, where the region teaches the words")
        if self.r < 1:
            raise ValueError(f"r: expected at least 1, received {self.r}")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A pipeline with new words, what it is to be trained on, and what training may change."""

    attached: Attached
    data: Captioned
    parameters: dict[str, nn.Parameter]
    bins: list[list[Bin] | None]
    """Of every image; None of a clean one, [] where the place is not known."""
    coarsened: int
    """Images whose bins did not all fit into the prompt."""
    cut: int
    """Images whose caption was cut to make room."""


def prepare(
    pipe: Any,
    vocabulary: Vocabulary,
    config: Config,
    latents: Tensor,
    captions: Sequence[str],
    boxes: Sequence[Sequence[Box] | None],
    *,
    size: int,
    word: str = "",
    rows: dict[str, Tensor] | None = None,
    time_ids: Tensor | None = None,
) -> Prepared:
    """Attach the words, amend the captions, weigh the regions, name what is trained.

    boxes    of every image, in pixels of a square of `size`; None of a clean one, [] of one whose place is not known.
    word     a word of the language from whose embedding the concept's own starts.
    rows     where the new embeddings start, by encoder; place codes when left out.
    """
    frozen(pipe)
    if rows is None:
        rows = start_rows(pipe, vocabulary, word)
    attached = attach(pipe, vocabulary.words(), rows, config.token_rate)
    bins = [None if b is None else covered_bins(b, size, size, vocabulary.grid) for b in boxes]
    most = most_bins(pipe, vocabulary)
    named = [None if b is None else fitted(b, most) for b in bins]
    prompts = [amended(pipe, vocabulary, text, b) for text, b in zip(captions, named, strict=True)]
    bare = ["" if b is None else vocabulary.suffix(b) for b in named]
    weights = None
    if config.alpha != 1:
        grid_weights = torch.stack([region_weights(b or [], vocabulary.grid, config.alpha) for b in bins])
        weights = upsampled(grid_weights, (latents.shape[-2], latents.shape[-1]))
    return Prepared(
        attached=attached,
        data=captioned(pipe, latents, prompts, bare, weights, time_ids),
        parameters=trained_parameters(pipe, attached, config),
        bins=named,
        coarsened=sum(b is not None and len(b) != len(n) for b, n in zip(bins, named, strict=True)),
        cut=sum(b is not None and not p.startswith(c) for c, p, b in zip(captions, prompts, named, strict=True)),
    )


def most_bins(pipe: Any, vocabulary: Vocabulary) -> int:
    """How many places fit into a prompt beside the concept's name."""
    a_place = token_count(pipe, vocabulary.place(vocabulary.grid.bins()[0]))
    return (room(pipe) - token_count(pipe, vocabulary.name)) // a_place


def start_rows(pipe: Any, vocabulary: Vocabulary, word: str = "") -> dict[str, Tensor]:
    """First embeddings of the new words in every text encoder."""
    found = tables(pipe)
    return {
        name: first_rows(found[name].detach(), vocabulary, tokenizer(word, add_special_tokens=False).input_ids)
        for name, tokenizer, _ in encoders(pipe)
    }


def trained_parameters(pipe: Any, attached: Attached, config: Config) -> dict[str, nn.Parameter]:
    """The new words always; LoRA or the whole denoiser beside them in data removal."""
    words = attached.parameters()
    if config.mode == "model" or config.trained == "tokens":
        return words
    if config.trained == "lora":
        return words | add_lora(pipe, config.r, config.seed)
    name = next(name for name, part in pipe.components.items() if part is denoiser(pipe))
    return words | all_parameters(pipe, (name,))


def check_contrast(boxes: Sequence[Sequence[Box] | None]) -> str | None:
    """Nothing to erase is an error, nothing clean a warning.

    Raises:
        UsageError: no image contains the concept.
    """
    containing = sum(found is not None for found in boxes)
    if containing == 0:
        raise UsageError(
            "no image contains the concept: there is nothing to erase",
            expected="labels with has_concept true for some images",
            received=f"{len(boxes)} clean images",
            hint="a lower threshold in anabranch erase scan, or another detector",
        )
    if containing == len(boxes):
        return (
            "every image contains the concept, so captions with it and without it cannot be compared; the words learn "
            "from places alone. At least 5 % clean images are recommended"
        )
    return None


def grid_of(text: str) -> Grid:
    """`8` or `8x6`: columns and rows."""
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(
            "--grid cannot be read", expected="a number such as 8, or columns x rows as 8x6", received=text
        )
    return Grid(int(parts[0]), int(parts[-1]))
