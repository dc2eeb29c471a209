# SPDX-License-Identifier: Apache-2.0
import math
import os
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch import registry
from anabranch.data.images import Images, Store, open_images
from anabranch.data.streams import ShuffledIndices
from anabranch.data.views import Views
from anabranch.errors import Stopped, UsageError
from anabranch.models import resnet
from anabranch.specialize import simsiam
from anabranch.train.checkpoint import load_checkpoint
from anabranch.train.loop import TrainConfig, local_rows, train
from anabranch.train.metrics import read_metrics


@pytest.fixture
def network():
    return resnet.build("tiny", image_size=28, channels=1, seed=0)


def noise_images(channels=1, size=28):
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, channels, size, size), generator=g, dtype=torch.uint8)
    return Images(name="photos", store=Store.of(pixels))


def batch_of(network, *, rows=8, num_small=0, step=0):
    views = Views(num_small=num_small)
    return simsiam.stream(noise_images(), network, ShuffledIndices(40, rows, 0), seed=0, views=views).batch(step)


def slow_cosine(a, b):
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    lengths = [math.sqrt(sum(float(x) ** 2 for x in v)) for v in (a, b)]
    return dot / (lengths[0] * lengths[1])


def slow_loss(predictions, targets):
    """Straight loops over the definition."""
    terms = []
    for a, p in enumerate(predictions):
        for b, z in enumerate(targets):
            if a != b:
                terms.append(-sum(slow_cosine(p[i], z[i]) for i in range(len(p))) / len(p))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("num_small", [0, 2])
def test_loss_by_slow_loops(network, num_small):
    objective = simsiam.objective(network, seed=0).eval()
    batch = batch_of(network, num_small=num_small)
    with torch.no_grad():
        loss = objective(batch)["loss"].item()
        projected = [
            objective.projector(resnet.features(network, resnet.normalise(batch[f"view{i}"])))
            for i in range(1, 3 + num_small)
        ]
        predictions = [objective.predictor(z) for z in projected]
    assert loss == pytest.approx(slow_loss(predictions, projected[:2]), abs=1e-5)
    if not num_small:  # the paper's form
        first, second = (simsiam.negative_cosine(predictions[a], projected[1 - a]) for a in (0, 1))
        assert loss == pytest.approx((first / 2 + second / 2).item(), abs=1e-6)


def test_no_gradient_goes_through_the_target():
    prediction, target = (torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    prediction.requires_grad_()
    target.requires_grad_()
    simsiam.negative_cosine(prediction, target).backward()
    assert prediction.grad.abs().sum() > 0
    assert target.grad is None


def test_gradient_is_that_of_fixed_targets(network):
    """The gradient of the whole equals the one where z was computed beforehand and held."""
    objective = simsiam.objective(network, seed=0).eval()  # in training the statistics would move between the two
    batch = batch_of(network)
    objective(batch)["loss"].backward()
    whole = {name: p.grad.clone() for name, p in objective.named_parameters()}
    objective.zero_grad(set_to_none=True)
    views = [resnet.normalise(batch[name]) for name in ("view1", "view2")]
    with torch.no_grad():
        fixed = [objective.projector(resnet.features(network, view)) for view in views]
    predictions = [objective.predictor(objective.projector(resnet.features(network, view))) for view in views]
    terms = [-torch.cosine_similarity(predictions[a], fixed[1 - a], dim=1).mean() / 2 for a in (0, 1)]
    sum(terms).backward()
    assert all(whole[name].abs().sum() > 0 for name in whole)
    for name, p in objective.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], atol=1e-6, rtol=1e-4)


def test_spread_of_constants_noise_and_opposites():
    assert simsiam.spread(torch.full((50, 16), 3.0)).item() == pytest.approx(0, abs=1e-5)
    gaussian = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert simsiam.spread(gaussian).item() == pytest.approx(1, abs=0.01)
    opposite = torch.ones(10, 16) * torch.tensor([1.0, -1.0]).repeat(5)[:, None]
    assert simsiam.spread(opposite).item() == pytest.approx(1)  # one dimension, 16 times: not seen, as the card says


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(2, 12), size=st.integers(1, 8), scale=st.floats(0.01, 100), seed=st.integers(0, 2**31 - 1))
def test_distance_and_spread_ignore_length_and_keep_their_range(rows, size, scale, seed):
    g = torch.Generator().manual_seed(seed)
    p, z = torch.randn(rows, size, generator=g), torch.randn(rows, size, generator=g)
    distance, spread = simsiam.negative_cosine(p, z).item(), simsiam.spread(z).item()
    assert -1 - 1e-5 <= distance <= 1 + 1e-5
    assert 0 <= spread <= 1 + 1e-5
    assert simsiam.negative_cosine(p * scale, z / scale).item() == pytest.approx(distance, abs=1e-4)
    assert simsiam.spread(z * scale).item() == pytest.approx(spread, abs=1e-4)
    assert simsiam.negative_cosine(z, z).item() == pytest.approx(-1, abs=1e-4)


def test_heads_have_the_shapes_of_the_paper_and_depend_on_the_seed_alone(network):
    before = torch.random.get_rng_state()
    one, same, other = (simsiam.objective(network, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    assert not torch.equal(one.predictor[0].weight, other.predictor[0].weight)
    shapes = [tuple(m.weight.shape) for m in (*one.projector, *one.predictor) if isinstance(m, torch.nn.Linear)]
    assert shapes == [(256, 128), (256, 256), (64, 256), (256, 64)]
    assert one.projector[-1].weight is None
    assert one.model is network


def test_a_batch_is_a_function_of_seed_and_step(network):
    def made(seed, step, **options):
        indices = ShuffledIndices(40, 8, seed)
        return simsiam.stream(noise_images(), network, indices, seed=seed, cluster=torch.arange(40), **options).batch(
            step
        )

    one, same, later, other = made(0, 5), made(0, 5), made(0, 6), made(1, 5)
    assert set(one) == {"view1", "view2", "row", "step", "cluster"}
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["view1"], later["view1"])
    assert not torch.equal(one["view1"], other["view1"])
    assert not torch.equal(one["view1"], one["view2"])
    flipped = made(0, 5, augment=True)
    assert not torch.equal(flipped["view1"], one["view1"])
    halves = [local_rows(made(0, 5), 8, rank, 2) for rank in (0, 1)]  # what two processes take
    assert all(torch.equal(torch.cat([half[name] for half in halves]), one[name]) for name in one)


def test_training_lowers_the_loss_without_collapse(network):
    images = open_images("patchwork:digits").unlabelled()
    objective = simsiam.objective(network, seed=0)
    stream = simsiam.stream(images, network, ShuffledIndices(len(images), 32, 0), seed=0)
    spreads = []
    config = TrainConfig(steps=60, batch_size=32, learning_rate=3e-3, warmup_steps=5)
    losses = train(objective, stream, config, on_step=lambda step, logs: spreads.append(logs["spread"])).losses
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.2
    assert min(spreads) > 0.5


def run(folder, stop_after=None, resume=False):
    network = resnet.build("tiny", image_size=28, channels=1, seed=0)
    objective = simsiam.objective(network, seed=0)
    stream = simsiam.stream(noise_images(), network, ShuffledIndices(40, 8, 0), seed=0)

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
    assert [line["step"] for line in lines] == list(range(1, 11))
    for step in (1, 4, 9):
        folder = tmp_path / f"stopped-{step}"
        with pytest.raises(Stopped):
            run(folder, stop_after=step)
        run(folder, resume=True)
        again, again_lines = final(folder)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
        assert again_lines == lines


def test_evaluation_changes_nothing_and_takes_one_image(network):
    objective = simsiam.objective(network, seed=0).eval()
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    with torch.no_grad():
        assert objective(batch_of(network, rows=1))["loss"].isfinite()
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items())


def test_wrong_uses(network):
    with pytest.raises(ValueError, match=r"at least 2 images a process .*, received 1"):
        simsiam.objective(network, seed=0).train()(batch_of(network, rows=1))
    with pytest.raises(ValueError, match="expected view1 and view2, received view1"):
        simsiam.objective(network, seed=0)({"view1": torch.zeros(2, 1, 28, 28)})
    with pytest.raises(ValueError, match="predictor_hidden_size: expected at least 1, received 0"):
        simsiam.Config(predictor_hidden_size=0)
    with pytest.raises(UsageError, match="photos does not fit the model"):
        simsiam.stream(noise_images(channels=3), network, ShuffledIndices(40, 8, 0), seed=0)
    with pytest.raises(UsageError, match="28 pixels a side"):
        simsiam.stream(noise_images(size=32), network, ShuffledIndices(40, 8, 0), seed=0)


@pytest.mark.parametrize("key", ["specialize/simsiam", "specialize/byol"])
def test_both_offer_what_a_learner_offers(key, network):
    learner = registry.get(key)
    assert learner.FAMILY == "resnet"
    batch = learner.stream(noise_images(), network, ShuffledIndices(40, 8, 0), seed=0, domain=torch.arange(40)).batch(0)
    assert "domain" in batch
    out = learner.objective(network, seed=0)(batch)
    assert {name: tensor.shape for name, tensor in out.items()} == {"loss": (), "spread": ()}
    assert out["loss"].requires_grad
    assert not out["spread"].requires_grad
