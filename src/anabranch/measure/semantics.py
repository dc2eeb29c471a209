# SPDX-License-Identifier: Apache-2.0
"""What does a router look at: what an image shows, or how bright its patches are?

Paper     : the comparison of token gates with cluster gates in Liu et al. 2023 (arXiv 2402.05382).
Equation  : NMI(a, b) = I(a; b) / mean(H(a), H(b));  R^2 of the linear regression of the router's logits on
            (mean, sd) of the patch a token came from, variance-weighted over experts.
Shapes    : expert (images,) the expert most of an image's tokens chose; logits (T, E); patches (T, 2).
Differs   : nothing.
Check     : a router that copies the cluster has NMI 1, one that thresholds brightness has R^2 near 1
            (tests/measure/test_semantics.py).
"""

import numpy as np
from sklearn.linear_model import LinearRegression
from sklearn.metrics import normalized_mutual_info_score, r2_score


def majority_expert(selected: np.ndarray) -> np.ndarray:
    """(images, tokens) of expert ids -> (images,), the most frequent; ties go to the smaller id."""
    counts = np.stack([(selected == e).sum(1) for e in range(int(selected.max()) + 1)], 1)
    return np.asarray(counts.argmax(1))


def routing_semantics(selected: np.ndarray, clusters: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """NMI of the majority expert with cluster and label, and how undivided images are between experts."""
    expert = majority_expert(selected)
    return {
        "nmi_cluster": float(normalized_mutual_info_score(clusters, expert)),
        "nmi_label": float(normalized_mutual_info_score(labels, expert)),
        "token_agreement": float((selected == expert[:, None]).mean()),
    }


def pixel_routing(logits: np.ndarray, patch_mean: np.ndarray, patch_std: np.ndarray) -> float:
    """R^2 in [0, 1] of the logits on the patch's mean and standard deviation."""
    look = np.stack([patch_mean, patch_std], 1).astype(np.float64)
    logits = logits.astype(np.float64)
    spread = logits.var(0)
    if not (spread > 1e-12).any():
        return 0.0
    fitted = LinearRegression().fit(look, logits).predict(look)
    return float(max(r2_score(logits, fitted, multioutput="variance_weighted"), 0.0))
