# SPDX-License-Identifier: Apache-2.0
"""fTRI: switch a behaviour off or on by the experts that fire more often when it is shown.

Paper     : Mixture of Tunable Experts (arXiv 2502.11096); its own short name is that of another method here.
Equation  : the n experts of highest D = mean A_p with the behaviour - mean A_p without; off: g = 0, nobody moves up
Shapes    : scores (L, N) of measure/experts/ranking/ftri; n experts over all layers.
Differs   : off keeps the token's sum of weights, as the paper renormalises; on promotes into the selection [reading].
Check     : tokens that never met an expert are the same bit for bit (tests/reuse/steer/test_methods.py).
Exempt    : nan, inf (an expert without a score is never chosen, and an infinite one ranks like any other); samples
            (scores are of layers and experts)
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from anabranch.reuse.steer.choice import at_most, highest
from anabranch.reuse.steer.recipe import Recipe, Step


def recipe(
    scores: Tensor, layers: Sequence[str], *, num: int = 10, turn: Literal["off", "on"] = "off", top_k: int
) -> Recipe:
    """Experts of highest score off, their slots empty; or into every token's selection, `top_k` of a layer at most."""
    if turn == "off":
        step = Step(kind="empty_keep_sum", experts=highest(scores, layers, num))
    else:
        step = Step(kind="promote", experts=at_most(highest(scores, layers, scores.numel()), top_k)[:num])
    return Recipe(steps=(step,), made_by="reuse/steer/ftri")
