# SPDX-License-Identifier: Apache-2.0
"""SteerMoE: put experts above or below all others of a token by the difference of their activation rates.

Paper     : SteerMoE (arXiv 2509.09660).
Equation  : promoted: z = max log softmax z + 0.01; suppressed: z = min log softmax z - 0.01; then as the family scores
Shapes    : scores (L, N), rates with the behaviour minus rates without; at most K promoted in a layer.
Differs   : nothing.
Check     : promoted experts are in every token's set, suppressed ones in none (tests/reuse/steer/test_methods.py).
Exempt    : nan, inf (an expert without a score is never chosen, and an infinite one ranks like any other); samples
            (scores are of layers and experts)
"""

from collections.abc import Sequence

from torch import Tensor

from anabranch.errors import UsageError
from anabranch.reuse.steer.choice import at_most, highest
from anabranch.reuse.steer.recipe import Recipe, Step


def recipe(scores: Tensor, layers: Sequence[str], *, promote: int = 0, suppress: int = 0, top_k: int) -> Recipe:
    """How many experts of highest score to promote, and of lowest score to suppress, over all layers."""
    if not promote and not suppress:
        raise UsageError("nothing would be steered", expected="promote or suppress above 0", received="0 and 0")
    steps = []
    if promote:
        chosen = at_most(highest(scores, layers, scores.numel()), top_k)[:promote]
        steps.append(Step(kind="promote", experts=chosen))
    if suppress:
        chosen = at_most(highest(-scores, layers, scores.numel()), scores.shape[1] - top_k)[:suppress]
        steps.append(Step(kind="suppress", experts=chosen))
    return Recipe(steps=tuple(steps), made_by="reuse/steer/steermoe")
