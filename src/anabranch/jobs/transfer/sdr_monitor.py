# SPDX-License-Identifier: Apache-2.0
"""Have sub-nets collapsed? Their features are looked at, since the spread of the embeddings sees nothing of it.

The norm at the end of a projector blows up whatever little has remained, so the spread of normed embeddings stays
healthy while features shrink to a few directions. Hence directions are counted, and compared with the base's.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from anabranch.data.images import Images
from anabranch.jobs.progress import say
from anabranch.jobs.transfer.corpus import at_most
from anabranch.jobs.transfer.embed import embed
from anabranch.measure.rank import collapsed, directions
from anabranch.specialize.sdr.supernet import SuperNet

SAMPLE = 2000
"""Images whose features are looked at."""
MOST_PATHS = 16
"""Sub-nets that are looked at, spread over all of them."""


def directions_of(models: Iterable[nn.Module], images: Images) -> list[int]:
    """Directions that the features of each model use."""
    few = at_most(images, SAMPLE, seed=0)
    return [directions(embed(model, few)) for model in models]


def look(net: SuperNet, base: nn.Module, images: Images, phase: int) -> dict[str, Any]:
    """Warn of sub-nets that use fewer than half of the base's directions; what was seen, for summary.json."""
    every = max(len(net.paths) // MOST_PATHS, 1)
    rows = range(0, len(net.paths), every)
    healthy, *found = directions_of((base, *map(net.extract, rows)), images)
    narrow = [row for row, count in zip(rows, found, strict=True) if collapsed(count, healthy)]
    if narrow:
        say(
            f"warning: phase {phase}: {len(narrow)} of {len(rows)} sub-nets looked at have collapsed: features of as "
            f"few as {min(found)} directions, where the base has {healthy}; try a smaller kd_coef or learning_rate, "
            "or fewer groups"
        )
    return {"base": healthy, "sub_nets": dict(zip(rows, found, strict=True)), "collapsed": narrow}
