# SPDX-License-Identifier: Apache-2.0
"""A planted conflict: one domain in several pixel codes, and what isolation gains at equal images and steps.

python recipes/moce/planted.py    # five seeds; rewrites its table in README.md
"""

from pathlib import Path

from recipe import replace_section

from anabranch.jobs.transfer.arms import ArmSettings
from anabranch.jobs.transfer.contest import contest
from anabranch.jobs.transfer.effects import Results, difference, level, verdict
from anabranch.jobs.transfer.recipe_table import table
from anabranch.jobs.transfer.settings import MeasureSettings

CODES, STEPS, BATCH_SIZE = 6, 1000, 96
FIRST_SEED, SEEDS = 120, 5
ARMS = (
    *(("continued", "ffn"), ("separate", "ffn"), ("moce", "ffn")),
    *(("moce", "encoder"), ("random-clusters", "encoder")),
    *(("moce", "autoencoder"), ("random-clusters", "autoencoder"), ("oracle", "autoencoder")),
)
DIFFERENCES = (
    ("separate", "continued"),
    ("separate", "separate wrong"),
    ("moce", "continued"),
    ("moce-encoder", "continued"),
    ("moce-encoder", "random-clusters-encoder"),
    ("moce-encoder", "moce-encoder wrong"),
    ("moce-autoencoder", "continued"),
    ("moce-autoencoder", "random-clusters-autoencoder"),
    ("moce-autoencoder", "moce-autoencoder wrong"),
    ("moce-autoencoder", "separate"),
    ("oracle-autoencoder", "separate"),
)


def main() -> None:
    specs = tuple(f"planted:garments-{number}" for number in range(CODES))
    out = Path("runs/moce-planted")
    settings = MeasureSettings(
        sources=specs, tasks=specs, out=out, resume=out.exists(), steps=STEPS, batch_size=BATCH_SIZE, probe_points=1,
        first_seed=FIRST_SEED, seeds=SEEDS,
    )  # fmt: skip
    budget = ArmSettings(steps=STEPS, batch_size=BATCH_SIZE, num_experts=CODES, num_clusters=3 * CODES)
    text = tables(contest(settings, budget, ARMS), [spec.partition(":")[2] for spec in specs])
    replace_section("planted", text)
    print(text)


def tables(results: Results, tasks: list[str]) -> str:
    differences = []
    for left, right in DIFFERENCES:
        found, nearest = (difference(results, left, right, tasks, probe) for probe in ("linear", "knn"))
        differences.append([f"{left} - {right}", found, verdict(found), nearest])
    levels = [[arm, f"{level(results, arm, tasks).mean:.1f}"] for arm in results]
    return "\n\n".join(
        [
            f"{SEEDS} seeds, {CODES} codes, {STEPS} + {STEPS} steps of {BATCH_SIZE} images; linear probe, 300 labels; "
            "points, mean over codes, 95 % t-intervals over seeds, paired.",
            table(["difference", "mean", "verdict", "kNN"], differences),
            table(["arm", "accuracy, percent"], levels),
        ]
    )


if __name__ == "__main__":
    main()
