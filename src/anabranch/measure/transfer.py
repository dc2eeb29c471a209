# SPDX-License-Identifier: Apache-2.0
"""The transfer matrix: what one shared model costs each task, against models that learned from one source.

Paper     : the split experiments of Liu et al. 2022 (arXiv 2205.13267) and 2023 (arXiv 2402.05382), generalised.
Equation  : E = 100 - accuracy;  NTG(t) = E[t, all] - E[t, best],  best chosen on other test images;
            gap_own(t) = E[t, all] - E[t, own(t)];  specificity(t) = mean over others of E[t, i] - E[t, own(t)];
            harm(t, i) = E[t, all] - E[t, all without i].
Shapes    : arrays are (seeds, models, tasks) in percent; the models are the sources and then "all".
Differs   : NTG picks its source on one half of the test images and reports on the other: a minimum over noisy numbers
            reported on the numbers that chose it would be optimistic.
Check     : hand-made matrices with known verdicts (tests/measure/test_transfer.py).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.measure.intervals import Interval, interval

SHARED = "all"


@dataclass(frozen=True, kw_only=True)
class TransferScores:
    """Accuracy in percent of every model on every task, for each seed.

    `accuracy` (all test images), `choose` and `report` (one half and the other) have shape (seeds, sources + 1, tasks);
    the last model is the shared one. `without` has shape (seeds, sources, tasks), the accuracy of the shared model
    trained without that source, or is None when it was not asked for.
    """

    sources: tuple[str, ...]
    tasks: tuple[str, ...]
    own: tuple[int, ...]
    """For each task the source that matches it."""
    accuracy: np.ndarray
    choose: np.ndarray
    report: np.ndarray
    without: np.ndarray | None = None

    def __post_init__(self) -> None:
        expected = (len(self.accuracy), len(self.sources) + 1, len(self.tasks))
        for name in ("accuracy", "choose", "report"):
            if getattr(self, name).shape != expected:
                raise ValueError(f"{name}: expected shape {expected}, received {getattr(self, name).shape}")
            if not np.isfinite(getattr(self, name)).all():  # the best of several would be the one without a number
                raise ValueError(f"{name}: expected an accuracy for every model and task, received NaN or infinity")


def gap_own(scores: TransferScores, task: int) -> np.ndarray:
    """E[t, all] - E[t, own(t)] for each seed: above zero, the task would have been better off alone."""
    return np.asarray(scores.accuracy[:, scores.own[task], task] - scores.accuracy[:, -1, task])


def specificity(scores: TransferScores, task: int) -> np.ndarray:
    """mean over the other sources of E[t, i] - E[t, own(t)] for each seed: does the matching source win, or any?"""
    own = scores.own[task]
    others = [i for i in range(len(scores.sources)) if i != own]
    return np.asarray(scores.accuracy[:, own, task] - scores.accuracy[:, others, task].mean(1))


def best_source(scores: TransferScores, task: int) -> int:
    """argmin_i E[t, i] on one half of the test images."""
    return int(scores.choose[:, :-1, task].mean(0).argmax())


def negative_transfer_gap(scores: TransferScores, task: int) -> np.ndarray:
    """NTG(t) = E[t, all] - E[t, best] for each seed, on the other half."""
    return np.asarray(scores.report[:, best_source(scores, task), task] - scores.report[:, -1, task])


def harm(scores: TransferScores, task: int, source: int) -> np.ndarray:
    """E[t, all] - E[t, all without i] for each seed: above zero, the source hurts the task."""
    if scores.without is None:
        raise ValueError("without: expected the scores of the leave-one-out models, received None")
    return np.asarray(scores.without[:, source, task] - scores.accuracy[:, -1, task])


def verdict(gap: Interval, specific: Interval) -> tuple[str, str]:
    """(verdict, cause) of one task, in the words of the report."""
    if gap.verdict == "positive" and specific.verdict == "positive":
        return "hurt by sharing", "semantic"
    if gap.verdict == "positive":
        return "hurt by sharing", "under-trained" if specific.high < gap.mean / 2 else "open"
    if gap.verdict == "negative":
        return "helped by sharing", "none"
    return "cannot tell at this budget", "none"


def sentence(task: str, own: str, gap: Interval, specific: Interval) -> str:
    """One sentence a person can act on."""
    word, cause = verdict(gap, specific)
    if cause == "semantic":
        why = f"its own source beats the other sources by {specific}: the cause looks semantic, give it an expert"
    elif cause == "under-trained":
        why = f"but {own} is no better than other sources ({specific}): the cause looks under-trained, train longer"
    elif cause == "open":
        why = f"whether its own source beats the others cannot be told ({specific}): more seeds"
    elif word.startswith("helped"):
        why = "keep it in the mixture"
    elif specific.verdict == "positive":
        why = f"the matching source matters ({specific}); whether the mixture keeps up with it cannot be told"
    else:
        why = "more seeds or more steps would tell"
    return f"{task}: {word}, {gap} points from own source to mixture; {why}."


def summarise(scores: TransferScores) -> dict[str, Any]:
    """Everything the report and transfer.json say about the scores; intervals are over seeds, paired."""
    tasks = []
    for t, name in enumerate(scores.tasks):
        gap, specific = interval(gap_own(scores, t)), interval(specificity(scores, t))
        word, cause = verdict(gap, specific)
        tasks.append(
            {
                "task": name,
                "own": scores.sources[scores.own[t]],
                "best": scores.sources[best_source(scores, t)],
                "ntg": interval(negative_transfer_gap(scores, t)).as_dict(),
                "gap_own": gap.as_dict(),
                "specificity": specific.as_dict(),
                "verdict": word,
                "cause": cause,
                "sentence": sentence(name, scores.sources[scores.own[t]], gap, specific),
            }
        )
    everywhere = range(len(scores.tasks))
    hurt = [task["verdict"] == "hurt by sharing" for task in tasks]
    ntg_above = [interval(negative_transfer_gap(scores, t)).verdict == "positive" for t in everywhere]
    return {
        "tasks": tasks,
        "mean_gap_own": interval(np.mean([gap_own(scores, t) for t in everywhere], axis=0)).as_dict(),
        "mean_specificity": interval(np.mean([specificity(scores, t) for t in everywhere], axis=0)).as_dict(),
        "share_hurt": sum(hurt) / len(hurt),
        "negative_transfer_rate": sum(ntg_above) / len(ntg_above),
        "matrix": matrix(scores),
        "harm": None if scores.without is None else harm_table(scores),
    }


def matrix(scores: TransferScores) -> dict[str, Any]:
    """Rows learned from, columns wanted: accuracy, and its difference to the shared model with an interval."""
    rows = (*scores.sources, SHARED)
    cells = [[interval(scores.accuracy[:, i, t]).as_dict() for t in range(len(scores.tasks))] for i in range(len(rows))]
    to_shared = [
        [interval(scores.accuracy[:, i, t] - scores.accuracy[:, -1, t]).as_dict() for t in range(len(scores.tasks))]
        for i in range(len(scores.sources))
    ]
    return {"rows": list(rows), "columns": list(scores.tasks), "accuracy": cells, "minus_shared": to_shared}


def harm_table(scores: TransferScores) -> list[list[dict[str, float | int | None]]]:
    return [
        [interval(harm(scores, t, i)).as_dict() for t in range(len(scores.tasks))] for i in range(len(scores.sources))
    ]
