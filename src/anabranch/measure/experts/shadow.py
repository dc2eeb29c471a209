# SPDX-License-Identifier: Apache-2.0
"""Shadows: did one model learn from another, where only their texts are to be had? Small mixtures stand in for them.

Paper     : arXiv 2510.16968 (Shadow-MoE), whose abstract alone was read: the procedure here is our reading of it.
Equation  : shadow(X) = the small mixture after S steps of next-byte cross-entropy on texts X, from one initialisation
            d(A, B) = distance of the signatures of shadow(A) and shadow(B), read on the same labelled probes, e to e
            p = (1 + #{unrelated U: d(suspect, U) <= d(suspect, teacher)}) / (1 + their number)
Shapes    : B windows of T bytes a step, D labels of the probes.
Differs   : the places of the windows are the same for all shadows too, so that texts alone make them differ. Experts
            keep their numbers, as one initialisation made them.
Check     : equal texts give distance 0; planted imitators are nearer to their teachers than to others
            (tests/measure/experts/test_shadow.py).
Exempt    : samples (texts are one stream of bytes, read in their order)

Any two models can be compared, dense ones as well: what they wrote is all that is read. Let all of them answer the same
questions; texts on different subjects tell subjects apart, not models. Training scatters: on planted habits of letters
the nearest shadow is the right one clearly more often than by chance, and not always.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.measure.experts.signatures import Verdict, aligned_distance, verdict
from anabranch.measure.experts.statistics import Collector, ExpertStats
from anabranch.models.mixtures.layers import open_layers

PAD, VOCABULARY = 0, 257
"""Byte b has the id b + 1."""


@dataclass(frozen=True, kw_only=True)
class Config:
    hidden_size: int = 96
    num_layers: int = 3
    num_experts: int = 8
    top_k: int = 2
    length: int = 64
    """Bytes of a window."""
    batch_size: int = 16
    num_steps: int = 400
    learning_rate: float = 5e-4
    """Small: a large one scatters the routing of shadows of the same habit."""
    num_folds: int = 10
    seed: int = 0
    """Of the one initialisation and of the order of the windows."""


def compare(
    suspect: Sequence[str], teacher: Sequence[str], unrelated: Sequence[Sequence[str]],
    probes: Mapping[str, Sequence[str]], config: Config | None = None,
) -> Verdict:  # fmt: skip
    """Is what the suspect writes nearer to the teacher than to models that have nothing to do with either?

    probes      texts of several labels, nobody's own, on which the shadows' routing is compared
    """
    config = config or Config()
    if not unrelated:
        raise UsageError("a distance alone says nothing", expected="texts of unrelated models", received="none")
    profiles = [profile(shadow(texts, config), probes, config) for texts in (suspect, teacher, *unrelated)]
    return verdict(profiles[0], profiles[1], profiles[2:], aligned_distance)


def shadow(texts: Sequence[str], config: Config) -> Any:
    """The small mixture that learnt from these texts."""
    stream = bytes_of(texts)
    if len(stream) <= config.length:
        raise UsageError(
            "too little text to learn from", expected=f"more than {config.length} bytes", received=len(stream)
        )
    model = initial(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.num_steps):
        places_B = torch.rand(config.batch_size, generator=generator) * (len(stream) - config.length)
        ids_BT = stream[places_B.long()[:, None] + torch.arange(config.length)]
        loss = model(ids_BT, labels=ids_BT, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def initial(config: Config) -> Any:
    """The mixture that all shadows start from."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
        num_attention_heads=4, num_key_value_heads=4, head_dim=config.hidden_size // 4,
        num_experts=config.num_experts, num_experts_per_tok=config.top_k, moe_intermediate_size=config.hidden_size,
        intermediate_size=config.hidden_size, decoder_sparse_step=1, norm_topk_prob=True, router_aux_loss_coef=0.01,
        max_position_embeddings=config.length, tie_word_embeddings=True, pad_token_id=PAD, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return Qwen3MoeForCausalLM(shape)


def profile(model: Any, probes: Mapping[str, Sequence[str]], config: Config) -> ExpertStats:
    """Routing on the probes, cut to one window each; texts take turns over the folds."""
    collector = Collector(model, open_layers(model), list(probes), num_folds=config.num_folds)
    for label, texts in enumerate(probes.values()):
        for start in range(0, len(texts), config.batch_size):
            rows = [bytes_of([text])[: config.length] for text in texts[start : start + config.batch_size]]
            ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
            mask_BT, folds_B = (ids_BT != PAD).long(), torch.arange(start, start + len(rows)) % config.num_folds
            with collector.collecting(torch.full((len(rows), 1), label), folds_B, mask_BT), torch.no_grad():
                model(ids_BT, attention_mask=mask_BT)
    return collector.stats


def bytes_of(texts: Sequence[str]) -> Tensor:
    """Ids of the texts one after another, a line feed between them."""
    return torch.tensor(list("\n".join(texts).encode()), dtype=torch.int64) + 1
