# SPDX-License-Identifier: Apache-2.0
"""What commands that change a mixture share: losses by label before and after, and the checkpoint they hand over."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from anabranch.errors import UsageError
from anabranch.jobs.experts_texts import Windows, losses_of
from anabranch.measure.experts.statistics import ExpertStats
from anabranch.measure.intervals import Interval, interval
from anabranch.models.language.folder import hushed
from anabranch.models.mixtures.fingerprint import fingerprint
from anabranch.train.publish import publish_folder

RESULT = "experts.json"
Losses = dict[str, Tensor]
"""By label, (W,) nats a token of each window."""


def losses_by_label(model: Any, texts: Sequence[Windows]) -> Losses:
    return {windows.label: losses_of(model, windows) for windows in texts}


def change(before: Tensor, after: Tensor) -> dict[str, float]:
    """Nats a token, after minus before, paired by window, with its 95 % interval."""
    found = interval((after - before).numpy())
    return told_of(float(before.mean()), found)


def told_of(before: float, found: Interval) -> dict[str, float]:
    return {
        "before": before, "after": before + found.mean, "change": found.mean, "low": found.low, "high": found.high
    }  # fmt: skip


def own_stats(file: Path, model: Any) -> ExpertStats:
    """Statistics that were made on this very model.

    Raises:
        UsageError: of another model.
    """
    stats, own = ExpertStats.load(file), fingerprint(model)
    if stats.model != own:
        raise UsageError(
            f"{file} was made on another model", expected=own, received=stats.model,
            hint="anabranch experts profile on this one",
        )  # fmt: skip
    return stats


def write_checkpoint(model: Any, tokenizer: Any, folder: Path, told: Mapping[str, Any]) -> None:
    """A stock folder, as transformers writes it, and what was done in experts.json."""

    def write(unfinished: Path) -> None:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / RESULT).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    with hushed():
        publish_folder(write, folder)


def tell_losses(rows: Mapping[str, Mapping[str, Mapping[str, float]]], before: Losses) -> None:
    """A row an arm, a column a label: the change in nats a token."""
    labels = list(before)
    width = max(len(name) for name in ("as it is", *rows))
    print(
        f"nats a token: as it is, then the change [95 %]\n\n{'':<{width}}" + "".join(f"{name:>24}" for name in labels)
    )
    print(f"{'as it is':<{width}}" + "".join(f"{float(before[name].mean()):>24.3f}" for name in labels))
    for arm, found in rows.items():
        cells = [f"{found[n]['change']:+.3f} [{found[n]['low']:+.3f}, {found[n]['high']:+.3f}]" for n in labels]
        print(f"{arm:<{width}}" + "".join(f"{cell:>24}" for cell in cells))


def averaged(found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Several draws of one arm: the mean of each number, the interval over the draws."""
    return {
        label: told_of(found[0][label]["before"], interval([one[label]["change"] for one in found]))
        for label in found[0]
    }
