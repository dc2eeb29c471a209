# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts steer`: from statistics to a small recipe of what is done to the routing, made by one method."""

from collections.abc import Callable

from torch import Tensor

from anabranch.errors import UsageError, did_you_mean
from anabranch.jobs.experts.rank import chosen, module, targets
from anabranch.jobs.experts.settings import SteerSettings
from anabranch.measure.experts.statistics import ExpertStats
from anabranch.reuse.steer import dsmoe, ftri, rice, steermoe
from anabranch.reuse.steer.recipe import KINDS, WITH_AMOUNT, Recipe, Step
from anabranch.train.run_folder import place_for

Maker = Callable[[SteerSettings, Tensor, ExpertStats], Recipe]


def by_ftri(settings: SteerSettings, scores: Tensor, stats: ExpertStats) -> Recipe:
    return ftri.recipe(scores, stats.layers, num=settings.num, turn=settings.turn, top_k=stats.top_k)


def by_rice(settings: SteerSettings, scores: Tensor, stats: ExpertStats) -> Recipe:
    more = {} if settings.amount is None else {"beta": settings.amount}
    return rice.recipe(scores, stats.layers, num=settings.num, **more)


def by_dsmoe(settings: SteerSettings, scores: Tensor, stats: ExpertStats) -> Recipe:
    more = {} if settings.amount is None else {"alpha": settings.amount}
    return dsmoe.recipe(scores, stats.layers, num=settings.num, **more)


def by_steermoe(settings: SteerSettings, scores: Tensor, stats: ExpertStats) -> Recipe:
    count = {"promote" if settings.turn == "on" else "suppress": settings.num}
    signed = scores if settings.turn == "on" else -scores  # its suppressed ones are those of lowest score
    return steermoe.recipe(signed, stats.layers, top_k=stats.top_k, **count)


METHODS: dict[str, Maker] = {"ftri": by_ftri, "rice": by_rice, "dsmoe": by_dsmoe, "steermoe": by_steermoe}
MANUAL = "manual"


def experts_steer(settings: SteerSettings) -> Recipe:
    """Write settings.out; returns the recipe."""
    stats = ExpertStats.load(settings.stats)
    if settings.by not in (*METHODS, MANUAL):
        raise UsageError(f"there is no steering by {settings.by!r}", hint=did_you_mean(settings.by, [*METHODS, MANUAL]))
    refuse_idle(settings)
    if settings.out.exists():
        raise UsageError(f"{settings.out} is there already", expected="a free name", hint="another --out")
    if settings.by == MANUAL:
        made = Recipe(steps=(by_hand(settings, stats),))
    else:
        others = targets(settings.target, settings.against, stats)
        (name,) = chosen([settings.by], stats)
        made = METHODS[settings.by](settings, module(name).rank(stats, settings.target, others), stats)
    made = Recipe(steps=made.steps, made_by=made.made_by, model=stats.model)
    place_for(settings.out)
    made.save(settings.out)
    tell(settings, stats, made)
    return made


def refuse_idle(settings: SteerSettings) -> None:
    """What would be said and then not heard."""
    if settings.by == MANUAL:
        if not settings.experts:
            raise UsageError("no expert is named", expected="--experts layer.expert, such as 2.5", received="none")
        if settings.target or settings.against:
            raise UsageError("--target would change nothing: you choose the experts", expected="no --target")
        return
    if settings.experts:
        raise UsageError(
            f"--experts would change nothing: {settings.by} chooses them", expected="no --experts",
            received=" ".join(settings.experts), hint=f"--by {MANUAL}",
        )  # fmt: skip
    if settings.amount is not None and settings.by not in ("rice", "dsmoe"):
        raise UsageError(
            f"--amount would change nothing: {settings.by} has none", expected="no --amount", received=settings.amount
        )
    if settings.turn == "on" and settings.by not in ("ftri", "steermoe"):
        raise UsageError(
            f"--turn would change nothing: {settings.by} goes by its amount", expected="no --turn", received="on"
        )


def by_hand(settings: SteerSettings, stats: ExpertStats) -> Step:
    experts = tuple(expert_of(given, stats) for given in settings.experts)
    if settings.kind in KINDS and settings.kind in WITH_AMOUNT and settings.amount is None:
        raise UsageError(f"{settings.kind} needs an amount", expected="--amount", received="none")
    return Step(kind=settings.kind, experts=experts, amount=settings.amount)


def expert_of(given: str, stats: ExpertStats) -> tuple[str, int]:
    layer, dot, expert = given.partition(".")
    fine = dot and layer.isdigit() and expert.isdigit()
    if not fine or int(layer) >= len(stats.layers) or int(expert) >= stats.num_experts:
        raise UsageError(
            f"there is no expert {given}",
            expected=f"layer.expert, layers 0 to {len(stats.layers) - 1}, experts 0 to {stats.num_experts - 1}",
            received=given,
        )  # fmt: skip
    return stats.layers[int(layer)], int(expert)


def tell(settings: SteerSettings, stats: ExpertStats, made: Recipe) -> None:
    for step in made.steps:
        named = " ".join(f"{stats.layers.index(layer)}.{expert}" for layer, expert in step.experts)
        amount = "" if step.amount is None else f" {step.amount:g}"
        print(f"{step.kind}{amount}: {named}    ({KINDS[step.kind]})")
    print(f"\nrecipe   {settings.out}")
    print(f"next     anabranch experts generate --model MODEL --steer {settings.out} --prompt '...'")
