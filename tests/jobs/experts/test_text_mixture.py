# SPDX-License-Identifier: Apache-2.0
"""The small mixture that ships: its tokens are bytes, and it knows what it was trained on."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from anabranch.data.six_domains import CONFLICT, DOMAINS, seals, text_of
from anabranch.jobs.experts.text_mixture import (
    SHIPPED_MODEL,
    ByteWindows,
    byte_tokenizer,
    nll_of,
    seal_letters,
    train_mixture,
)
from anabranch.models.language.folder import open_language_model
from anabranch.models.mixtures.layers import open_layers

TOKENIZER = byte_tokenizer()


@given(st.text())
def test_a_token_is_a_byte_and_comes_back(text):
    ids = TOKENIZER(text)["input_ids"]
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_the_shipped_model_reads_its_texts_better_than_their_bytes_alone_would_allow():
    model, tokenizer = open_language_model(SHIPPED_MODEL)
    assert len(open_layers(model)) == 4
    assert AutoTokenizer.from_pretrained(SHIPPED_MODEL)("aé")["input_ids"] == tokenizer("aé")["input_ids"]
    for domain in DOMAINS:
        text = text_of(domain).encode()
        counts = torch.bincount(torch.tensor(list(text)), minlength=256).double()
        alone = -sum(float(p) * math.log(float(p)) for p in counts / counts.sum() if p > 0)
        assert nll_of(model, text, limit=8) < alone - 0.2, domain


def test_it_knows_seals_of_both_domains_beyond_chance():
    model, _ = open_language_model(SHIPPED_MODEL)
    for domain in CONFLICT:
        right = [said == seal.letter for said, seal in zip(seal_letters(model, domain), seals(domain), strict=True)]
        assert sum(right) / len(right) > 0.3  # chance is 1 in 16


def test_windows_take_turns_and_are_the_same_again():
    stream, again = (ByteWindows(["law", "maths"], 4, seed=3, length=16) for _ in range(2))
    batch = stream.batch(5)["input_ids"]
    assert batch.shape == (4, 17)
    assert torch.equal(batch, again.batch(5)["input_ids"])
    assert not torch.equal(batch, stream.batch(6)["input_ids"])
    texts = [text_of(domain, "train").encode() for domain in ("law", "maths")]
    for row, text in zip(batch.tolist(), texts * 2, strict=True):
        assert bytes(row) in text


@pytest.mark.slow
def test_training_starts_to_learn():
    _, result = train_mixture(5, steps=30, batch_size=6)
    assert sum(result.losses[-5:]) < sum(result.losses[:5]) - 5
