# SPDX-License-Identifier: Apache-2.0
"""The new words: one for the concept, one for every bin of the grid; and the prompts that use them.

Paper     : Geom-Erasing (ECCV 2024, arXiv 2310.05873): location tokens, prompt amendment, from a reading note of it.
Equation  : y' = y (+) y_im (+) <l_m_n> over the covered bins;  a clean image keeps y' = y
            place code of bin (m, n): half of the width for m, half for n, sine and cosine at d / 4 wavelengths
Shapes    : d the text encoder's width; T bins, so 1 + T rows (T, when the concept keeps its own word).
Differs   : the place code is scaled to the table's mean norm (about 0.4 for CLIP): unscaled it is fifty times as long.
            The caption is cut before the bins are; too many bins are merged two by two, then the least covered go.
Check     : tests/suppress/geom_erasing/test_words.py
Exempt    : samples (rows of a table belong to the words of their number)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.models.diffusion.family import encoders
from anabranch.models.diffusion.prompts import lengths
from anabranch.suppress.geom_erasing.bins import Bin, Grid


@dataclass(frozen=True)
class Vocabulary:
    """What the concept and its places are called."""

    name: str
    """The word that stands for the concept in a prompt: a new one, or a word of the language."""
    grid: Grid
    new_name: bool = True

    def place(self, where: Bin) -> str:
        return f"<l_{where[0]}_{where[1]}>"

    def words(self) -> list[str]:
        """Everything that is new to the text encoder: the name first, then the bins row by row."""
        places = [self.place(where) for where in self.grid.bins()]
        return [self.name, *places] if self.new_name else places

    def suffix(self, bins: Sequence[Bin]) -> str:
        """y_im (+) the bins."""
        return " ".join([self.name, *(self.place(where) for where in bins)])


def place_codes(grid: Grid, width: int) -> Tensor:
    """(T, d) sine-cosine code of column and row, each normed to length 1."""
    quarter = max(1, width // 4)
    rates = torch.exp(-math.log(10_000) * torch.arange(quarter) / quarter)
    places = torch.tensor(grid.bins(), dtype=torch.float32)
    angles = places[:, :, None] * rates
    code = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    code = torch.nn.functional.pad(code, (0, max(0, width - code.shape[1])))[:, :width]
    return code / code.norm(dim=1, keepdim=True)


def first_rows(table: Tensor, vocabulary: Vocabulary, word_ids: Sequence[int]) -> Tensor:
    """Where the new embeddings start: the concept at the mean of its word's pieces, the bins at their place codes.

    table (V, d); word_ids of the word that describes the concept, possibly none; returns (1 + T or T, d).
    """
    norm = table.float().norm(dim=1).mean()
    rows = place_codes(vocabulary.grid, table.shape[1]) * norm
    if vocabulary.new_name:
        start = table[list(word_ids)].float().mean(0) if word_ids else table.float().mean(0)
        rows = torch.cat([start[None], rows])
    return rows.to(table.dtype)


def room(pipe: Any) -> int:
    """Tokens of the shortest text encoder that a prompt may use, begin and end taken off."""
    sizes = lengths(pipe)
    return min(sizes[name] - len(tokenizer("").input_ids) for name, tokenizer, _ in encoders(pipe))


def token_count(pipe: Any, text: str) -> int:
    """Tokens of a text in the encoder that needs most, begin and end not counted."""
    return max(len(tokenizer(text, add_special_tokens=False).input_ids) for _, tokenizer, _ in encoders(pipe))


def check_room(pipe: Any, name: str, most_bins: int, what: str) -> None:
    """Refuse what cannot be said in one prompt."""
    needed = token_count(pipe, name) + most_bins
    if needed > room(pipe):
        raise UsageError(
            f"{what} does not fit into a prompt",
            expected=f"at most {room(pipe)} tokens",
            received=f"{needed}: {most_bins} places and the name {name!r}",
            hint="a coarser --grid, or the policies name, detected or sampled",
        )


def amended(pipe: Any, vocabulary: Vocabulary, caption: str, bins: Sequence[Bin] | None) -> str:
    """y' of one image: its caption, the name, the bins; the caption gives way where there is too little room.

    bins     None of a clean image, whose caption stays as it is; [] where it is not known where the concept is.
    """
    if bins is None:
        return caption
    suffix = vocabulary.suffix(bins)
    left = room(pipe) - token_count(pipe, suffix)
    return f"{cut(pipe, caption, left)} {suffix}".strip()


def cut(pipe: Any, caption: str, tokens: int) -> str:
    """The longest beginning of a caption that no encoder needs more than so many tokens for."""
    if tokens <= 0:
        return ""
    end = len(caption)
    for _, tokenizer, _ in encoders(pipe):
        offsets = tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        if len(offsets) > tokens:
            end = min(end, offsets[tokens - 1][1])
    return caption[:end].rstrip()


def fitted(bins: Sequence[Bin], most: int) -> list[Bin]:
    """At most `most` of the bins: every second row and column, then those nearest the middle of the region."""
    kept = list(bins)
    if len(kept) > most:
        coarse = [(m, n) for m, n in kept if m % 2 == 0 and n % 2 == 0]
        kept = coarse or kept
    if len(kept) > most:
        middle = torch.tensor(kept, dtype=torch.float32).mean(0)
        near = sorted(kept, key=lambda place: ((torch.tensor(place) - middle) ** 2).sum().item())
        kept = [place for place in bins if place in set(near[:most])]
    return kept
