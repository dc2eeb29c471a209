# SPDX-License-Identifier: Apache-2.0
"""One label against the others together: what rankings by difference start from.

Shapes    : L layers, N experts.
"""

from collections.abc import Sequence

from torch import Tensor

from anabranch.errors import UsageError
from anabranch.measure.experts.statistics import ExpertStats


def pooled(stats: ExpertStats, name: str, labels: Sequence[str]) -> Tensor:
    """(L, N): the sum over all tokens of these labels."""
    first, *rest = labels
    total = stats.of(name, first)
    for label in rest:
        total = total + stats.of(name, label)
    return total


def num_tokens(stats: ExpertStats, labels: Sequence[str]) -> float:
    return sum(stats.num_tokens(label) for label in labels)


def num_documents(stats: ExpertStats, labels: Sequence[str]) -> float:
    return sum(stats.num_documents(label) for label in labels)


def check_contrast(stats: ExpertStats, target: str, others: Sequence[str]) -> None:
    """Raises UsageError where there is nothing to set the target against."""
    if not others or target in others or len(set(others)) < len(others):
        raise UsageError(
            f"{target!r} is ranked against other labels", expected="at least one, each once, without the target itself",
            received=list(others), hint=f"of {', '.join(label for label in stats.labels if label != target)}",
        )  # fmt: skip
    for side in ([target], others):
        if num_tokens(stats, side) == 0:
            raise UsageError("the statistics saw no token", expected=f"tokens of {', '.join(side)}", received="none")
