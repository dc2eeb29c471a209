# SPDX-License-Identifier: Apache-2.0
"""Learn from folders of images: one story a method, all with the same folder at their end.

RUN/base        the plain model that experts or sub-nets start from, a transformers folder
RUN/clusters    centroids, labels and health of the clustering
RUN/checkpoints, metrics.jsonl   of the stage named by --method (a base trained here has its own in RUN/base-training)
RUN/model       what was learned; a transformers folder where the method is a plain model
RUN/summary.json, report.html    what a person reads
"""

from importlib import import_module
from typing import Any

from anabranch.errors import UsageError, did_you_mean
from anabranch.jobs.progress import say
from anabranch.jobs.transfer.checks import check_settings, check_summary
from anabranch.jobs.transfer.settings import PretrainSettings

STORIES = {
    "moce": "pretrain_experts",
    "token-moe": "pretrain_experts",
    "mae": "pretrain_plain",
    "simsiam": "pretrain_plain",
    "byol": "pretrain_plain",
    "sdr": "pretrain_sdr",
}
"""The module of this folder whose `pretrain(settings)` trains, writes the run and returns what summary.json holds."""


def pretrain(settings: PretrainSettings) -> dict[str, Any]:
    """Run all stages, those that are finished are skipped on resume; returns what summary.json holds."""
    if settings.method not in STORIES:
        raise UsageError(f"there is no method {settings.method!r}", hint=did_you_mean(settings.method, STORIES))
    check_settings(settings)
    story = import_module(f"anabranch.jobs.transfer.{STORIES[settings.method]}")
    summary: dict[str, Any] = story.pretrain(settings)
    check_summary(summary)
    say(f"\nrun   {settings.out}\npage  {settings.out / 'report.html'}")
    return summary
