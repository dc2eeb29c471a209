# SPDX-License-Identifier: Apache-2.0
"""`anabranch demo TOPIC`: a whole story on images that ship with the package; transfer or erase."""

from dataclasses import dataclass

import tyro

from anabranch.cli.options import given_flags, parse
from anabranch.errors import DONE, UsageError, did_you_mean
from anabranch.jobs.settings import DemoFlags

TOPICS = ("transfer", "erase")


@dataclass(frozen=True, kw_only=True)
class Flags(DemoFlags):
    """Transfer: where sharing hurts, and what experts do about it. Erase: a mark that nobody asked for, and its end."""

    topic: tyro.conf.Positional[str] = "transfer"


def main(argv: list[str]) -> int:
    flags = DemoFlags(**vars(parse(Flags, argv, "demo")))
    if flags.topic not in TOPICS:
        raise UsageError(f"there is no demo {flags.topic!r}", hint=did_you_mean(flags.topic, TOPICS))
    if flags.topic == "erase":
        erase(flags, given_flags(argv))
    else:
        from anabranch.jobs.demo import demo

        demo(flags)
    return DONE


def erase(flags: DemoFlags, given: list[str]) -> None:
    if "--seeds" in given:
        raise UsageError(
            "--seeds would change nothing: demo erase shows one seed",
            expected="no --seeds",
            received=flags.seeds,
            hint="python -m recipes.geom_erasing.recipe takes several",
        )
    if flags.resume:
        raise UsageError(
            "demo erase cannot go on where it was stopped", expected="no --resume", hint="a new --out: it takes minutes"
        )
    from anabranch.jobs.erase_demo import erase_demo

    erase_demo(flags, flags.steps if "--steps" in given else None)
