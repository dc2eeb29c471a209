# SPDX-License-Identifier: Apache-2.0
"""SDR on the shipped corpus: the diagnostic under SimSiam, the method, and every arm that it has to be compared with.

python recipes/sdr/recipe.py           # about 65 minutes on two cores; rewrites README.md
python recipes/sdr/recipe.py --tiny    # a smoke run in under three minutes; writes nothing but its run folder
"""

import sys
from pathlib import Path
from typing import Any

from anabranch.jobs.transfer.measure import measure
from anabranch.jobs.transfer.sdr_arms import SdrArmSettings
from anabranch.jobs.transfer.sdr_compare import compare_subnets, tables
from anabranch.jobs.transfer.sdr_page import dial, write_subnet_page
from anabranch.jobs.transfer.settings import MeasureSettings
from anabranch.report.page import standalone

DOMAINS = ("garments", "animals", "digits", "textures")
STEPS, SUBNET_STEPS, BATCH_SIZE = 1000, 2000, 64
FIRST_SEED, SEEDS = 30, 5
HERE = Path(__file__).parent
START, END = "<!-- written by recipe.py -->", "<!-- end -->"


def settings(tiny: bool) -> MeasureSettings:
    out = Path("runs") / ("sdr-four-tiny" if tiny else "sdr-four")
    specs = tuple(f"patchwork:{domain}" for domain in DOMAINS[: 2 if tiny else None])
    return MeasureSettings(
        sources=specs,
        tasks=specs,
        out=out,
        objective="simsiam",
        preset="narrow",
        steps=40 if tiny else STEPS,
        seeds=1 if tiny else SEEDS,
        first_seed=FIRST_SEED,
        batch_size=BATCH_SIZE,
        probe_points=1 if tiny else 3,
        resume=out.exists(),
    )


def run(tiny: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """The transfer matrix and the arms, made now or read from their run."""
    given = settings(tiny)
    # 1. pre-train on every source and on all; probe every task: the transfer matrix, and phase 0 for every seed
    transfer = measure(given)
    # 2. cluster the features of phase 0, grow the tree, split the net phase by phase; and every arm beside it
    budget = SdrArmSettings(
        base_steps=given.steps,
        steps=40 if tiny else SUBNET_STEPS,
        batch_size=BATCH_SIZE,
        groups=2 if tiny else 4,
        clusters=2 if tiny else 4,
    )
    return transfer, compare_subnets(given, budget)


def main(tiny: bool) -> None:
    # 3. the page and the tables
    transfer, result = run(tiny)
    page, text = write_subnet_page(settings(tiny).out), tables(transfer, result)
    if not tiny:
        (HERE / "dial.svg").write_text(standalone(dial(result)), encoding="utf-8")
        before, _, rest = (HERE / "README.md").read_text(encoding="utf-8").partition(START)
        (HERE / "README.md").write_text(f"{before}{START}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(f"{text}\n\n{page}")


if __name__ == "__main__":
    main("--tiny" in sys.argv[1:])
