# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a request for sub-nets, said before anything is trained."""

from anabranch.allocate.clusters import tree
from anabranch.errors import UsageError
from anabranch.jobs.progress import say
from anabranch.jobs.transfer.settings import PretrainSettings
from anabranch.models import resnet
from anabranch.models.bridge import read_config
from anabranch.specialize.sdr.schedule import shared_turns
from anabranch.train.processes import launched

FEW_IMAGES, TOO_FEW_IMAGES = 40, 4
"""Images of a cluster below which a sub-net will hardly learn, and cannot learn."""
TURNS = 800
"""Of a sub-net after phase 0; of two lengths and two numbers of sub-nets the longest turns were best (recipes/sdr)."""
LEAST_TURN = 2
"""Images of a turn: batch statistics need two."""


def check_request(settings: PretrainSettings, num_images: int) -> int:
    """Clusters to be found, one for every sub-net."""
    check_net(settings)
    count = num_paths(settings, num_images)
    check_turns(settings)
    check_phases(settings, count)
    return count


def check_net(settings: PretrainSettings) -> None:
    """Can the network be split as it is asked for?"""
    if settings.base is None:
        preset = resnet.PRESETS[settings.preset]
        depths, sizes = preset.depths, preset.hidden_sizes
    else:
        config = read_config(settings.base)
        depths, sizes = config["depths"], config["hidden_sizes"]
    if settings.split_stages > len(depths):
        raise UsageError(
            "there are fewer stages to split", expected=f"at most {len(depths)}", received=settings.split_stages
        )
    for size in sizes[-settings.split_stages :]:
        if not 0 < (common := round(settings.split_ratio * size)) < size:
            raise UsageError(
                f"split_ratio has to leave common channels and some for the groups, of {size} in a stage",
                expected=f"from {1 / size:.3f} to {1 - 1 / size:.3f}, rounded to whole channels",
                received=f"{settings.split_ratio}, that is {common} of {size} in common",
            )


def num_paths(settings: PretrainSettings, num_images: int) -> int:
    """Clusters, one for every sub-net."""
    most = settings.groups**settings.split_stages
    enough = max(num_images // FEW_IMAGES, 2)
    count = min(most, enough, subnets_in_time(settings)) if settings.clusters == "auto" else int(settings.clusters)
    if count > most:
        raise UsageError(
            f"there are fewer paths than clusters: {settings.groups} groups in {settings.split_stages} stages",
            expected=f"at most {most} clusters",
            received=count,
            hint="more groups or split_stages, or --clusters auto",
        )
    if count < 2:
        raise UsageError("one sub-net is no choice", expected="at least 2 clusters", received=count)
    if num_images < TOO_FEW_IMAGES * count:
        raise UsageError(
            f"{num_images} images cannot feed {count} sub-nets",
            expected=f"at least {TOO_FEW_IMAGES} images for each",
            received=f"{num_images / count:.1f}",
            hint=f"with {FEW_IMAGES} images each: --clusters {enough}",
        )
    if num_images < FEW_IMAGES * count:
        say(f"warning: {num_images} images are few for {count} sub-nets; with {FEW_IMAGES} each: --clusters {enough}")
    return count


def subnets_in_time(settings: PretrainSettings) -> int:
    """As many as have enough turns each in the steps that are asked for; at least as many as there are groups."""
    turns = (settings.steps - base_steps(settings)) * settings.paths_a_step * (1 - settings.anchor_share)
    return max(int(turns / TURNS), settings.groups, 2)


def check_turns(settings: PretrainSettings) -> None:
    """A step's turns share out the batch, and the processes share out the turns."""
    turns, batch_size = settings.paths_a_step, settings.batch_size
    if turns % launched():
        raise UsageError(
            "each process trains sub-nets of its own",
            expected=f"paths_a_step to be a multiple of {launched()} processes",
            received=turns,
            hint=f"--set paths_a_step={launched()}",
        )
    if batch_size % turns or batch_size // turns < LEAST_TURN:
        raise UsageError(
            "the turns of a step share its batch equally, and each needs two images",
            expected=f"batch_size to be a multiple of {turns} turns a step, and at least {LEAST_TURN * turns}",
            received=batch_size,
            hint=f"--set batch_size={turns * max(batch_size // turns, LEAST_TURN)}",
        )


def check_phases(settings: PretrainSettings, count: int) -> None:
    """Has every phase its steps, and does a schedule of its turns exist?"""
    levels = range(1, settings.split_stages + 1) if settings.progressive else [settings.split_stages]
    if settings.steps - base_steps(settings) < len(levels):
        raise UsageError(
            "there are fewer steps than phases",
            expected=f"at least {len(levels)} after the {base_steps(settings)} of phase 0",
            received=settings.steps - base_steps(settings),
            hint="more --steps",
        )
    for level in levels:
        paths = tree.num_nodes(count, settings.groups, level)
        try:
            shared_turns(paths, settings.paths_a_step, settings.anchor_share)
        except ValueError as error:
            raise UsageError(
                f"no schedule gives each of {paths} sub-nets, and the model of all images, its turns",
                expected="fewer turns a step, or a smaller anchor_share",
                received=error,
                hint="--set paths_a_step=1, or another anchor_share",
            ) from None


def base_steps(settings: PretrainSettings) -> int:
    """Steps of phase 0: a share of all, none where the base is given."""
    return 0 if settings.base is not None else max(round(settings.base_share * settings.steps), 1)
