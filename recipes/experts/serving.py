# SPDX-License-Identifier: Apache-2.0
"""Serving: caches and placements, planned and simulated on recorded routing."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.data.six_domains import DOMAINS
from anabranch.measure.experts.local_consistency import sch, srp
from anabranch.measure.experts.trace import Recorder, RoutingTrace
from anabranch.reuse.serve import eviction, expert_flow, placement
from anabranch.reuse.serve.expert_cache import simulate
from recipes.experts.bench import Bench
from recipes.experts.compare import texts
from recipes.experts.tuning import Rows, opened


def trace_of(bench: Bench, windows: dict[str, Any], domains: tuple[str, ...]) -> tuple[RoutingTrace, Tensor]:
    recorder, ids = Recorder(bench.layers), []
    for domain in domains:
        own = windows[domain]
        with torch.no_grad(), recorder.recording(own.attention_mask):
            bench.model(own.input_ids)
        ids.append(own.input_ids[own.attention_mask.bool()])
    return recorder.trace(), torch.cat(ids)


def serving(models: Path) -> Rows:
    rows: Rows = []
    for name in ("first", "second"):
        model = opened(models, name)
        for draw in (0, 1, 2):
            bench = Bench(name, model, "law", draw, *texts(draw))
            calibration, ids = trace_of(bench, bench.read_, DOMAINS)
            trace, asked = trace_of(bench, bench.asked, DOMAINS)
            unit = {"part": "serve", "model": name, "draw": draw}
            rows.append(unit | {"arm": "SRP, 16 tokens", "value": srp(trace, num_resamples=50).overall})
            rows.append(unit | {"arm": "SCH, 4 slots", "value": sch(trace, num_resamples=50).overall})
            generator = torch.Generator().manual_seed(draw)
            config = expert_flow.Config(vocab_size=258, num_layers=4, num_experts=8)
            predictor = expert_flow.PathPredictor(config, generator=generator)
            expert_flow.fit(predictor, ids, calibration, generator=generator)
            guess = expert_flow.predicted(predictor, asked, trace)
            rows.append(unit | {"arm": "ExpertFlow: experts foreseen", "value": expert_flow.recall(guess, trace)})
            rules = {
                "drawn": eviction.drawn(generator), "LRU": eviction.lru, "LFU": eviction.lfu,
                "by frequency": eviction.by_frequency(calibration), "Belady, the bound": eviction.belady,
                "ExpertFlow's prediction": expert_flow.by_need(guess),
            }  # fmt: skip
            for rule, own in rules.items():
                rows.append(unit | {"arm": f"hits of 4 slots: {rule}", "value": simulate(trace, 4, own).hit_rate})
            rows += placed(unit, calibration)
            print(name, draw, flush=True)
    return rows


def placed(unit: dict[str, Any], trace: RoutingTrace) -> Rows:
    """Busiest of four devices over the mean, by layer: as the experts lie, and least loaded."""
    found: dict[str, list[float]] = {"as they lie": [], "least loaded": []}
    owner = placement.contiguous(8, 4)
    for layer in range(len(trace.layers)):
        tokens = torch.bincount(trace.selected[:, layer].flatten().long(), minlength=8).tolist()
        plans = {
            "as they lie": placement.native(tokens, owner, 4),
            "least loaded": placement.least_loaded(tokens, owner, 4),
        }
        for arm, plan in plans.items():
            found[arm].append(max(plan.load) / (sum(plan.load) / 4))
    return [
        unit | {"arm": f"busiest of 4 devices / mean: {arm}", "value": float(np.mean(v))} for arm, v in found.items()
    ]
