# SPDX-License-Identifier: Apache-2.0
"""RICE: strengthen the experts that are tied to marker tokens, wherever they are selected anyway.

Paper     : RICE (arXiv 2505.14681).
Equation  : g <- beta g for the two experts of highest signed nPMI, no renormalisation
Shapes    : scores (L, N) of measure/experts/ranking/rice; beta 64, 4 to 128 said to work.
Differs   : nothing.
Check     : beta 1 is the identity bit for bit, other tokens are untouched (tests/reuse/steer/test_methods.py).
Exempt    : nan, inf (an expert without a score is never chosen, and an infinite one ranks like any other); samples
            (scores are of layers and experts); off (a recipe is applied or not, see reuse/steer/recipe)
"""

from collections.abc import Sequence

from torch import Tensor

from anabranch.reuse.steer.choice import highest
from anabranch.reuse.steer.recipe import Recipe, Step


def recipe(scores: Tensor, layers: Sequence[str], *, num: int = 2, beta: float = 64.0) -> Recipe:
    step = Step(kind="scale", experts=highest(scores, layers, num), amount=beta)
    return Recipe(steps=(step,), made_by="reuse/steer/rice")
