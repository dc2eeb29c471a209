# SPDX-License-Identifier: Apache-2.0
"""DSMoE: more or less weight for the experts of a domain's salient tokens, within the token's own sum.

Paper     : domain steering of mixtures (arXiv 2604.05267); another DSMoE splits dense matrices into experts.
Equation  : g <- alpha g for about 1 % of all experts, then the token's weights back to their former sum
Shapes    : scores (L, N) of measure/experts/ranking/dsmoe; alpha in (0, 100).
Differs   : nothing.
Check     : alpha 1 is the identity; a token's sum of weights never changes (tests/reuse/steer/test_methods.py).
Exempt    : nan, inf (an expert without a score is never chosen, and an infinite one ranks like any other); samples
            (scores are of layers and experts); off (a recipe is applied or not, see reuse/steer/recipe)
"""

from collections.abc import Sequence

from torch import Tensor

from anabranch.errors import UsageError
from anabranch.reuse.steer.choice import highest
from anabranch.reuse.steer.recipe import Recipe, Step

SHARE = 0.01


def recipe(scores: Tensor, layers: Sequence[str], *, num: int | None = None, alpha: float = 2.0) -> Recipe:
    """num: 1 % of all experts, at least one, where it is left out."""
    if not 0 < alpha < 100:
        raise UsageError("alpha cannot be used", expected="a factor above 0, below 100", received=alpha)
    chosen = highest(scores, layers, max(round(SHARE * scores.numel()), 1) if num is None else num)
    return Recipe(steps=(Step(kind="scale_keep_sum", experts=chosen, amount=alpha),), made_by="reuse/steer/dsmoe")
