# SPDX-License-Identifier: Apache-2.0
"""Tuning: the twin learns the domain that it never saw, with only some of its experts; and three adapters at once."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from anabranch.jobs.experts.rank import module
from anabranch.jobs.experts.text_mixture import ByteWindows
from anabranch.measure.experts.ranking.batches import Batch
from anabranch.models.language.folder import hushed
from anabranch.reuse.serve.expert_weave import ExpertWeave
from anabranch.specialize import esft
from anabranch.specialize.expert_tuning import Training, Tuned, by_layer, tune
from recipes.experts.bench import Bench, statistics, with_gradients
from recipes.experts.compare import texts

UNSEEN, STEPS, RATE = "maths", 80, 1e-3
Rows = list[dict[str, Any]]


def opened(models: Path, name: str) -> Any:
    with hushed():
        model = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    return model


def ordered(domains: Sequence[str], seed: int) -> Iterator[Batch]:
    stream, step = ByteWindows(domains, 24, seed), 0
    while True:
        ids = stream.batch(step)["input_ids"][:, :-1]
        step += 1
        yield Batch(ids, torch.ones_like(ids), torch.zeros_like(ids), torch.zeros(len(ids), dtype=torch.long))


def tuning(models: Path) -> Rows:
    twin, rows = opened(models, "twin"), []
    for draw in (0, 1, 2):
        bench = Bench("twin", twin, UNSEEN, draw, *texts(draw))
        stats, _ = statistics(bench)
        lens = with_gradients(bench)["router_lens"]()
        scores = {name: module(name).rank(stats, UNSEEN, bench.others) for name in ("esft_token", "esft_gate")}
        other = module("esft_token").rank(stats, "rights", [])
        drawn = torch.rand(lens.shape, generator=bench.seed())
        chosen = {
            **{f"{name}, p .5": esft.select(own, 0.5) for name, own in scores.items()},
            "ceft, 2 a layer": top(lens, 2), "frequency, 2 a layer": top(scores["esft_token"], 2),
            "2 random ones a layer": top(drawn, 2), "2 of another domain": top(other, 2),
            "2 least used ones": top(-scores["esft_token"], 2), "all experts": torch.ones(lens.shape, dtype=torch.bool),
        }  # fmt: skip
        for arm, mask in chosen.items():
            model, config = copy.deepcopy(twin), Training(steps=STEPS, learning_rate=RATE)
            tuned: Tuned = tune(model, by_layer(mask, stats.layers), ordered([UNSEEN], draw), config)
            weights = sum(value.numel() for value in tuned.adapter.tensors.values())
            rows.append({"part": "tune", "arm": arm, "draw": draw, "experts": int(mask.sum()), "weights": weights,
                         "change": bench.change(model)})  # fmt: skip
            print(rows[-1]["arm"], draw, rows[-1]["change"][UNSEEN], flush=True)
        rows += woven(twin, bench, stats, draw) if draw == 0 else []
    return rows


def top(scores: Tensor, num: int) -> Tensor:
    chosen = scores.argsort(dim=-1, descending=True, stable=True)[:, :num]
    return torch.zeros(scores.shape, dtype=torch.bool).scatter(1, chosen, True)


@torch.no_grad()
def woven(twin: Any, bench: Bench, stats: Any, draw: int) -> Rows:
    """Three adapters over one base, their rows in one batch, against each merged model by itself."""
    found = []
    for seed, domain in enumerate(("maths", "law", "python")):
        mask = top(module("esft_token").rank(stats, domain, []), 1 + seed)
        with torch.enable_grad():
            model = copy.deepcopy(twin)
            few = Training(steps=5, learning_rate=RATE)
            tuned = tune(model, by_layer(mask, stats.layers), ordered([domain], seed), few)
        found.append((model, tuned.adapter))
    ids = bench.asked[UNSEEN].input_ids[:4]
    alone = torch.stack(
        [model(ids[i : i + 1]).logits[0] for i, (model, _) in enumerate(found)] + [twin(ids[3:]).logits[0]]
    )
    base = copy.deepcopy(twin)
    weave = ExpertWeave(base, [adapter for _, adapter in found])
    with weave.serving([0, 1, 2, -1]):
        together = base(ids).logits
    memory = weave.memory
    row = {"part": "weave", "draw": draw, "difference": float((alone - together).abs().max())}
    return [row | {"ragged": memory.ragged, "padded": memory.padded, "separate": memory.separate}]
