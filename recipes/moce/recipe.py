# SPDX-License-Identifier: Apache-2.0
"""MoCE on the shipped corpus: the diagnostic, the method, and every arm that it has to be compared with.

python recipes/moce/recipe.py           # two experiments, half an hour on two idle cores; rewrites README.md
python recipes/moce/recipe.py --tiny    # a smoke run in under three minutes; writes nothing but its run folder
"""

import sys
from pathlib import Path
from typing import Any

from anabranch.jobs.arms import ArmSettings
from anabranch.jobs.demo import ARMS, compare
from anabranch.jobs.demo_page import write_demo_page
from anabranch.jobs.measure import measure
from anabranch.jobs.recipe_table import tables
from anabranch.jobs.settings import MeasureSettings

BATCH_SIZE = 64
FFN = [(arm, "ffn") for arm in ("random-init", "continued", "moce", "random-clusters")]
ENCODER = [("moce", "encoder"), ("random-clusters", "encoder")]
EXPERIMENTS = {
    # name: domains, first seed, seeds, steps, experts, clusters, arms
    "pair": (("garments", "digits"), 20, 15, 1500, 2, 8, FFN + ENCODER),
    "four": (
        ("garments", "animals", "digits", "textures"),
        0,
        3,
        1000,
        4,
        12,
        [(arm, "ffn") for arm in ARMS],
    ),  # the demo's
}
HERE = Path(__file__).parent


def main(tiny: bool) -> None:
    for name in EXPERIMENTS:
        transfer, result = run(name, tiny)
        # 3. the page and the table
        page, text = write_demo_page(folder(name, tiny)), tables(transfer, result)
        if not tiny:
            replace_section(name, text)
        print(f"{text}\n\n{page}\n")


def folder(name: str, tiny: bool) -> Path:
    return Path("runs") / (f"moce-{name}-tiny" if tiny else f"moce-{name}")


def run(name: str, tiny: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """The transfer matrix and the arms of one experiment, made now or read from its run."""
    domains, first_seed, seeds, steps, num_experts, num_clusters, arms = EXPERIMENTS[name]
    settings = MeasureSettings(
        sources=tuple(f"patchwork:{domain}" for domain in domains),
        tasks=tuple(f"patchwork:{domain}" for domain in domains),
        out=folder(name, tiny),
        steps=60 if tiny else steps,
        seeds=2 if tiny else seeds,
        first_seed=first_seed,
        batch_size=BATCH_SIZE,
        probe_points=1 if tiny else 3,
        resume=folder(name, tiny).exists(),
    )
    # 1. pre-train on every source and on all; probe every task: the transfer matrix
    transfer = measure(settings)
    # 2. cluster the features of the shared model, give clusters to experts, train on; and every arm beside it
    budget = ArmSettings(
        steps=settings.steps, batch_size=BATCH_SIZE, num_experts=num_experts, num_clusters=num_clusters
    )
    return transfer, compare(settings, budget, FFN if tiny else arms)


def replace_section(name: str, text: str) -> None:
    """Put the tables of one experiment into README.md, between its markers."""
    start, end = f"<!-- {name}: written by recipe.py -->", f"<!-- end of {name} -->"
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    before, after = readme.partition(start)[0], readme.partition(end)[2]
    (HERE / "README.md").write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main("--tiny" in sys.argv[1:])
