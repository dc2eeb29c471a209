# SPDX-License-Identifier: Apache-2.0
"""Decoding: contrast between two routings of one model, and experts that are replaced by a vector."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from anabranch.data.six_domains import DOMAINS
from anabranch.jobs.experts.text_mixture import ByteWindows
from anabranch.models.mixtures.layers import MixtureLayer
from anabranch.models.mixtures.routing import changed
from anabranch.reuse.merge.compressed_experts import CompressedExperts, fit
from anabranch.reuse.steer.scmoe import contrast, weak_routing
from anabranch.train.loop import TrainConfig
from recipes.experts.bench import Bench
from recipes.experts.compare import texts
from recipes.experts.tuning import Rows, opened


def decoding(models: Path) -> Rows:
    rows: Rows = []
    for name in ("first", "second"):
        model = opened(models, name)
        for draw in (0, 1, 2):
            bench = Bench(name, model, "law", draw, *texts(draw))
            for domain in DOMAINS:
                ids = bench.asked[domain].input_ids[draw::3]
                rows += [
                    {"part": "decode", "arm": arm, "model": name, "draw": draw, "domain": domain, "right": right}
                    for arm, right in contrasted(bench, ids).items()
                ]
            rows += compressed(bench, name, draw)
            print(name, draw, flush=True)
    return rows


@torch.no_grad()
def contrasted(bench: Bench, ids: Tensor) -> dict[str, float]:
    """Share of the bytes that are the likeliest one, by the model, by weak routings, and by contrast with them."""
    strong = bench.model(ids).logits[:, :-1]
    found = {"the model": hit(strong, ids)}
    for ranks in ((2,), (8,)):
        with changed(bench.layers, weak_routing(ranks)):
            weak = bench.model(ids).logits[:, :-1]
        found[f"rank {ranks[0]} alone"] = hit(weak, ids)
        found[f"contrast with rank {ranks[0]}"] = hit(contrast(strong, weak, alpha=0.1, beta=0.5), ids)
    return found


def hit(logits: Tensor, ids: Tensor) -> float:
    return float((logits.argmax(-1) == ids[:, 1:]).double().mean())


class OneVector(CompressedExperts):
    """The control: any trained scale, the same for every expert that is left away."""

    def __init__(self, layers: Sequence[MixtureLayer], num_main: int):
        super().__init__(layers, num_main)
        self.offsets = torch.nn.ParameterList([torch.zeros(1, layer.hidden_size) for layer in layers])

    def replaced(self, layer: MixtureLayer, offsets: Tensor, fired: set[str]) -> AbstractContextManager[None]:
        return super().replaced(layer, offsets.expand(layer.num_experts, -1), fired)


def compressed(bench: Bench, name: str, draw: int) -> Rows:
    """One main expert, the second one as a vector: before and after vectors are trained, of its own or for all."""
    config = TrainConfig(steps=100, batch_size=24, learning_rate=1e-2, weight_decay=0.0, seed=draw)
    own, shared = CompressedExperts(bench.layers, 1), OneVector(bench.layers, 1)
    found = {"the first expert alone": bench.within(own.applied())}
    for arm, vectors in (("the second as a trained vector", own), ("the second as one vector for all", shared)):
        fit(bench.model, vectors, ByteWindows(DOMAINS, 24, draw), config)
        found[arm] = bench.within(vectors.applied())
    return [
        {"part": "compress", "arm": arm, "model": name, "draw": draw, "change": change} for arm, change in found.items()
    ]
