"""What every trained baseline is held to: its loss falls and nothing but the named weights changes."""

import torch

from anabranch.models.diffusion.family import denoiser, family, networks
from anabranch.train.loop import TrainConfig, train
from anabranch.train.touch import digest, touch_report

CAPTIONS = ["a photo of dress", "a photo of bag", "a coat", "bag", "dress", "a photo of coat"]
BATCH = 4


def latents_of(pipe, seed=0):
    """(6, c, h, w)"""
    side, channels = family(pipe).latent_size(pipe), denoiser(pipe).config.in_channels
    return torch.randn(len(CAPTIONS), channels, side, side, generator=torch.Generator().manual_seed(seed))


def digests(pipe):
    return {f"{part}.{name}": value for part, net in networks(pipe).items() for name, value in digest(net).items()}


def check_trained(pipe, training, named, steps=6, learning_rate=3e-3):
    """Train; the loss on one batch is lower afterwards, and of all networks just `named` (patterns) changed."""
    batch = training.stream.batch(10_000)
    before = digests(pipe)
    with torch.no_grad():
        first = training.objective(batch)["loss"].item()
    config = TrainConfig(steps=steps, batch_size=BATCH, learning_rate=learning_rate, weight_decay=0.0)
    result = train(training.objective, training.stream, config)
    assert result.step == steps
    with torch.no_grad():
        last = training.objective(batch)["loss"].item()
    assert last < first
    report = touch_report(before, digests(pipe), named=[f"{family(pipe).DENOISER}.{pattern}" for pattern in named])
    assert not any(network.training for network in networks(pipe).values())
    return report
