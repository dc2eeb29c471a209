# SPDX-License-Identifier: Apache-2.0
"""A stopped stage with experts goes on bit for bit: gate, noise, clusters, optimiser and all."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from anabranch.data.images import Images, Store
from anabranch.data.streams import ShuffledIndices
from anabranch.errors import Stopped
from anabranch.models import vit_mae
from anabranch.specialize import moce
from anabranch.specialize.mae import masked_images
from anabranch.train.checkpoint import load_checkpoint
from anabranch.train.loop import TrainConfig, train
from anabranch.train.metrics import read_metrics

STEPS = 32


def run_stage(folder, base, stop_after=None, resume=False):
    """Train a fresh model with a learned, noisy gate; its state must come from the checkpoint alone."""
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 1, 28, 28), generator=g, dtype=torch.uint8)
    centroids = torch.nn.functional.normalize(torch.randn(6, 16, generator=g), dim=1)
    config = moce.Config(num_experts=3, cluster_embedding="learned", entropy_coef=0.01)
    model = moce.insert(vit_mae.copy_of(base), centroids, torch.arange(6) % 3, config, g)
    objective = moce.ClusterConditional(model, config, seed=0, batch_size=12)
    indices = ShuffledIndices(50, 12, seed=0)
    images = Images(name="noise", store=Store.of(pixels))
    stream = masked_images(images, base, indices, seed=0, augment=True, cluster=torch.arange(50) % 6)

    def on_step(step, logs):
        if step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = TrainConfig(
        steps=STEPS, batch_size=12, learning_rate=3e-3, warmup_steps=4, save_every=STEPS, log_every=1
    )
    train(objective, stream, settings, folder, resume=resume, on_step=on_step)


def final(folder):
    checkpoint = load_checkpoint(folder).checkpoint
    assert checkpoint.step == STEPS
    lines = [
        {k: v for k, v in line.items() if k != "images_per_second"} for line in read_metrics(folder / "metrics.jsonl")
    ]
    return checkpoint.model | {f"optimizer.{k}": v for k, v in checkpoint.optimizer.items()}, lines


@pytest.mark.row("R4")
def test_resume_is_bitwise_from_every_one_of_32_steps(tmp_path, counted):
    base = vit_mae.build("tiny", image_size=28, channels=1, seed=0)
    (tmp_path / "whole").mkdir()
    run_stage(tmp_path / "whole", base)
    tensors, lines = final(tmp_path / "whole")
    assert len(lines) == STEPS
    assert any("embedding" in name for name in tensors)
    assert any("bank.experts.2" in name for name in tensors)
    equal = 0
    for step in range(1, STEPS):
        folder = tmp_path / f"stopped-{step}"
        folder.mkdir()
        with pytest.raises(Stopped):
            run_stage(folder, base, stop_after=step)
        run_stage(folder, base, resume=True)
        again, again_lines = final(folder)
        equal += all(torch.equal(again[name], tensor) for name, tensor in tensors.items()) and again_lines == lines
    counted(STEPS - 1, STEPS - 1 - equal)


@pytest.mark.parametrize(
    "options",
    [["--method", "mae", "--set", "image_size=32"], ["--set", "assignment=gate"], ["--method", "token-moe"]],
    ids=["mae", "gate", "token-moe"],
)
def test_two_processes_give_the_losses_of_one(folders, tmp_path, options):
    """Stages with experts start from one given base: bases that differ in the last bit may be clustered differently."""
    arguments = ["-m", "anabranch", "pretrain", "--images", str(folders / "pool"), "--steps", "12", "--experts", "2"]
    arguments += ["--clusters", "4", "--set", "batch_size=16", "--set", "save_every=6", *options]
    if "mae" not in options:
        vit_mae.build("tiny", image_size=32, channels=3, seed=0).save_pretrained(tmp_path / "base")
        arguments += ["--base", str(tmp_path / "base")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for command, out in (([sys.executable], "one"), (launch, "two")):
        done = subprocess.run(
            [*command, *arguments, "--out", str(tmp_path / out)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (read_metrics(tmp_path / out / "metrics.jsonl") for out in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for line, other in zip(one, two, strict=True):
        # sums in another order, and Adam's first steps, which divide by nearly nothing, make 2e-5 of 1e-7
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-4)
    assert (tmp_path / "two" / "report.html").exists()
