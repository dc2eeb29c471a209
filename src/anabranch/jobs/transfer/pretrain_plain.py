# SPDX-License-Identifier: Apache-2.0
"""One plain model of all images: a masked autoencoder, or a ResNet by SimSiam or BYOL."""

from typing import Any

from torch import nn

from anabranch.jobs.transfer.learners import learner
from anabranch.jobs.transfer.settings import PretrainSettings
from anabranch.jobs.transfer.stages import (
    finish,
    learner_of,
    open_pool,
    open_run,
    plain_stream,
    publish,
    second_stage,
    start_model,
    train_stage,
)
from anabranch.train.signals import StopFlag


def pretrain(settings: PretrainSettings) -> dict[str, Any]:
    images = open_pool(settings)
    with StopFlag(), open_run(settings, images) as run:
        model = start_model(settings, images, run)
        seed = settings.seed if settings.base is None else second_stage(settings)
        stream = plain_stream(settings, images, model, seed)
        objective: nn.Module = learner(learner_of(settings)).objective(model, seed=settings.seed)
        summary = train_stage(settings, objective, stream, settings.steps, run, peak(settings))
        publish(run / "model", lambda folder: model.eval().save_pretrained(folder))
        finish(run, settings, images, summary)
    return summary


def peak(settings: PretrainSettings) -> float | None:
    """A masked autoencoder that goes on from a base is the control of experts, and learns at their rate."""
    if settings.method == "mae" and settings.base is not None:
        return settings.expert_learning_rate
    return settings.learning_rate
