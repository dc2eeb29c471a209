# SPDX-License-Identifier: Apache-2.0
"""The losses against slow loops, who is asked and who learns."""

import copy
from itertools import product

import pytest
import torch

from anabranch.data.images import Images, Store
from anabranch.data.views import Views
from anabranch.specialize import simsiam
from anabranch.specialize.sdr.channels import SHARED
from anabranch.specialize.sdr.objective import Config, SubnetLearning, byol_loss, distillation, grown, kd_weight, turns
from anabranch.specialize.sdr.schedule import PathBatches, PathIndices, Rounds
from anabranch.specialize.sdr.supernet import Config as NetConfig
from anabranch.specialize.sdr.supernet import supernet
from anabranch.train.loop import TrainConfig, train

PATHS = [(0, 0, *digits) for digits in product(range(2), repeat=2)]


@pytest.fixture
def make_objective(make_backbone):
    def make(teacher="anchor", total_steps=20, **config):
        heads = simsiam.projector(20, 16, 16), simsiam.predictor(16, 8, 16)
        torch.manual_seed(0)
        for head in heads:
            for parameter in head.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        net = supernet(make_backbone(), NetConfig(groups=2, teacher=teacher))
        return grown(SubnetLearning(net, *heads, Config(**config), 1), PATHS, 2, total_steps)

    return make


@pytest.fixture
def stream():
    pixels = torch.randint(0, 256, (64, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images = Images(name="noise", store=Store.of(pixels))
    rounds = Rounds(4, 2, 0.2, seed=3)
    indices = PathIndices(rounds, [torch.arange(k, 64, 4) for k in range(4)], 64, batch_size=12)
    return PathBatches(simsiam.TwoViews(images, indices, Views(), seed=3), rounds)


def with_row(stream, row):
    """A step in which this model has its turn."""
    return next(step for step in range(40) if row in stream.rounds.at(step))


def slow_cosine(a, b):
    total = 0.0
    for x, y in zip(a.double().tolist(), b.double().tolist(), strict=True):
        dot = sum(p * q for p, q in zip(x, y, strict=True))
        total += dot / (sum(p * p for p in x) ** 0.5 * sum(q * q for q in y) ** 0.5)
    return total / len(a)


def test_losses_equal_slow_loops():
    p1, p2, z1, z2 = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(2))
    cross = -(slow_cosine(p1, z2) + slow_cosine(p2, z1)) / 2
    same = -(slow_cosine(p1, z1) + slow_cosine(p2, z2)) / 2
    assert float(distillation((p1, p2), (z1, z2), "cross")) == pytest.approx(cross, abs=1e-6)
    assert float(distillation((p1, p2), (z1, z2), "same")) == pytest.approx(same, abs=1e-6)
    assert float(byol_loss((p1, p2), (z1, z2))) == pytest.approx(4 + 4 * cross, abs=1e-5)


def test_the_weight_of_the_teacher_falls_to_half_over_a_phase():
    config = Config(kd_coef=0.8)
    assert [kd_weight(config, p) for p in (0, 0.5, 1)] == pytest.approx([0.8, 0.6, 0.4])
    assert kd_weight(Config(kd_coef=0.8, kd_schedule="constant"), 1) == 0.8


def test_the_loss_of_a_step_is_the_mean_over_its_turns(make_objective, stream):
    objective = make_objective(kd_schedule="constant", kd_coef=0.5).train()
    step = with_row(stream, SHARED)
    batch = stream.batch(step)
    found, teacher = copy.deepcopy(objective)(batch), copy.deepcopy(objective)
    siamese, distill = [], []
    for rows, row in turns(batch["path"], 2):
        views = [simsiam.normalise(batch[name][rows]) for name in ("view1", "view2")]
        z = [objective.projector(objective.net.activate(row)(view)) for view in views]
        p = [objective.predictor(one) for one in z]
        siamese.append(-(slow_cosine(p[0], z[1]) + slow_cosine(p[1], z[0])) / 2)
        taught = [teacher.projector(teacher.net.activate(SHARED)(view)) for view in views]  # by batch statistics
        distill.append(0 if row == SHARED else -0.5 * (slow_cosine(p[0], taught[1]) + slow_cosine(p[1], taught[0])) / 2)
    assert found["siamese"].item() == pytest.approx(sum(siamese) / 2, abs=1e-5)
    assert found["distill"].item() == pytest.approx(sum(distill) / 2, abs=1e-5)
    assert found["loss"].item() == pytest.approx((sum(siamese) + sum(distill)) / 2, abs=1e-5)


@pytest.mark.parametrize(("ssl", "heads"), list(product(("simsiam", "byol"), ("own", "common"))))
def test_a_step_moves_the_heads_of_its_own_paths_alone(make_objective, stream, ssl, heads):
    """With common heads every path's step moves the one pair."""
    objective = make_objective(ssl=ssl, heads=heads, kd_coef=0.5).train()
    step = next(step for step in range(40) if SHARED not in stream.rounds.at(step))
    turns_M = stream.rounds.at(step)
    parts = ("projector.", "predictor.", "target.1.")
    before = {name: p.detach().clone() for name, p in objective.named_parameters() if name.startswith(parts)}
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        objective(stream.batch(step))["loss"].backward()
        optimizer.step()
    moved = {name for name, p in objective.named_parameters() if name in before and not torch.equal(p, before[name])}
    rows = {f"heads.{row}." for row in turns_M}
    for name in before:
        mine = heads == "common" or any(row in name for row in rows)
        assert (name in moved) == mine, name


@pytest.mark.parametrize("teacher", ["anchor", "supernet"])
def test_the_teacher_gets_no_gradient_and_no_new_statistics_from_others_turns(make_objective, stream, teacher):
    objective = make_objective(teacher).train()
    step = next(step for step in range(40) if SHARED not in stream.rounds.at(step))
    batch = stream.batch(step)
    before = {name: b.clone() for name, b in objective.named_buffers() if "shared" in name}
    objective(batch)["loss"].backward()
    with_gradient = {name for name, p in objective.net.named_parameters() if p.grad is not None}
    assert with_gradient == set().union(*(objective.net.parameters_of(row) for row in stream.rounds.at(step)))
    assert all(torch.equal(b, before[name]) for name, b in objective.named_buffers() if name in before)


@pytest.mark.parametrize(("kd_coef", "asked"), [(0.0, 0), (1.0, 1)])
def test_without_weight_no_teacher_is_asked(make_objective, stream, kd_coef, asked, monkeypatch):
    objective = make_objective(kd_coef=kd_coef).train()
    step = next(step for step in range(40) if SHARED not in stream.rounds.at(step))
    calls = []
    original = objective.taught
    monkeypatch.setattr(objective, "taught", lambda turns: calls.append(1) or original(turns))
    assert objective(stream.batch(step))["distill"].item() == pytest.approx(0) or kd_coef
    assert len(calls) == asked


def test_a_new_phase_starts_at_the_loss_of_the_old_one(make_objective, stream):
    objective = make_objective().eval()
    rows = [objective.net.paths.index(path) for path in objective.net.paths]
    child = grown(objective, [(0, *digits) for digits in product(range(2), repeat=3)], 3, 10).eval()
    batch = stream.batch(0)
    view = simsiam.normalise(batch["view1"])
    for row, path in enumerate(child.net.paths):
        parent = rows[objective.net.paths.index((0, 0, *path[2:]))]
        ours = child.predictor(child.projector(child.net.activate(row)(view)))
        theirs = objective.predictor(objective.projector(objective.net.activate(parent)(view)))
        assert torch.equal(ours, theirs)


def test_byols_target_follows_the_steps_paths_alone(make_objective, stream):
    objective = make_objective(ssl="byol", target_momentum=0.5).train()
    with torch.no_grad():
        for parameter in objective.net.parameters():
            parameter.add_(1)
    before = {name: p.clone() for name, p in objective.target[0].named_parameters()}
    batch = stream.batch(0)
    objective(batch)["loss"].backward()
    wanted = set().union(*(objective.net.parameters_of(row) for row in stream.rounds.at(0)))
    for name, follower in objective.target[0].named_parameters():
        assert follower.grad is None
        expected = before[name] + (0.5 if name in wanted else 0)
        torch.testing.assert_close(follower, expected)
    moved = follower.clone()
    objective.eval()(batch)
    assert torch.equal(follower, moved)  # looking does not move it


@pytest.mark.parametrize("config", [{}, {"ssl": "byol"}, {"teacher": "supernet"}])
def test_training_resumes_bit_for_bit(make_objective, stream, tmp_path, config):
    settings = TrainConfig(steps=12, batch_size=12, learning_rate=1e-2, save_every=5)
    whole, halved = make_objective(**config), make_objective(**config)
    train(whole, stream, settings, tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def interrupt(step, logs):
        if step == 7:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(halved, stream, settings, tmp_path / "halved", on_step=interrupt)
    again = make_objective(**config)
    train(again, stream, settings, tmp_path / "halved", resume=True)
    for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_turns_have_to_be_contiguous():
    with pytest.raises(ValueError, match="path: expected at most 2 contiguous turns, received 3"):
        list(turns(torch.tensor([0, 1, 0]), 2))
