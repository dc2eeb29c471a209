# SPDX-License-Identifier: Apache-2.0
"""Slots that `anabranch experts generate --skip` passes over, by thresholds from the caller's own texts.

with skipping("naee", model, texts) as skipped:
    ...
skipped.share()
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from anabranch.errors import UsageError, did_you_mean
from anabranch.jobs.experts.texts import Windows, batches_of
from anabranch.models.mixtures.layers import open_layers
from anabranch.reuse.skip import modes, naee
from anabranch.reuse.skip.slots import Skipped

RULES = ("naee", "modes")


@contextmanager
def skipping(rule: str, model: Any, texts: Sequence[Windows], share: float = 0.25) -> Iterator[Skipped]:
    """Around forward passes.

    naee    the second of two experts, where the first has far more of the weight: about half of the second slots
    modes   slots of any number, by what their layer matters: at least `share` of them on these texts
    """
    check(rule, share)
    layers, batches = open_layers(model), batches_of(texts, ())
    if rule == "naee":
        with naee.skipping(layers, naee.calibrate(model, batches)) as skipped:
            yield skipped
    else:
        alpha = modes.layer_weights(model, batches)
        found = modes.search(model, batches, alpha, share, keep_sum=True)
        with modes.skipping(layers, alpha, found.taus, keep_sum=True) as skipped:
            yield skipped


def check(rule: str, share: float) -> None:
    if rule not in RULES:
        raise UsageError(f"there is no rule {rule!r} for skipping", hint=did_you_mean(rule, RULES))
    if not 0 < share < 1:
        raise UsageError("skip_share cannot be used", expected="above 0 and below 1", received=share)
