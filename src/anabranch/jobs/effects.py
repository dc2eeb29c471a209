# SPDX-License-Identifier: Apache-2.0
"""From the scores of the arms to differences with intervals: paired by seed, the primary one declared beforehand."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from anabranch.jobs.measure import PRIMARY, Corpus
from anabranch.measure.intervals import Interval, interval
from anabranch.measure.probes import PROBES

PARTS = ("accuracy", "choose", "report")

Results = dict[str, dict[int, dict[str, Any]]]
"""{arm: {seed: result of run_arm}}"""

COMPARISONS = {
    "right expert over wrong experts": ("moce", "moce wrong"),
    "clusters over random groups": ("moce", "random-clusters"),
    "experts of clusters over the continued model": ("moce", "continued"),
    "experts of true domains over the continued model": ("oracle", "continued"),
    "one model a domain over the continued model": ("separate", "continued"),
    "experts chosen by token over the continued model": ("token-moe", "continued"),
    "a wider plain model over the continued model": ("wider", "continued"),
    "a learned gate over fixed groups": ("moce-gate", "moce"),
    "right expert over wrong experts, whole encoder": ("moce-encoder", "moce-encoder wrong"),
    "clusters over random groups, whole encoder": ("moce-encoder", "random-clusters-encoder"),
    "experts of clusters, whole blocks, over the continued model": ("moce-blocks", "continued"),
    "experts of clusters, whole encoder, over the continued model": ("moce-encoder", "continued"),
    "experts of true domains, whole blocks, over the continued model": ("oracle-blocks", "continued"),
    "experts of true domains, whole encoder, over the continued model": ("oracle-encoder", "continued"),
}
"""Name of a difference: arm minus arm. `X wrong` is arm X with the experts that a task did not choose."""


def picked_scores(corpus: Corpus, scores: list[dict[str, Any]], picked: dict[str, int]) -> dict[str, Any]:
    """Every task's score with the model it picked, the mean of the models it did not pick, and all of them."""
    right = {name: scores[mine][name] for name, mine in picked.items()}
    wrong = {}
    for task in corpus.tasks if len(scores) > 1 else ():  # a gate may have sent everything one way
        others = [i for i in range(len(scores)) if i != picked[task.name]]
        wrong[task.name] = mean_scores(corpus, scores, others)[task.name]
    matrix = [[score[task.name][PRIMARY]["accuracy"] for task in corpus.tasks] for score in scores]
    return {"scores": right, "picked": picked, "matrix": matrix, **({"wrong": wrong} if wrong else {})}


def mean_scores(corpus: Corpus, scores: list[dict[str, Any]], models: Iterable[int]) -> dict[str, Any]:
    """Every task's mean score over some of the models."""
    chosen = [scores[i] for i in models]
    return {
        task.name: {
            name: {part: float(np.mean([score[task.name][name][part] for score in chosen])) for part in PARTS}
            for name in PROBES
        }
        for task in corpus.tasks
    }


def by_arm(results: dict[str, Any]) -> Results:
    """{cell key: result} -> {arm: {seed: result}}, wrong choices as arms of their own."""
    arms: Results = {}
    for result in results.values():
        scope = result.get("scope", "ffn")
        name = result["arm"] if scope == "ffn" else f"{result['arm']}-{scope}"
        arms.setdefault(name, {})[result["seed"]] = result
        if "wrong" in result:
            arms.setdefault(f"{name} wrong", {})[result["seed"]] = {"scores": result["wrong"]}
    return arms


def score(result: dict[str, Any], task: str, probe: str = PRIMARY) -> float:
    return float(result["scores"][task][probe]["accuracy"])


def difference(arms: Results, left: str, right: str, tasks: list[str], probe: str = PRIMARY) -> Interval:
    """Mean over tasks of left minus right, paired by seed."""
    seeds = sorted(arms[left].keys() & arms[right].keys())
    return interval(
        [np.mean([score(arms[left][s], t, probe) - score(arms[right][s], t, probe) for t in tasks]) for s in seeds]
    )


def verdict(found: Interval) -> str:
    return {"positive": "shown", "negative": "hurts", "open": "not shown"}[found.verdict]


def effects(
    arms: Results,
    tasks: list[str],
    probe: str = PRIMARY,
    comparisons: Mapping[str, tuple[str, str]] = COMPARISONS,
) -> list[dict[str, Any]]:
    """All comparisons whose arms were run, over all tasks and for each."""
    made = []
    for name, (left, right) in comparisons.items():
        if left not in arms or right not in arms:
            continue
        found = difference(arms, left, right, tasks, probe)
        each = {task: difference(arms, left, right, [task], probe).as_dict() for task in tasks}
        made.append(
            {"name": name, "left": left, "right": right, "verdict": verdict(found), "tasks": each, **found.as_dict()}
        )
    return made


def level(arms: Results, arm: str, tasks: list[str], probe: str = PRIMARY) -> Interval:
    """Mean accuracy of an arm over tasks, with its interval over seeds."""
    return interval([np.mean([score(result, t, probe) for t in tasks]) for result in arms[arm].values()])


def arm_seconds(arms: Results) -> dict[str, float]:
    """Time of each arm, mean over seeds."""
    timed = {name: [r["seconds"] for r in runs.values() if "seconds" in r] for name, runs in arms.items()}
    return {name: float(np.mean(seconds)) for name, seconds in timed.items() if seconds}


def after_routing(arms: Results, tasks: list[str]) -> list[list[dict[str, Any]]]:
    """Rows: the expert that a domain's task picked; columns: tasks; accuracy minus that of the continued model."""
    rows = []
    for row in tasks:
        cells = []
        for column, task in enumerate(tasks):
            gains = [
                result["matrix"][result["picked"][row]][column] - score(arms["continued"][seed], task)
                for seed, result in arms["moce"].items()
            ]
            cells.append(interval(gains).as_dict())
        rows.append(cells)
    return rows


def mean_over_seeds(arms: Results, arm: str, get: Callable[[dict[str, Any]], Any]) -> np.ndarray:
    return np.mean([np.asarray(get(result), dtype=np.float64) for result in arms[arm].values()], axis=0)
