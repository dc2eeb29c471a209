# SPDX-License-Identifier: Apache-2.0
"""Lineage: which two models came from one, by their routing profiles, and by what they write alone (shadows).

The strangers are models of other seeds with far fewer steps, so that six of them can be had; the other seed with all
its steps is the negative control that tells whether that matters. With six strangers p can't fall below 1/7.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from anabranch.data.six_domains import DOMAINS
from anabranch.data.streams import derived_seed
from anabranch.jobs.experts.text_mixture import byte_tokenizer, train_mixture
from anabranch.measure.experts import shadow
from anabranch.measure.experts.signatures import aligned_distance, distance, verdict
from anabranch.models.mixtures.layers import open_layers
from anabranch.specialize.expert_tuning import Training, tune
from recipes.experts.bench import Bench, statistics
from recipes.experts.compare import texts
from recipes.experts.tuning import RATE, STEPS, Rows, opened, ordered

STRANGER_STEPS = 200
BEGINNING, WRITTEN = 32, 64
"""Bytes of a text that every model goes on from, and bytes that it writes."""


def lineage(models: Path) -> Rows:
    """Tuned copies, a twin from the same start and another seed, against models of other seeds."""
    first = opened(models, "first")
    suspects = {}
    for name, domains in (("tuned on maths", ["maths"]), ("tuned on everything", list(DOMAINS))):
        child = copy.deepcopy(first)
        every = {layer.name: tuple(range(layer.num_experts)) for layer in open_layers(child)}
        tune(child, every, ordered(domains, 7), Training(steps=STEPS, learning_rate=RATE))
        suspects[name] = child
    suspects |= {"same start, other texts": opened(models, "twin"), "another seed": opened(models, "second")}
    strangers = []
    for seed in range(10, 16):
        model, _ = train_mixture(seed, steps=STRANGER_STEPS)
        model.set_experts_implementation("eager")
        strangers.append(model)
        print("stranger", seed, flush=True)
    rows: Rows = []
    for draw in (0, 1, 2):
        read_, asked = texts(draw)
        every = {"teacher": first, **suspects, **{f"stranger {i}": model for i, model in enumerate(strangers)}}
        seen = {name: statistics(Bench(name, model, "law", draw, read_, asked))[0] for name, model in every.items()}
        rows += judged("lineage", seen, list(suspects), distance, draw)
        begun = torch.cat([asked[domain].input_ids[:, :BEGINNING] for domain in DOMAINS])
        probes = {domain: in_words(read_[domain].input_ids) for domain in DOMAINS}
        config = shadow.Config(seed=draw)
        seen = {}
        for name, model in every.items():  # each draws for itself, as nobody shares the noise of a stranger's service
            answers = written(model, begun, derived_seed("written", name, draw))
            seen[name] = shadow.profile(shadow.shadow(answers, config), probes, config)
        rows += judged("shadows", seen, list(suspects), aligned_distance, draw)
    return rows


def judged(part: str, seen: Mapping[str, Any], suspects: list[str], between: Any, draw: int) -> Rows:
    null = [own for name, own in seen.items() if name.startswith("stranger")]
    rows: Rows = []
    for name in suspects:
        found = verdict(seen[name], seen["teacher"], null, between)
        rows.append({"part": part, "arm": name, "draw": draw, "distance": found.distance,
                     "strangers": list(found.null), "p": found.p_value})  # fmt: skip
    return rows


@torch.no_grad()
def written(model: Any, begun: torch.Tensor, seed: int) -> list[str]:
    """What a model writes after each beginning (B, bytes), drawn at temperature 1."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        ids = model.generate(begun, attention_mask=torch.ones_like(begun), do_sample=True, top_k=0,
                             max_new_tokens=WRITTEN, suppress_tokens=[256, 257])  # fmt: skip
    return in_words(ids[:, BEGINNING:])


def in_words(ids: torch.Tensor) -> list[str]:
    words: list[str] = byte_tokenizer().batch_decode(ids, skip_special_tokens=True)
    return words
