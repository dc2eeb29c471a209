# SPDX-License-Identifier: Apache-2.0
"""`anabranch demo TOPIC`: a whole story on what ships with the package; transfer, erase, align or experts."""

from dataclasses import dataclass

import tyro

from anabranch.cli.options import given_flags, parse
from anabranch.errors import DONE, UsageError, did_you_mean
from anabranch.jobs.settings import DemoFlags

TOPICS = ("transfer", "erase", "align", "experts")
RECIPES = {"erase": "geom_erasing.recipe", "align": "mote.policy", "experts": "experts.compare"}


@dataclass(frozen=True, kw_only=True)
class Flags(DemoFlags):
    """Transfer: where sharing hurts, and what experts do about it. Erase: a mark that nobody asked for, and its end.
    Align: a model that thinks before it answers, with one expert for each step. Experts: what the experts of a small
    mixture know, and what becomes of six texts without them."""

    topic: tyro.conf.Positional[str] = "transfer"


def main(argv: list[str]) -> int:
    flags = DemoFlags(**vars(parse(Flags, argv, "demo")))
    if flags.topic not in TOPICS:
        raise UsageError(f"there is no demo {flags.topic!r}", hint=did_you_mean(flags.topic, TOPICS))
    if flags.topic in RECIPES:
        one_seed(flags, given_flags(argv))
    else:
        from anabranch.jobs.demo import demo

        demo(flags)
    return DONE


def one_seed(flags: DemoFlags, given: list[str]) -> None:
    if "--seeds" in given:
        raise UsageError(
            f"--seeds would change nothing: demo {flags.topic} shows one seed",
            expected="no --seeds",
            received=flags.seeds,
            hint=f"python -m recipes.{RECIPES[flags.topic]} takes several",
        )
    if flags.resume:
        raise UsageError(
            f"demo {flags.topic} cannot go on where it was stopped", expected="no --resume",
            hint="a new --out: it takes minutes",
        )  # fmt: skip
    steps = flags.steps if "--steps" in given else None
    if flags.topic == "experts":
        if steps is not None:
            raise UsageError(
                "--steps would change nothing: demo experts trains nothing", expected="no --steps", received=steps
            )
        from anabranch.jobs.experts_demo import experts_demo

        experts_demo(flags)
        return
    if flags.topic == "align":
        from anabranch.jobs.align_demo import align_demo

        align_demo(flags, steps)
        return
    from anabranch.jobs.erase_demo import erase_demo

    erase_demo(flags, steps)
