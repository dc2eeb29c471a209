# SPDX-License-Identifier: Apache-2.0
"""What only the shared model can tell: which source a task looks like, and whose gradients oppose whose."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from anabranch.data.images import Images
from anabranch.data.streams import ShuffledIndices, derived_seed
from anabranch.jobs.transfer.corpus import at_most
from anabranch.jobs.transfer.embed import embed
from anabranch.jobs.transfer.learners import learner
from anabranch.jobs.transfer.settings import MeasureSettings
from anabranch.measure.conflict import gradient_conflict
from anabranch.measure.relatedness import relatedness

CONFLICT_IMAGES = 256
RELATED_IMAGES = 1000


def look_inside(
    settings: MeasureSettings, objective: nn.Module, sources: Sequence[Images], tasks: Sequence[Images], seed: int
) -> dict[str, Any]:
    """Both tables, of the trained objective; it is left as it is."""
    few = [at_most(images, RELATED_IMAGES, seed) for images in (*sources, *tasks)]
    features = [embed(objective.model, images).numpy() for images in few]
    count = len(sources)
    return {
        "relatedness": relatedness(features[count:], features[:count], seed=seed).tolist(),
        "conflict": conflict(settings, objective, sources, seed).tolist(),
    }


def conflict(settings: MeasureSettings, objective: nn.Module, sources: Sequence[Images], seed: int) -> Tensor:
    """Cosines between the gradients of the loss on two batches of each source, see measure/conflict.

    Every forward starts from the objective as it is: what one moves (statistics, a target) would reach the next.
    """
    twin, before = copy.deepcopy(objective).train(), objective.state_dict()

    def loss_of(images: Images, seed: int) -> Callable[[int], Tensor]:
        count = max(min(CONFLICT_IMAGES, len(images) // 2), 2)  # both batches lie in one epoch, so they are disjoint
        indices = ShuffledIndices(len(images), count, seed)
        stream = learner(settings.objective).stream(images, twin.model, indices, seed=seed, augment=settings.augment)

        def loss(half: int) -> Tensor:
            twin.load_state_dict(before)
            return twin(stream.batch(half))["loss"]

        return loss

    seeds = [derived_seed("conflict", seed, source) for source in range(len(sources))]  # no two share their noise
    return gradient_conflict(twin.model, [loss_of(*pair) for pair in zip(sources, seeds, strict=True)])
