# SPDX-License-Identifier: Apache-2.0
"""`anabranch demo [TOPIC]`: whole stories on what ships with the package; all of them, or one."""

from dataclasses import dataclass, replace
from importlib import import_module

import tyro

from anabranch.cli.flags import parse, written
from anabranch.errors import DONE, UsageError, did_you_mean
from anabranch.jobs.settings import DEMOS, DemoFlags

ALL = "all"
TOPICS = (ALL, *DEMOS)
RECIPES = {"erase": "geom_erasing.recipe", "align": "mote.policy", "experts": "experts.compare"}


@dataclass(frozen=True, kw_only=True)
class Flags(DemoFlags):
    """All four stories and one page that leads to them, about twenty minutes on two cores; or one of them by name.

    Transfer: where sharing hurts, and what experts do about it. Erase: a mark that nobody asked for, and its end.
    Align: a model that thinks before it answers, with one expert for each step. Experts: what the experts of a small
    mixture know, and what becomes of six texts without them.

    A folder that holds a demo is never written over. With --resume the demo of all keeps what is finished, lets
    transfer go on where it was stopped, and starts the others anew. A demo that fails does not keep the others from
    being run; the exit code is 3 then, and the page says what happened."""

    topic: tyro.conf.Positional[str] = ALL


def main(argv: list[str]) -> int:
    flags = DemoFlags(**vars(parse(Flags, argv, "demo")))
    given = [name for name, _ in written(argv)]
    if flags.topic not in TOPICS:
        raise UsageError(f"there is no demo {flags.topic!r}", hint=did_you_mean(flags.topic, TOPICS))
    if flags.topic == ALL:
        every(flags, given)
        return DONE
    if "--out" not in given:
        flags = replace(flags, out=flags.out / flags.topic)
    if flags.topic in RECIPES:
        one_seed(flags, given)
    else:
        from anabranch.jobs.transfer.demo import demo

        demo(flags)
    return DONE


def every(flags: DemoFlags, given: list[str]) -> None:
    if unused := [name for name in ("--seeds", "--steps") if name in given]:
        raise UsageError(
            f"{unused[0]} is an option of one demo",
            expected=f"anabranch demo TOPIC {unused[0]}",
            hint=f"one of {', '.join(DEMOS)}",
        )
    from anabranch.jobs.demo_all import demo_all

    demo_all(flags)


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
    if flags.topic == "experts" and steps is not None:
        raise UsageError(
            "--steps would change nothing: demo experts trains nothing", expected="no --steps", received=steps
        )
    job = import_module(f"anabranch.jobs.{flags.topic}.demo")
    arguments = (flags,) if flags.topic == "experts" else (flags, steps)
    getattr(job, f"{flags.topic}_demo")(*arguments)
