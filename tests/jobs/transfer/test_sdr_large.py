# SPDX-License-Identifier: Apache-2.0
"""As many sub-nets as the paper has: 256 in one super-net, trained for one turn each, taken out and compared."""

import resource
import sys

import pytest
import torch

from anabranch.data.images import open_images
from anabranch.jobs.transfer.pretrain import pretrain
from anabranch.jobs.transfer.pretrain_sdr import load_subnets
from anabranch.jobs.transfer.settings import PretrainSettings
from anabranch.models import resnet

pytestmark = pytest.mark.slow

DOMAINS = ("digits", "garments", "textures", "animals")
ROUND = 160
"""Steps in which each of 256 paths has its turn: 256 turns, and 64 of the model of all images, two a step. Each phase
has two rounds: a path whose only turn is the last step of a phase learns at a rate of nearly nothing there."""
PHASES, BASE_STEPS = 4, 6
LIMIT = 24 * 2**30


def peak_memory():
    """Bytes that this process has held at once; the system counts in KiB, or on a Mac in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_256_subnets_are_trained_and_each_taken_out_equals_its_path(tmp_path, generator):
    steps = PHASES * 2 * ROUND + BASE_STEPS
    settings = PretrainSettings(
        images=tuple(f"patchwork:{name}" for name in DOMAINS),
        method="sdr",
        preset="narrow",
        groups=4,
        split_stages=PHASES,
        clusters="256",
        steps=steps,
        base_share=BASE_STEPS / steps,
        batch_size=16,
        out=tmp_path / "run",
    )
    summary = pretrain(settings)  # raises where a tensor is as before
    assert len(summary["paths"]) == 256
    assert sorted(summary["path_of_cluster"]) == list(range(256))
    assert min(summary["account"]["steps_touching_path"]) > BASE_STEPS + PHASES - 1
    net, _ = load_subnets(tmp_path / "run")
    pixels = resnet.normalise(open_images("patchwork:digits").store.read(torch.arange(4)))
    pixels = pixels.expand(-1, net.backbone.config.num_channels, -1, -1)
    found = []
    with torch.no_grad():
        for row in torch.randperm(256, generator=generator)[:16].tolist():
            found.append(resnet.features(net.extract(row), pixels))
            assert torch.equal(found[-1], net.activate(row)(pixels))
    assert len({tuple(features.flatten().tolist()) for features in found}) == 16
    assert peak_memory() < LIMIT
