# SPDX-License-Identifier: Apache-2.0
"""MoCE on the shipped corpus: the diagnostic, the method, and every arm that it has to be compared with.

python recipes/moce/recipe.py         # all arms, five seeds, twenty minutes on two idle cores; rewrites README.md
python recipes/moce/recipe.py --tiny     # a smoke run in under three minutes; writes nothing but its run folder
"""

import sys
from pathlib import Path

from anabranch.jobs.arms import ArmSettings
from anabranch.jobs.demo import compare
from anabranch.jobs.demo_page import write_demo_page
from anabranch.jobs.measure import measure
from anabranch.jobs.recipe_table import tables
from anabranch.jobs.settings import MeasureSettings

DOMAINS = ("garments", "animals", "digits", "textures", "gratings")
SEEDS, FIRST_SEED = 5, 10
STEPS = 1500
BATCH_SIZE = 60
ARMS = [
    ("random-init", "ffn"),
    ("base", "ffn"),
    ("continued", "ffn"),
    ("moce", "ffn"),
    ("random-clusters", "ffn"),
    ("token-moe", "ffn"),
    ("oracle", "ffn"),
    ("separate", "ffn"),
    ("wider", "ffn"),
    ("moce-gate", "ffn"),
    ("moce", "encoder"),
]
HERE = Path(__file__).parent
START, END = "<!-- results: written by recipe.py -->", "<!-- end of results -->"


def main(tiny: bool) -> None:
    settings = MeasureSettings(
        sources=tuple(f"patchwork:{name}" for name in DOMAINS),
        tasks=tuple(f"patchwork:{name}" for name in DOMAINS),
        out=Path("runs/moce-tiny" if tiny else "runs/moce"),
        steps=60 if tiny else STEPS,
        seeds=2 if tiny else SEEDS,
        first_seed=FIRST_SEED,
        batch_size=BATCH_SIZE,
        probe_points=1 if tiny else 3,
        resume=Path("runs/moce-tiny" if tiny else "runs/moce").exists(),
    )
    # 1. pre-train on every source, on all, and on all but one; probe every task: the transfer matrix
    transfer = measure(settings)
    # 2. cluster the features of the shared model, give clusters to experts, train on; and every arm beside it
    result = compare(settings, ArmSettings(steps=settings.steps), ARMS[:6] if tiny else ARMS)
    # 3. the page and the table
    page, text = write_demo_page(settings.out), tables(transfer, result)
    if not tiny:
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        before, after = readme.partition(START)[0], readme.partition(END)[2]
        (HERE / "README.md").write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")
    print(f"{text}\n\n{page}")


if __name__ == "__main__":
    main("--tiny" in sys.argv[1:])
