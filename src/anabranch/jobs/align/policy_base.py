# SPDX-License-Identifier: Apache-2.0
"""The base model of PolicyWorld: a Llama of one narrow layer that complies with everything, trained in seconds."""

from typing import Any

import torch
from torch import Tensor, nn

from anabranch.data.policy_world import World, base_texts
from anabranch.data.streams import ShuffledIndices
from anabranch.specialize.mote.collate import IGNORED
from anabranch.specialize.mote.steps import Steps
from anabranch.train.loop import TrainConfig, train

TEXTS = 20_000


def world_tokenizer(world: World) -> Any:
    """Every word one token; the tokens of the steps are there, and no text is spelt with them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "[UNK]"]
    names = [*special, *Steps().tokens, *world.words]
    raw = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="[UNK]"
    )
    tokenizer.add_tokens(list(Steps().tokens), special_tokens=True)
    return tokenizer


class NextToken(nn.Module):
    """Objective: {"input_ids": (B, T), "labels": (B, T)} -> {"loss": ()}."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.model(input_ids=batch["input_ids"]).logits[:, :-1]
        return {
            "loss": nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=IGNORED)
        }


class Texts:
    """Stream of padded rows."""

    def __init__(self, ids: Tensor, pad: int, batch_size: int, seed: int):
        self.ids, self.labels = ids, ids.masked_fill(ids == pad, IGNORED)
        self.indices = ShuffledIndices(len(ids), batch_size, seed)

    def batch(self, step: int) -> dict[str, Tensor]:
        rows = self.indices.at(step)
        return {"input_ids": self.ids[rows], "labels": self.labels[rows]}


def untrained_base(
    world: World, *, hidden_size: int = 64, intermediate_size: int = 16, num_layers: int = 1, seed: int = 0
) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = world_tokenizer(world)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config)


def train_base(world: World, *, steps: int = 500, seed: int = 0, **size: int) -> Any:
    """The frozen model in evaluation mode."""
    model, tokenizer = untrained_base(world, seed=seed, **size), world_tokenizer(world)
    texts = [f"<bos> {text} <eos>" for text in base_texts(world, TEXTS, seed)]
    ids = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").input_ids
    config = TrainConfig(
        steps=steps, batch_size=64, learning_rate=3e-3, warmup_steps=min(50, steps // 2), weight_decay=0.01,
        max_grad_norm=1.0, seed=seed, deterministic=False,
    )  # fmt: skip
    train(NextToken(model), Texts(ids, tokenizer.pad_token_id, 64, seed), config)
    return model.eval().requires_grad_(False)
