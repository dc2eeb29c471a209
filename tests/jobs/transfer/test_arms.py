# SPDX-License-Identifier: Apache-2.0
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from anabranch.jobs.transfer.arms import Arm, ArmSettings, Bench, group_purity, run_arm, wider
from anabranch.jobs.transfer.effects import after_routing, by_arm, difference, effects, level
from anabranch.jobs.transfer.measure import Corpus, open_corpus, shared_model
from anabranch.jobs.transfer.recipe_table import cell, table
from anabranch.jobs.transfer.settings import MeasureSettings
from anabranch.models import vit_mae

NAMES = ("digits", "textures")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    specs = tuple(f"patchwork:{name}" for name in NAMES)
    whole = open_corpus(MeasureSettings(sources=specs, tasks=specs))
    rows = torch.arange(0, 2000, 5)
    few = Corpus(tuple(images.take(rows) for images in whole.sources), whole.tasks, whole.own)
    settings = ArmSettings(steps=3, batch_size=12, num_experts=2, num_clusters=6, num_labels=40, num_draws=1)
    bench = Bench(settings, few, tmp_path_factory.mktemp("arms"))
    base = vit_mae.build("tiny", image_size=28, channels=1, seed=0)
    base.save_pretrained(shared_model(bench.run, 0))
    return bench


def test_every_arm_scores_every_task_and_starts_from_the_same_base(bench):
    results = {}
    for name in ("continued", "moce", "moce-gate", "random-clusters", "oracle", "token-moe", "separate", "wider"):
        arm = Arm(name, 0)
        results[arm.key] = run_arm(bench, arm)
        assert set(results[arm.key]["scores"]) == set(NAMES), name
    results["oracle-encoder.seed-0"] = run_arm(bench, Arm("oracle", 0, "encoder"))
    oracle = results["oracle.seed-0"]
    assert oracle["picked"] == {"digits": 0, "textures": 1}
    assert oracle["wrong"]["digits"]["linear"]["accuracy"] == pytest.approx(oracle["matrix"][1][0])
    assert oracle["scores"]["digits"]["linear"]["accuracy"] == pytest.approx(oracle["matrix"][0][0])
    for name in ("moce", "token-moe"):
        for layer in results[f"{name}.seed-0"]["load"].values():
            assert np.sum(layer, 0) == pytest.approx(1)
    made = effects(by_arm(results), list(NAMES))
    assert {effect["left"] for effect in made} >= {"moce", "oracle", "separate", "token-moe", "oracle-encoder"}


def test_widening_keeps_the_function_at_first(bench, generator):
    base = vit_mae.load(shared_model(bench.run, 0))
    images = torch.rand(4, 1, 28, 28, generator=generator)
    with torch.no_grad():
        before = vit_mae.encode(base, images)
    wide = copy.deepcopy(base)
    wider(
        replace(bench, settings=replace(bench.settings, steps=1, learning_rate=0.0, num_experts=3)),
        Arm("wider", 0),
        wide,
    )
    with torch.no_grad():
        after = vit_mae.encode(wide.eval(), images)
    assert wide.vit.layers[0].mlp.fc1.weight.shape[0] == 3 * base.vit.layers[0].mlp.fc1.weight.shape[0]
    assert (after - before).abs().max() < 0.02 * before.abs().max()


def result(arm, seed, score, wrong=None, matrix=None, picked=None):
    def scores(value):
        return {task: {"linear": {"accuracy": value + i}, "knn": {"accuracy": value}} for i, task in enumerate("ab")}

    made = {"arm": arm, "scope": "ffn", "seed": seed, "scores": scores(score), "seconds": 1.0}
    if wrong is not None:
        made |= {"wrong": scores(wrong), "matrix": matrix, "picked": picked}
    return made


def test_differences_are_paired_by_seed():
    """Seeds differ by ten points, the arms by one: only pairing shows it."""
    results = {}
    for seed in range(3):
        results[f"c{seed}"] = result("continued", seed, 10 * seed)
        matrix = [[10 * seed + 5, 10 * seed], [10 * seed - 5, 10 * seed + 9]]
        picked = {"a": 0, "b": 1}
        results[f"m{seed}"] = result("moce", seed, 10 * seed + 1 + 0.1 * seed, 10 * seed - 3, matrix, picked)
    arms = by_arm(results)
    found = difference(arms, "moce", "continued", ["a", "b"])
    assert found.mean == pytest.approx(1.1)
    assert found.low > 0
    assert level(arms, "continued", ["a", "b"]).low < 0
    named = {effect["name"]: effect for effect in effects(arms, ["a", "b"])}
    assert named["experts of clusters over the continued model"]["verdict"] == "shown"
    assert named["right expert over wrong experts"]["mean"] == pytest.approx(4.1)
    routed = after_routing(arms, ["a", "b"])
    assert [[c["mean"] for c in row] for row in routed] == [pytest.approx([5, -1]), pytest.approx([-5, 8])]


def test_purity_of_groups():
    groups, domains = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 1])
    assert group_purity(groups, domains, 2) == pytest.approx(4 / 5)


def test_markdown():
    assert cell({"mean": 1.234, "low": -0.5, "high": 3.0}) == "+1.23 [-0.50, +3.00]"
    assert cell({"mean": 1.234, "low": None, "high": None}) == "+1.23"
    assert table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"
