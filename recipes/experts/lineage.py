# SPDX-License-Identifier: Apache-2.0
"""Lineage: which two models came from one, by their routing profiles.

The strangers are models of other seeds with far fewer steps, so that six of them can be had; the other seed with all
its steps is the negative control that tells whether that matters. With six strangers p can't fall below 1/7.
"""

import copy
from pathlib import Path

from anabranch.data.six_domains import DOMAINS
from anabranch.jobs.text_mixture import train_mixture
from anabranch.measure.experts.signatures import distance, verdict
from anabranch.models.mixtures.layers import open_layers
from anabranch.specialize.expert_tuning import Training, tune
from recipes.experts.bench import Bench, statistics
from recipes.experts.compare import texts
from recipes.experts.tuning import RATE, STEPS, Rows, opened, ordered

STRANGER_STEPS = 200


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
        null = [seen[f"stranger {i}"] for i in range(len(strangers))]
        for name in suspects:
            found = verdict(seen[name], seen["teacher"], null, distance)
            rows.append({"part": "lineage", "arm": name, "draw": draw, "distance": found.distance,
                         "strangers": list(found.null), "p": found.p_value})  # fmt: skip
    return rows
