# SPDX-License-Identifier: Apache-2.0
"""MoCE on the shipped corpus: the diagnostic, the method, and every arm that it has to be compared with.

python recipes/moce/recipe.py           # three experiments, about 80 minutes on two cores; rewrites README.md
python recipes/moce/recipe.py --tiny    # a smoke run in a few minutes; writes nothing but its run folder
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from anabranch.jobs.settings import DemoFlags
from anabranch.jobs.transfer import demo
from anabranch.jobs.transfer.arms import ArmSettings
from anabranch.jobs.transfer.demo import compare
from anabranch.jobs.transfer.demo_page import write_demo_page
from anabranch.jobs.transfer.measure import measure
from anabranch.jobs.transfer.recipe_table import tables
from anabranch.jobs.transfer.settings import MeasureSettings

FFN = tuple((arm, "ffn") for arm in ("random-init", "continued", "moce", "random-clusters"))
ENCODER = (("moce", "encoder"), ("random-clusters", "encoder"))
AUTOENCODER = (("moce", "autoencoder"), ("random-clusters", "autoencoder"))
CONTROLS = tuple((arm, "ffn") for arm in ("token-moe", "separate", "oracle"))


class Experiment(NamedTuple):
    sources: tuple[str, ...]
    first_seed: int
    seeds: int
    budget: ArmSettings
    arms: tuple[tuple[str, str], ...]


EXPERIMENTS = {
    "pair": Experiment(
        ("patchwork:garments", "patchwork:digits"),
        *(20, 15),
        ArmSettings(steps=1500, batch_size=64, num_experts=2, num_clusters=8),
        FFN + ENCODER + AUTOENCODER,
    ),
    "four": Experiment(
        ("patchwork:garments", "patchwork:animals", "patchwork:digits", "patchwork:textures"),
        *(0, 3),
        ArmSettings(steps=1000, batch_size=64, num_experts=4, num_clusters=12),
        FFN + CONTROLS,
    ),
    "demo": Experiment(demo.SOURCES, 0, DemoFlags.seeds, demo.budget(DemoFlags.steps), demo.ARMS),
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
    wanted = EXPERIMENTS[name]
    budget = replace(wanted.budget, steps=60) if tiny else wanted.budget
    settings = MeasureSettings(
        sources=wanted.sources,
        tasks=wanted.sources,
        out=folder(name, tiny),
        steps=budget.steps,
        seeds=2 if tiny else wanted.seeds,
        first_seed=wanted.first_seed,
        batch_size=budget.batch_size,
        probe_points=1 if tiny else 3,
        resume=folder(name, tiny).exists(),
    )
    # 1. pre-train on every source and on all; probe every task: the transfer matrix
    transfer = measure(settings)
    # 2. cluster the features of the shared model, give clusters to experts, train on; and every arm beside it
    return transfer, compare(settings, budget, wanted.arms)


def replace_section(name: str, text: str) -> None:
    """Put the tables of one experiment into README.md, between its markers."""
    start, end = f"<!-- {name}: written by recipe.py -->", f"<!-- end of {name} -->"
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    before, after = readme.partition(start)[0], readme.partition(end)[2]
    (HERE / "README.md").write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main("--tiny" in sys.argv[1:])
