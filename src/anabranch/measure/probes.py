# SPDX-License-Identifier: Apache-2.0
"""How useful are frozen features for a task? Two probes, few labels, several draws of them.

Paper     : linear probe, Alain and Bengio 2016 (arXiv 1610.01644); weighted kNN, Wu et al. 2018 (arXiv 1805.01978).
Equation  : logistic regression min_w sum_i CE(w z_i, y_i) + ||w||^2 / (2 C); kNN votes weighted by exp(cos / T).
Shapes    : N images, D features; z = (x - mean) / sd, both from the drawn labelled images alone.
Differs   : C = 0.1 and k = min(20, labels / classes); nothing is tuned on the test images.
Check     : separable data score 1, shuffled labels score chance (tests/measure/test_probes.py).
Exempt    : samples (labels are drawn by the place of their image)
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from anabranch.errors import UsageError

PROBES = ("linear", "knn")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    num_labels: int = 300
    """Labelled training images a draw; all of them where the task has fewer."""
    num_draws: int = 5
    regularisation: float = 0.1
    num_neighbours: int = 20
    temperature: float = 0.07

    def __post_init__(self) -> None:
        for name in ("num_labels", "num_draws", "num_neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, received {getattr(self, name)}")
        for name in ("regularisation", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number above 0, received {getattr(self, name)}")


@dataclass(frozen=True)
class Scores:
    """Accuracy in percent, mean over draws of labels."""

    accuracy: float
    """On all test images."""
    choose: float
    """On one half of them: to choose a model by."""
    report: float
    """On the other half: to report a model that was chosen."""


def probe(
    features: np.ndarray, labels: np.ndarray, is_test: np.ndarray, config: ProbeConfig, seed: int
) -> dict[str, Scores]:
    """Both probes of one task: {"linear": Scores, "knn": Scores}.

    Args:
        features: (N, D) float. labels: (N,) int. is_test: (N,) bool, the images that are only scored.
        seed: decides which labels are drawn; the same seed draws the same images for every model, so that
            differences between models are paired.
    """
    check_task(labels, is_test)
    test = np.flatnonzero(is_test)
    test = np.random.default_rng(0).permutation(test)  # for every seed the same halves, or none would be held out
    parts = {"accuracy": test, "choose": test[::2], "report": test[1::2]}
    accuracy: dict[str, dict[str, list[float]]] = {name: {part: [] for part in parts} for name in PROBES}
    for draw in range(config.num_draws):
        chosen = draw_labels(labels, ~is_test, config.num_labels, np.random.default_rng([seed, 1 + draw]))
        scaled = standardise(features, chosen)
        predicted = {
            "linear": linear_predictions(scaled, labels, chosen, test, config),
            "knn": knn_predictions(scaled, labels, chosen, test, config),
        }
        for name in PROBES:
            right = dict(zip(test.tolist(), (predicted[name] == labels[test]).tolist(), strict=True))
            for part, rows in parts.items():
                accuracy[name][part].append(100 * float(np.mean([right[row] for row in rows.tolist()])))
    return {name: Scores(**{part: float(np.mean(draws)) for part, draws in accuracy[name].items()}) for name in PROBES}


def check_task(labels: np.ndarray, is_test: np.ndarray) -> None:
    """A probe needs two classes, each with a training image, and two test images to divide."""
    classes = np.unique(labels)
    if len(classes) < 2:
        raise UsageError(
            "a task with one class measures nothing", expected="at least two classes", received=len(classes)
        )
    missing = np.setdiff1d(classes, labels[~is_test])
    if len(missing):
        raise UsageError(f"class {missing[0]} of the task has test images only", expected="training images of it too")
    if is_test.sum() < 2:
        raise UsageError("the task has too few test images", expected="at least 2", received=int(is_test.sum()))


def draw_labels(labels: np.ndarray, allowed: np.ndarray, num_labels: int, generator: np.random.Generator) -> np.ndarray:
    """Indices of `num_labels` allowed images, classes as equal as they can be, every class at least once."""
    pools = [generator.permutation(np.flatnonzero(allowed & (labels == c))) for c in np.unique(labels)]
    longest = max(len(pool) for pool in pools)
    rounds = [[pool[i] for pool in pools if i < len(pool)] for i in range(longest)]
    order = [index for members in rounds for index in generator.permutation(members)]
    return np.asarray(order[: max(num_labels, len(pools))], dtype=np.int64)


def standardise(features: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """z = (x - mean) / sd over the chosen rows; a feature that is constant there becomes zero everywhere."""
    if not np.isfinite(features).all():
        raise UsageError(
            "the features hold values that are not finite", hint="the model diverged: lower its learning rate"
        )
    sample = features[chosen].astype(np.float64)
    spread = sample.std(0)
    alive = spread > 1e-7 * np.abs(sample).max(0)
    scaled = (features - sample.mean(0)) / np.where(alive, spread, 1)
    return np.where(alive, scaled, 0.0)


def linear_predictions(
    scaled: np.ndarray, labels: np.ndarray, chosen: np.ndarray, test: np.ndarray, config: ProbeConfig
) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 300 iterations end within 0.1 points of convergence
        model = LogisticRegression(C=config.regularisation, max_iter=300).fit(scaled[chosen], labels[chosen])
    return np.asarray(model.predict(scaled[test]))


def knn_predictions(
    scaled: np.ndarray, labels: np.ndarray, chosen: np.ndarray, test: np.ndarray, config: ProbeConfig
) -> np.ndarray:
    """argmax_c sum over the k nearest of exp(cos / T) [y = c]."""
    unit = scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-12)
    classes = np.unique(labels)
    num_neighbours = min(config.num_neighbours, max(len(chosen) // len(classes), 1))
    cosine = unit[test] @ unit[chosen].T
    nearest = np.argpartition(-cosine, num_neighbours - 1, axis=1)[:, :num_neighbours]
    weight = np.exp(np.take_along_axis(cosine, nearest, 1) / config.temperature)
    votes = np.stack([(weight * (labels[chosen][nearest] == c)).sum(1) for c in classes], 1)
    return np.asarray(classes[votes.argmax(1)])


def split(labels: np.ndarray, test_share: float, seed: int) -> np.ndarray:
    """is_test for a task that came without a split: `test_share` of every class, at least one image on each side."""
    is_test = np.zeros(len(labels), dtype=bool)
    generator = np.random.default_rng([seed, 7])
    for c in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == c))
        is_test[members[: min(max(round(test_share * len(members)), 1), len(members) - 1)]] = True
    return is_test
