# SPDX-License-Identifier: Apache-2.0
"""What commands that change a mixture share: losses by label before and after, and the checkpoint they hand over."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from anabranch.errors import UsageError
from anabranch.jobs.experts.texts import Windows, losses_of
from anabranch.measure.experts.statistics import ExpertStats
from anabranch.measure.intervals import Interval, interval
from anabranch.models.language.folder import hushed
from anabranch.models.mixtures.fingerprint import fingerprint
from anabranch.report.text import estimate
from anabranch.train.publish import publish_folder

RESULT = "experts.json"
Losses = dict[str, Tensor]
"""By label, (W,) nats a token of each window."""


def losses_by_label(model: Any, texts: Sequence[Windows]) -> Losses:
    return {windows.label: losses_of(model, windows) for windows in texts}


Changed = dict[str, float | None]
"""before, after, change, low, high in nats a token; None where one window or draw has no interval."""


def change(before: Tensor, after: Tensor) -> Changed:
    """Nats a token, after minus before, paired by window, with its 95 % interval."""
    found = interval((after - before).numpy())
    return told_of(float(before.mean()), found)


def told_of(before: float, found: Interval) -> Changed:
    ends = found.as_dict()  # JSON has no NaN
    return {
        "before": before, "after": before + found.mean, "change": found.mean, "low": ends["low"], "high": ends["high"]
    }  # fmt: skip


def check_controls(number: int) -> None:
    if number < 0:
        raise UsageError("controls cannot be fewer than none", expected="--set controls=0 or more", received=number)


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


def write_checkpoint(model: Any, tokenizer: Any, folder: Path, told: Mapping[str, Any], card: str) -> None:
    """A stock folder, as transformers writes it, a card, and what was done in experts.json."""

    def write(unfinished: Path) -> None:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        (unfinished / RESULT).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    with hushed():
        publish_folder(write, folder)


def tell_losses(rows: Mapping[str, Mapping[str, Changed]], before: Losses) -> None:
    """A row an arm, a column a label: the change in nats a token."""
    labels = list(before)
    width = max(len(name) for name in ("as it is", *rows))
    print(
        f"nats a token: as it is, then the change [95 %]\n\n{'':<{width}}" + "".join(f"{name:>24}" for name in labels)
    )
    print(f"{'as it is':<{width}}" + "".join(f"{float(before[name].mean()):>24.3f}" for name in labels))
    for arm, found in rows.items():
        ends = [[found[name][end] for end in ("change", "low", "high")] for name in labels]
        cells = [estimate(*own, digits=3) for own in ends]
        print(f"{arm:<{width}}" + "".join(f"{cell:>24}" for cell in cells))


def averaged(found: Sequence[Mapping[str, Changed]]) -> dict[str, Changed]:
    """Several draws of one arm: the mean of each number, the interval over the draws."""
    return {
        label: told_of(one["before"] or 0.0, interval([draw[label]["change"] or 0.0 for draw in found]))
        for label, one in found[0].items()
    }
