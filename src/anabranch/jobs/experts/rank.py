# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts rank`: which experts belong to a label, by every ranking that the statistics allow.

Beside each ranking stand how often its highest experts stay among the highest when folds of the text are resampled, how
far it agrees with the others (shared experts of two sets of the highest, over their union), and a random one: what
agreement is by chance.
"""

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import anabranch.measure.experts.ranking as rankings
from anabranch.errors import UsageError, did_you_mean
from anabranch.jobs.experts.settings import RankSettings
from anabranch.jobs.results import ranked as of_ranking
from anabranch.measure.experts.statistics import OUTPUTS, RESIDUAL, ExpertStats
from anabranch.report.result import Results
from anabranch.swap import swap_text
from anabranch.train.run_folder import place_for

RANDOM = "random"
"""The control: one draw, which no resampling moves."""


class Ranked(NamedTuple):
    scores: Tensor  # (L, N)
    top: list[tuple[int, int]]
    """(layer, expert), the highest first."""
    kept: list[float]
    """Share of the resamplings in which each of them is among the highest."""
    intervals: list[tuple[float, float]]
    """Of their scores, 95 %."""


def experts_rank(settings: RankSettings) -> Results:
    """Print the table, write settings.out if it is given; returns the rankings by name, each a `Ranked`."""
    stats = ExpertStats.load(settings.stats)
    others = checked(settings, stats)
    if settings.out is not None:
        if settings.out.exists():
            raise UsageError(f"{settings.out} is there already", expected="a free name", hint="another --out")
        place_for(settings.out)
    names = chosen(settings.by, stats)
    found = {name: ranked(module(name), stats, settings, others) for name in names}
    tell(settings, stats, found)
    told = described(settings, stats, found)
    if settings.out is not None:
        swap_text(json.dumps(told, indent=1) + "\n", settings.out)
    return Results(found, of_ranking(told).tables)


def checked(settings: RankSettings, stats: ExpertStats) -> list[str]:
    """The labels that the target is set against."""
    others = targets(settings.target, settings.against, stats)
    count = len(stats.layers) * stats.num_experts
    if not 1 <= settings.num < count:
        raise UsageError("num cannot be used", expected=f"1 to {count - 1}", received=settings.num)
    if settings.resamplings < 20:
        raise UsageError("an interval needs resamplings", expected="at least 20", received=settings.resamplings)
    return others


def targets(target: str, against: Sequence[str], stats: ExpertStats) -> list[str]:
    """The labels against; all others where none is named."""
    if not target:
        raise UsageError("no label is asked for", expected=f"--target, one of {', '.join(stats.labels)}")
    stats.index(target)
    others = list(against) or [label for label in stats.labels if label != target]
    for label in others:
        stats.index(label)
    if target in others:
        raise UsageError("a label can't be set against itself", expected="other labels", received=target)
    return others


def module(name: str) -> ModuleType:
    return import_module(f"{rankings.__name__}.{name}")


def known() -> list[str]:
    """Every ranking that can be made from statistics alone."""
    folder = Path(str(rankings.__file__)).parent
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    return [name for name in names if hasattr(module(name), "rank")]


def allowed(name: str, stats: ExpertStats) -> bool:
    """Whether the statistics hold what the ranking needs."""
    needs = set(module(name).NEEDS)
    held = {"routing"} | set(stats.sums)
    held |= {what for what, sums in (("outputs", OUTPUTS), ("residual", RESIDUAL)) if sums[0] in stats.sums}
    return needs <= held


def chosen(by: Sequence[str], stats: ExpertStats) -> list[str]:
    names = known()
    for name in by:
        if name not in names:
            raise UsageError(f"there is no ranking {name!r}", hint=did_you_mean(name, names))
        if not allowed(name, stats):
            raise UsageError(
                f"the statistics do not hold what {name} needs", expected=", ".join(module(name).NEEDS),
                received=", ".join(sorted(stats.sums)), hint="anabranch experts profile --outputs",
            )  # fmt: skip
    return list(by) or [name for name in names if allowed(name, stats)]


def ranked(ranking: ModuleType, stats: ExpertStats, settings: RankSettings, others: Sequence[str]) -> Ranked:
    scores_LN = ranking.rank(stats, settings.target, others)
    top = highest(scores_LN, settings.num)
    again = [stats.resampled(folds) for folds in drawn_folds(stats, settings, [settings.target, *others])]
    again_RLN = torch.stack([ranking.rank(one, settings.target, others) for one in again])
    kept_RM = torch.stack([torch.tensor([pair in highest(one, settings.num) for pair in top]) for one in again_RLN])
    mine_RM = torch.stack([again_RLN[:, layer, expert] for layer, expert in top], 1)
    low_M, high_M = mine_RM.quantile(torch.tensor([0.025, 0.975]).to(mine_RM), 0)
    return Ranked(
        scores_LN, top, kept_RM.double().mean(0).tolist(), list(zip(low_M.tolist(), high_M.tolist(), strict=True))
    )


def drawn_folds(stats: ExpertStats, settings: RankSettings, labels: Sequence[str]) -> list[list[int]]:
    """Folds drawn with replacement; every label has tokens in each draw."""
    generator = torch.Generator().manual_seed(settings.seed)
    has_DF = stats.tokens[[stats.index(label) for label in labels]] > 0
    found: list[list[int]] = []
    for _ in range(100 * settings.resamplings):
        folds = torch.randint(stats.num_folds, (stats.num_folds,), generator=generator)
        if has_DF[:, folds].any(1).all():
            found.append(folds.tolist())
        if len(found) == settings.resamplings:
            return found
    raise UsageError(
        "too few folds hold tokens of every label", expected="more text of each", received=stats.documents.tolist()
    )


def highest(scores_LN: Tensor, num: int) -> list[tuple[int, int]]:
    width = scores_LN.shape[1]
    order = torch.nan_to_num(scores_LN, nan=-torch.inf).flatten().argsort(descending=True, stable=True)[:num]
    return [(i // width, i % width) for i in order.tolist()]


def overlap(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]) -> float:
    """Experts in both, over experts in either."""
    return len(set(one) & set(other)) / len(set(one) | set(other))


def described(settings: RankSettings, stats: ExpertStats, found: dict[str, Ranked]) -> dict[str, Any]:
    return {
        "target": settings.target, **stats.header(),
        "rankings": {name: {**one._asdict(), "scores": one.scores.tolist()} for name, one in found.items()},
        "overlap": {a: {b: overlap(found[a].top, found[b].top) for b in found} for a in found},
    }  # fmt: skip


def tell(settings: RankSettings, stats: ExpertStats, found: dict[str, Ranked]) -> None:
    width = max(map(len, found))
    print(
        f"the {settings.num} experts that belong most to {settings.target}, layer.expert (kept in % of resamplings)\n"
    )
    for name, one in found.items():
        cells = [
            f"{layer}.{e}" if name == RANDOM else f"{layer}.{e} ({100 * kept:.0f})"
            for (layer, e), kept in zip(one.top, one.kept, strict=True)
        ]
        print(f"{name:<{width}}  " + "  ".join(f"{cell:<10}" for cell in cells))
    print("\nexperts that two rankings share, % of those in either")
    print(" " * (width + 2) + " ".join(f"{i + 1:>4}" for i in range(len(found))))
    for i, (name, one) in enumerate(found.items()):
        cells = [f"{100 * overlap(one.top, other.top):>4.0f}" for other in found.values()]
        print(f"{i + 1:>2} {name:<{width}}" + " ".join(cells))
    chance = settings.num / (len(stats.layers) * stats.num_experts)
    print(f"\nby chance a ranking shares about {100 * chance / (2 - chance):.0f} %")
