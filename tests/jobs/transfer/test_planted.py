# SPDX-License-Identifier: Apache-2.0
"""The planted conflict must be one, and experts of clusters must cure it, at equal images and steps.

Setting and seeds are those of the recipe. About twenty-five minutes of one core.
"""

import pytest

from anabranch.jobs.transfer.arms import ArmSettings
from anabranch.jobs.transfer.contest import contest
from anabranch.jobs.transfer.effects import difference
from anabranch.jobs.transfer.settings import MeasureSettings

CODES, STEPS, BATCH_SIZE = 6, 1000, 96
FIRST_SEED, SEEDS = 120, 5
SPECS = tuple(f"planted:garments-{number}" for number in range(CODES))
TASKS = [spec.partition(":")[2] for spec in SPECS]
ARMS = [("continued", "ffn"), ("separate", "ffn"), ("moce", "autoencoder"), ("random-clusters", "autoencoder")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    settings = MeasureSettings(
        sources=SPECS, tasks=SPECS, out=tmp_path_factory.mktemp("runs") / "planted", steps=STEPS,
        batch_size=BATCH_SIZE, probe_points=1, first_seed=FIRST_SEED, seeds=SEEDS,
    )  # fmt: skip
    arms = ArmSettings(steps=STEPS, batch_size=BATCH_SIZE, num_experts=CODES, num_clusters=3 * CODES)
    return contest(settings, arms, ARMS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("separate", "continued"),
        ("separate", "separate wrong"),
        ("moce-autoencoder", "random-clusters-autoencoder"),
        ("moce-autoencoder", "moce-autoencoder wrong"),
        ("moce-autoencoder", "continued"),
    ],
)
def test_the_conflict_is_one_and_experts_cure_it(results, left, right):
    assert difference(results, left, right, TASKS).low > 0


def test_a_contest_trains_every_arm_once_and_goes_on_where_it_was(tmp_path, capfd):
    settings = MeasureSettings(
        sources=SPECS[:2], tasks=SPECS[:2], out=tmp_path / "run", steps=2, seeds=1, batch_size=4, num_labels=40,
        num_draws=1, probe_points=1, workers=1,
    )  # fmt: skip
    arms = ArmSettings(steps=2, batch_size=4, num_experts=2, num_labels=40, num_draws=1)
    before = contest(settings, arms, ARMS[:2])
    assert set(before) == {"continued", "separate", "separate wrong"}
    assert set(before["separate"][0]["scores"]) == set(TASKS[:2])
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/*.json")}
    resumed = MeasureSettings(**{**vars(settings), "resume": True})
    assert contest(resumed, arms, ARMS[:2]) == before
    assert {path: path.stat().st_mtime_ns for path in files} == files
