# SPDX-License-Identifier: Apache-2.0
"""From the scores of the arms to differences with intervals: paired by seed, the primary one declared beforehand."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from anabranch.jobs.transfer.measure import PRIMARY, Corpus
from anabranch.measure.intervals import Interval, interval
from anabranch.measure.probes import PROBES

PARTS = ("accuracy", "choose", "report")

Results = dict[str, dict[int, dict[str, Any]]]
"""{arm: {seed: result of run_arm}}"""

SCOPES = {"ffn": "", "blocks": ", whole blocks", "encoder": ", whole encoder", "autoencoder": ", encoder and decoder"}
"""What experts are copies of, in words."""


def arm_name(arm: str, scope: str) -> str:
    """What an arm is called in tables: experts of feed-forward networks are the method's, others say their scope."""
    return arm if scope == "ffn" else f"{arm}-{scope}"


def of_scope(scope: str) -> dict[str, tuple[str, str]]:
    """Comparisons of experts that are copies of this."""
    moce, oracle, words = arm_name("moce", scope), arm_name("oracle", scope), SCOPES[scope]
    return {
        f"right expert over wrong experts{words}": (moce, f"{moce} wrong"),
        f"clusters over random groups{words}": (moce, arm_name("random-clusters", scope)),
        f"experts of clusters over the continued model{words}": (moce, "continued"),
        f"experts of true domains over the continued model{words}": (oracle, "continued"),
    }


COMPARISONS = {
    "one model a domain over the continued model": ("separate", "continued"),
    **of_scope("ffn"),
    "experts chosen by token over the continued model": ("token-moe", "continued"),
    "a wider plain model over the continued model": ("wider", "continued"),
    "a learned gate over fixed groups": ("moce-gate", "moce"),
    **of_scope("blocks"),
    **of_scope("encoder"),
    **of_scope("autoencoder"),
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
        name = arm_name(result["arm"], result.get("scope", "ffn"))
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


def after_routing(arms: Results, tasks: list[str], experts: str = "moce") -> list[list[dict[str, Any]]]:
    """Rows: the expert that a domain's task picked; columns: tasks; accuracy minus that of the continued model."""
    rows = []
    for row in tasks:
        cells = []
        for column, task in enumerate(tasks):
            gains = [
                result["matrix"][result["picked"][row]][column] - score(arms["continued"][seed], task)
                for seed, result in arms[experts].items()
            ]
            cells.append(interval(gains).as_dict())
        rows.append(cells)
    return rows


def mean_over_seeds(arms: Results, arm: str, get: Callable[[dict[str, Any]], Any]) -> np.ndarray:
    return np.mean([np.asarray(get(result), dtype=np.float64) for result in arms[arm].values()], axis=0)
