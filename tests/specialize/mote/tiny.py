# SPDX-License-Identifier: Apache-2.0
"""A tiny language model of two families, a word tokenizer, and experts that were moved away from zero."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from anabranch.specialize.mote.mote import Config, build
from tests.mixture.test_lora import FAMILIES, base

WORDS = [f"w{i}" for i in range(36)]
__all__ = ["FAMILIES", "WORDS", "base", "qwen", "tiny", "tokenizer"]


def tokenizer():
    vocabulary = {word: i for i, word in enumerate([*WORDS, "[UNK]", "<pad>", "<eos>", "<bos>"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


def qwen():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=39, eos_token_id=38,
        )
    ).eval()  # fmt: skip


def tiny(family="llama", *, moved=True, **config):
    mote = build(base(family) if family in FAMILIES else qwen(), tokenizer(), Config(**{"r": 3, **config}))
    if moved:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in mote.trained().values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return mote.eval()
