# SPDX-License-Identifier: Apache-2.0
"""A small mixture of experts of the Qwen3-MoE family, trained on bytes of the six text domains: one to look into.

Shapes    : B windows of S + 1 bytes.

Every batch has equally many windows of each domain. The balance loss is over the whole batch, and weak: experts are
kept alive and left free to take a domain for themselves.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import anabranch.data
from anabranch.data.six_domains import DOMAINS, seals, text_of
from anabranch.data.streams import derived_seed
from anabranch.train.loop import TrainConfig, TrainResult, train

SHIPPED_MODEL = Path(str(anabranch.data.__file__)).with_name("text_mixture")
"""The first seed, as `python -m recipes.experts.train` makes it."""
LENGTH = 128
"""Bytes of a window."""
SHAPE = {
    "hidden_size": 160, "num_hidden_layers": 4, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 32,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192, "intermediate_size": 192,
    "norm_topk_prob": True, "router_aux_loss_coef": 0.002, "max_position_embeddings": 512, "tie_word_embeddings": True,
    "decoder_sparse_step": 1, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257,
}  # fmt: skip
"""3.5 million weights, 1.3 million of them used by a token."""


def byte_tokenizer() -> Any:
    """A byte is a token; byte b has the id b."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = byte_letters()
    raw = Tokenizer(models.BPE(vocab={letters[b]: b for b in range(256)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken("<eos>"), AddedToken("<pad>")])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<eos>", eos_token="<eos>", pad_token="<pad>")


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level tokenizers: printable ones for themselves, the rest behind."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def untrained_mixture(seed: int, **changes: Any) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=258, **(SHAPE | changes)))


class ByteWindows:
    """Stream of windows: the rows of a batch take turns over the domains, each window from a place drawn at random."""

    def __init__(self, domains: Sequence[str], batch_size: int, seed: int, length: int = LENGTH):
        self.texts = [torch.tensor(list(text_of(domain, "train").encode()), dtype=torch.uint8) for domain in domains]
        self.batch_size, self.seed, self.length = batch_size, seed, length

    def batch(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(derived_seed("windows", self.seed, step))
        rows = []
        for i in range(self.batch_size):
            text = self.texts[(step * self.batch_size + i) % len(self.texts)]
            start = int(torch.randint(len(text) - self.length, (), generator=generator))
            rows.append(text[start : start + self.length + 1])
        return {"input_ids": torch.stack(rows).long()}


class NextByte(nn.Module):
    """Objective: {"input_ids": (B, S + 1)} -> {"loss": (), "nll": (), "balance": ()}."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        out = self.model(input_ids=ids[:, :-1], output_router_logits=True)
        nll = nn.functional.cross_entropy(out.logits.transpose(1, 2), ids[:, 1:])
        balance = self.model.config.router_aux_loss_coef * out.aux_loss
        return {"loss": nll + balance, "nll": nll.detach(), "balance": balance.detach()}


def train_mixture(
    seed: int, *, domains: Sequence[str] = DOMAINS, steps: int = 3000, batch_size: int = 24, run: Path | None = None,
    learning_rate: float = 2e-3, report: Any = None,
) -> tuple[Any, TrainResult]:  # fmt: skip
    """A model in evaluation mode, and how training went. A run that was stopped goes on."""
    model = untrained_mixture(seed)
    model.set_experts_implementation("eager")  # the fastest here: 1.3 times grouped_mm, 50 times batched_mm
    config = TrainConfig(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, weight_decay=0.05,
        warmup_steps=min(100, steps), seed=seed, max_grad_norm=1.0,
    )  # fmt: skip
    resume = run is not None and (run / "checkpoints").exists()
    result = train(NextByte(model), ByteWindows(domains, batch_size, seed), config, run, resume=resume, report=report)
    return model.eval(), result


def save_mixture(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """A folder that transformers opens, its tokenizer with it."""
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@torch.no_grad()
def nll_of(model: Any, text: bytes, length: int = LENGTH, limit: int = 128) -> float:
    """Nats a byte, over at most `limit` windows spread evenly through the text."""
    ids = torch.tensor(list(text), dtype=torch.long)
    starts = torch.linspace(0, len(ids) - length - 1, limit).long().tolist()
    rows = torch.stack([ids[start : start + length + 1] for start in starts])
    total = 0.0
    for part in rows.split(32):
        logits = model(input_ids=part[:, :-1]).logits.float()
        total += float(nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="sum"))
    return total / (len(rows) * length)


@torch.no_grad()
def seal_letters(model: Any, domain: str) -> list[str]:
    """The likeliest next byte after every prompt about a seal, as a letter."""
    rows = torch.stack([torch.tensor(list(seal.prompt.encode())[-LENGTH:]) for seal in seals(domain)])
    return [chr(b) for b in model(input_ids=rows.to(model.device)).logits[:, -1].argmax(-1).tolist()]
