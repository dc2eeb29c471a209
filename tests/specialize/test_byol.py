# SPDX-License-Identifier: Apache-2.0
import math
import os
import signal

import pytest
import torch

from anabranch.data.images import Images, Store, open_images
from anabranch.data.streams import ShuffledIndices
from anabranch.errors import Stopped
from anabranch.models import resnet
from anabranch.specialize import byol
from anabranch.train.checkpoint import load_checkpoint
from anabranch.train.loop import TrainConfig, train
from anabranch.train.metrics import read_metrics

ONLINE, TARGET = ("model.", "projector."), ("target_model.", "target_projector.")


@pytest.fixture
def network():
    return resnet.build("tiny", image_size=28, channels=1, seed=0)


def noise_images():
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 1, 28, 28), generator=g, dtype=torch.uint8)
    return Images(name="photos", store=Store.of(pixels))


def batch_of(network, *, rows=8, step=0):
    return byol.stream(noise_images(), network, ShuffledIndices(40, rows, 0), seed=0).batch(step)


def parameters_of(objective, prefixes):
    return [p for name, p in objective.named_parameters() if name.startswith(prefixes)]


def test_loss_by_slow_loops(network):
    objective = byol.objective(network, seed=0).eval()
    batch = batch_of(network)
    with torch.no_grad():
        for xi in parameters_of(objective, TARGET):  # a target that differs from the online network
            xi.mul_(0.9).add_(0.01)
        loss = objective(batch)["loss"].item()
        views = [resnet.normalise(batch[name]) for name in ("view1", "view2")]
        p = [objective.predictor(objective.projector(resnet.features(network, view))) for view in views]
        z = [objective.target_projector(resnet.features(objective.target_model, view)) for view in views]
    total = 0.0
    for a, b in ((0, 1), (1, 0)):
        for i in range(8):
            dot = sum(float(x) * float(y) for x, y in zip(p[a][i], z[b][i], strict=True))
            lengths = math.sqrt(sum(float(x) ** 2 for x in p[a][i]) * sum(float(y) ** 2 for y in z[b][i]))
            total += (2 - 2 * dot / lengths) / 8
    assert loss == pytest.approx(total, abs=1e-5)


def test_the_target_follows_at_the_start_of_the_next_step(network):
    objective = byol.objective(network, seed=0, config=byol.Config(tau=0.9, total_steps=10)).train()
    pairs = list(zip(parameters_of(objective, ONLINE), parameters_of(objective, TARGET), strict=True))
    assert all(torch.equal(theta, xi) for theta, xi in pairs)
    objective(batch_of(network, step=0))
    assert all(torch.equal(theta, xi) for theta, xi in pairs)  # nothing is finished yet
    g = torch.Generator().manual_seed(0)
    for step in (1, 2, 3):
        with torch.no_grad():
            for theta, _ in pairs:
                theta += torch.randn(theta.shape, generator=g) * 0.01  # a step of the optimiser
        expected = []
        tau = 1 - 0.1 * (math.cos(math.pi * (step - 1) / 10) + 1) / 2
        for theta, xi in pairs:
            expected.append(tau * xi + (1 - tau) * theta)
        objective(batch_of(network, step=step))
        for (_, xi), wanted in zip(pairs, expected, strict=True):
            torch.testing.assert_close(xi, wanted, atol=1e-6, rtol=1e-5)


def test_momentum_goes_from_tau_to_one():
    config = byol.Config(total_steps=100)
    assert byol.momentum(0, config) == pytest.approx(0.996)
    assert byol.momentum(50, config) == pytest.approx(0.998)
    assert byol.momentum(100, config) == byol.momentum(200, config) == 1
    assert byol.momentum(12345, byol.Config()) == 0.996


def test_evaluation_changes_nothing(network):
    objective = byol.objective(network, seed=0).eval()
    with torch.no_grad():
        for theta in parameters_of(objective, ONLINE):
            theta += 1
        before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
        assert objective(batch_of(network, rows=1, step=5))["loss"].isfinite()
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items())


def test_no_gradient_reaches_the_target_and_it_is_saved(network):
    objective = byol.objective(network, seed=0).train()
    objective(batch_of(network))["loss"].backward()
    for name, parameter in objective.named_parameters():
        assert parameter.requires_grad != name.startswith(TARGET)
        assert (parameter.grad is None) == name.startswith(TARGET)
    saved = objective.state_dict()
    assert all(f"target_model.{name}" in saved for name in network.state_dict())


def test_weights_depend_on_the_seed_alone(network):
    before = torch.random.get_rng_state()
    one, same, other = (byol.objective(network, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    assert not torch.equal(one.projector[0].weight, other.projector[0].weight)


def test_training_lowers_the_loss_without_collapse(network):
    images = open_images("patchwork:digits").unlabelled()
    objective = byol.objective(network, seed=0, config=byol.Config(total_steps=60))
    stream = byol.stream(images, network, ShuffledIndices(len(images), 20, 0), seed=0)
    spreads = []
    config = TrainConfig(steps=60, batch_size=20, learning_rate=3e-3, warmup_steps=5)
    losses = train(objective, stream, config, on_step=lambda step, logs: spreads.append(logs["spread"])).losses
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.5
    assert min(spreads) > 0.3


def run(folder, stop_after=None, resume=False):
    network = resnet.build("tiny", image_size=28, channels=1, seed=0)
    objective = byol.objective(network, seed=0, config=byol.Config(tau=0.9, total_steps=10))
    stream = byol.stream(noise_images(), network, ShuffledIndices(40, 8, 0), seed=0)

    def on_step(step, logs):
        if step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    config = TrainConfig(steps=10, batch_size=8, learning_rate=3e-3, warmup_steps=2, save_every=10, log_every=1)
    train(objective, stream, config, folder, resume=resume, on_step=on_step)


def final(folder):
    checkpoint = load_checkpoint(folder).checkpoint
    lines = [
        {k: v for k, v in line.items() if k != "images_per_second"} for line in read_metrics(folder / "metrics.jsonl")
    ]
    return checkpoint.model | {f"optimizer.{k}": v for k, v in checkpoint.optimizer.items()}, lines


def test_resume_is_bitwise(tmp_path):
    run(tmp_path / "whole")
    tensors, lines = final(tmp_path / "whole")
    assert not any(name.startswith("optimizer.") and "target_" in name for name in tensors)
    for step in (1, 4, 9):
        folder = tmp_path / f"stopped-{step}"
        with pytest.raises(Stopped):
            run(folder, stop_after=step)
        run(folder, resume=True)
        again, again_lines = final(folder)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
        assert again_lines == lines


def test_wrong_uses(network):
    with pytest.raises(ValueError, match=r"at least 2 images a process .*, received 1"):
        byol.objective(network, seed=0).train()(batch_of(network, rows=1))
    with pytest.raises(ValueError, match="total_steps: expected at least 1, received 0"):
        byol.Config(total_steps=0)
    with pytest.raises(ValueError, match=r"tau: expected 0..1, received 1.5"):
        byol.Config(tau=1.5)
