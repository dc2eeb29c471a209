# SPDX-License-Identifier: Apache-2.0
"""What else can be done with LoRA experts on chains: a gate of tokens, clusters of questions, separate adapters.

Papers    : MoE-LoRA with a gate (MixLoRA, arXiv 2404.15159; MoELoRA, arXiv 2402.12851), MoCLE (arXiv 2312.12379).
Differs   : MoCLE's clusters are k-means on the mean embedding of the question's words; separate adapters are one LoRA a
            step, each trained on the loss of its step alone, and walked request by request.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.allocate.clusters.kmeans import lloyd
from anabranch.data.streams import derived_seed
from anabranch.mixture.lora_router import balance_of, learn_routes
from anabranch.mixture.routing import LinearScore, Router, TableScore, TopK, prob, renormalised
from anabranch.specialize.mote.collate import IGNORED
from anabranch.specialize.mote.mote import SHARED, ChainLoss, MoTE
from anabranch.specialize.mote.steps import QUESTION

BALANCE = 0.01
CLUSTERS = 8


class BalancedLoss(ChainLoss):
    """The chain's loss and, with a small weight, the balance of the gates."""

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": super().forward(batch)["loss"] + BALANCE * balance_of(self.held[0].model)}


def gate_tokens(mote: MoTE, *, top_k: int = 2, seed: int = 0) -> MoTE:
    """All its experts, the shared one included, behind a gate in every layer."""

    def router(width: int) -> Router:
        generator = torch.Generator().manual_seed(derived_seed("gate", seed, width))
        score = LinearScore(width, len(mote.settings.adapters), generator=generator)
        return Router(score, select=TopK(top_k), weigh=renormalised)

    learn_routes(mote.model, mote.settings.adapters, None, router)
    return mote


class ByCluster(MoTE):
    """Experts by the cluster of the question, which all tokens of a row share; no step has a part in it."""

    def __init__(self, mote: MoTE, questions: Sequence[Sequence[int]], *, seed: int = 0):
        nn.Module.__init__(self)
        self.model, self.tokenizer, self.settings, self.tokens = mote.model, mote.tokenizer, mote.settings, mote.tokens
        length = max(map(len, questions))
        rows = torch.full((len(questions), length), self.pad)
        for number, question in enumerate(questions):
            rows[number, : len(question)] = torch.tensor(list(question))
        means = self.means(rows, torch.ones_like(rows, dtype=torch.bool))
        centroids, _ = lloyd(means, CLUSTERS, torch.Generator().manual_seed(seed))
        self.centroids: Tensor
        self.register_buffer("centroids", centroids)

        def router(width: int) -> Router:
            generator = torch.Generator().manual_seed(derived_seed("gate", seed, width))
            return Router(TableScore(centroids, len(self.settings.experts), generator=generator), weigh=prob)

        learn_routes(self.model, self.settings.experts, SHARED, router)

    @property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @torch.no_grad()
    def means(self, rows: Tensor, question: Tensor) -> Tensor:
        """(B, D): mean embedding of the words of the question."""
        words = (question & (rows != self.pad))[..., None]
        embedded = self.model.get_input_embeddings()(rows)
        return (embedded * words).sum(1) / words.sum(1).clamp(min=1)

    def context_ids(self, input_ids: Tensor, step_ids: Tensor) -> dict[str, Tensor]:
        means = self.means(input_ids, step_ids == QUESTION)
        return {"cluster": torch.cdist(means, self.centroids).argmin(-1)}


class OneStep:
    """A stream's batches with the labels of one step alone."""

    def __init__(self, stream: Any, step: int):
        self.stream, self.step = stream, step

    def batch(self, number: int) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = self.stream.batch(number)
        return batch | {"labels": torch.where(batch["step_ids"] == self.step, batch["labels"], IGNORED)}
