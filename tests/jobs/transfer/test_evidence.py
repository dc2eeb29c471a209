# SPDX-License-Identifier: Apache-2.0
"""What must hold on real images: the recipe's pair of domains, fifteen seeds, paired, with its primary score.

Nothing here asserts that experts beat the continued model, or clusters random groups: on these images neither is shown,
and the recipe prints both as they fall. That clusters beat random groups where there is a conflict is in test_planted.
About twenty minutes on two cores.
"""

import pytest

from anabranch.jobs.transfer.arms import ArmSettings
from anabranch.jobs.transfer.demo import compare
from anabranch.jobs.transfer.measure import measure
from anabranch.jobs.transfer.settings import MeasureSettings

pytestmark = pytest.mark.slow

FIRST_SEED, SEEDS, STEPS, BATCH_SIZE = 20, 15, 1500, 64
DOMAINS = ("garments", "digits")
ARMS = ("continued", "moce", "token-moe")


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    specs = tuple(f"patchwork:{name}" for name in DOMAINS)
    settings = MeasureSettings(
        sources=specs,
        tasks=specs,
        out=tmp_path_factory.mktemp("runs") / "evidence",
        steps=STEPS,
        seeds=SEEDS,
        first_seed=FIRST_SEED,
        batch_size=BATCH_SIZE,
        probe_points=1,
    )
    transfer = measure(settings)
    arms = ArmSettings(steps=STEPS, batch_size=BATCH_SIZE, num_experts=2, num_clusters=8)
    return transfer, compare(settings, arms, [(name, "ffn") for name in ARMS])


def effect(result, left, right):
    return next(e for e in result["effects"] if (e["left"], e["right"]) == (left, right))


def test_the_matching_source_matters(evidence):
    assert evidence[0]["mean_specificity"]["low"] > 0


def test_the_right_expert_beats_the_wrong_ones(evidence):
    assert effect(evidence[1], "moce", "moce wrong")["low"] > 0


def test_routing_follows_clusters_where_tokens_follow_pixels(evidence):
    semantics = evidence[1]["semantics"]
    for layer in semantics["moce"]:
        assert semantics["moce"][layer]["nmi_cluster"] > semantics["token-moe"][layer]["nmi_cluster"]
        assert semantics["moce"][layer]["token_agreement"] == 1
        assert semantics["moce"][layer]["pixel_r2"] < semantics["token-moe"][layer]["pixel_r2"]
