# SPDX-License-Identifier: Apache-2.0
"""New words for a text encoder: rows beside its embedding table, which itself is never written to.

Shapes    : n new words, d the encoder's width; ids (..., ) int64.

A table that is resized has to be restored row by row after every step. Rows of their own need no such care: the old
table is bit for bit what it was because nothing can write to it, the optimiser holds state for the new rows alone, and
taking them away is putting the old module back.

Older CLIP configurations say `eos_token_id = 2` and look for the end of the text at its highest id, which a new word
now has: the pooled text would be read at that word. While words are attached the encoder is told the true id.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.models.diffusion.family import encoders, family


class ExtendedEmbedding(nn.Module):
    """The old table for old ids, `rows` for the new words.

    rows = start + rate * delta and `delta` is what is trained: under Adam that is a learning rate of their own.
    """

    def __init__(self, table: nn.Module, first_id: int, rows: Tensor, rate: float = 1.0):
        super().__init__()
        self.table, self.first_id, self.rate = table, first_id, rate
        self.register_buffer("start", rows)
        self.delta = nn.Parameter(torch.zeros_like(rows))

    @property
    def rows(self) -> Tensor:
        return self.start + self.rate * self.delta

    @property
    def weight(self) -> Tensor:
        """The old table: transformers asks it for a dtype and a device."""
        weight: Tensor = self.table.weight
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        place = ids - self.first_id
        is_new = (place >= 0) & (place < len(self.start))
        old = self.table(ids.masked_fill(is_new, 0))
        new = nn.functional.embedding(place.clamp(0, len(self.start) - 1), self.rows)
        return torch.where(is_new[..., None], new.to(old.dtype), old)


@dataclass(frozen=True)
class Attached:
    """What `detach` needs to put a pipeline back."""

    tokenizers: dict[str, Any]
    tables: dict[str, nn.Module]
    end_ids: list[tuple[nn.Module, int]]
    embeddings: dict[str, ExtendedEmbedding]
    words: tuple[str, ...]

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{name}.words": embedding.delta for name, embedding in self.embeddings.items()}

    def rows(self) -> dict[str, Tensor]:
        """The new embeddings (n, d) as they are now, by encoder."""
        return {name: embedding.rows.detach().clone() for name, embedding in self.embeddings.items()}


def tables(pipe: Any) -> dict[str, Tensor]:
    """The embedding table (V, d) of every text encoder."""
    return {name: encoder.get_input_embeddings().weight for name, _, encoder in encoders(pipe)}


def attach(pipe: Any, words: Sequence[str], rows: dict[str, Tensor], rate: float = 1.0) -> Attached:
    """Teach every text encoder the new words; `rows` (n, d) by the encoder's name, trained at `rate` times the step.

    Raises:
        UsageError: a word that a tokenizer knows already, or rows of another width than the encoder's.
    """
    check_words(pipe, words)
    for name, table in tables(pipe).items():
        if rows[name].shape != (len(words), table.shape[1]):
            raise UsageError(
                f"the word embeddings do not fit {name}",
                expected=f"{len(words)} rows of width {table.shape[1]}",
                received=f"{tuple(rows[name].shape)}: made for another kind of model?",
            )
    old_tokenizers, old_tables, end_ids, embeddings = {}, {}, [], {}
    for (attribute, _), (name, tokenizer, encoder) in zip(present(pipe), encoders(pipe), strict=True):
        old_tokenizers[attribute], old_tables[name] = tokenizer, encoder.get_input_embeddings()
        extended = copy.deepcopy(tokenizer)
        # stripped: a tokenizer that marks spaces would put a mark of its own between two new words
        extended.add_tokens([AddedToken(word, lstrip=True, rstrip=True, normalized=False) for word in words])
        setattr(pipe, attribute, extended)
        first_id = extended.convert_tokens_to_ids(words[0])
        table = old_tables[name]
        embeddings[name] = ExtendedEmbedding(table, first_id, rows[name].to(table.weight, copy=True), rate)
        encoder.set_input_embeddings(embeddings[name])
        for module in encoder.modules():
            if isinstance(getattr(module, "eos_token_id", None), int):
                end_ids.append((module, module.eos_token_id))
                module.eos_token_id = extended.eos_token_id
    return Attached(old_tokenizers, old_tables, end_ids, embeddings, tuple(words))


def detach(pipe: Any, attached: Attached) -> None:
    """Undo `attach`: the very modules and tokenizers from before."""
    for attribute, tokenizer in attached.tokenizers.items():
        setattr(pipe, attribute, tokenizer)
    for name, table in attached.tables.items():
        getattr(pipe, name).set_input_embeddings(table)
    for module, end_id in attached.end_ids:
        module.eos_token_id = end_id


def check_words(pipe: Any, words: Sequence[str]) -> None:
    for name, tokenizer, _ in encoders(pipe):
        known = [word for word in words if word in tokenizer.get_vocab()]
        if known:
            raise UsageError(
                f"{known[0]!r} is already in the vocabulary of {name}",
                expected="words that are new to the model",
                received=f"{len(known)} known words",
                hint="another --concept-token, or remove(pipe) if an adapter is already applied",
            )


def present(pipe: Any) -> list[tuple[str, str]]:
    """(tokenizer, text encoder) attributes of the encoders that are there."""
    return [pair for pair in family(pipe).ENCODERS if getattr(pipe, pair[1], None) is not None]
