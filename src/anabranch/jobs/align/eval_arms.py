# SPDX-License-Identifier: Apache-2.0
"""The arms of `anabranch align eval`: the base and the mixtures in every mode, what they answer and what is in them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anabranch.jobs.align.eval_told import BASE, mixture_arm
from anabranch.jobs.align.generate import Speaker
from anabranch.jobs.align.inside import inside
from anabranch.jobs.align.settings import EvalSettings, GenerateSettings
from anabranch.jobs.align.train import read_chains, rows_of
from anabranch.jobs.progress import Progress
from anabranch.models.language.folder import open_language_model
from anabranch.specialize.mote.folder import load
from anabranch.specialize.mote.generate import Chain


class Arms:
    """What every arm answered, and what it took."""

    def __init__(self) -> None:
        self.answers: dict[str, list[str]] = {}
        self.spent: dict[str, dict[str, Any]] = {}

    def take(self, arm: str, chains: Sequence[Chain]) -> None:
        self.answers[arm] = [chain.answer for chain in chains]
        texts = sum(len(chain.texts) for chain in chains)
        self.spent[arm] = {
            "tokens": sum(len(chain.tokens) for chain in chains) / len(chains),
            "shapes": dict(Counter("+".join(chain.texts) for chain in chains)),
            "budget_used_up": sum(len(chain.forced) for chain in chains) / max(1, texts),
        }


def answered(settings: EvalSettings, questions: Sequence[dict[str, Any]]) -> tuple[Arms, dict[str, Any]]:
    """Answers of the base and of every mixture in every mode; what is inside the mixtures, where chains are given."""
    modes = [mode.strip() for mode in settings.modes.split(";") if mode.strip()]
    mixtures = [path for path in (settings.experts, settings.against) if path is not None]
    arms, inner = Arms(), {}
    with Progress("align eval", len(questions) * (1 + len(modes) * len(mixtures))) as progress:
        for path in (None, *mixtures):
            second = path is not None and path == settings.against
            for mode in modes if path is not None else ("adaptive",):
                arm = BASE if path is None else mixture_arm(path, mode, second)
                plain = GenerateSettings(
                    model=settings.model, experts=path, mode=mode, budget=settings.budget, strict=settings.strict
                )  # fmt: skip
                speaker, chains = Speaker(plain), []
                for start in range(0, len(questions), settings.batch_size):
                    part = questions[start : start + settings.batch_size]
                    chains += speaker.answer([row["question"] for row in part])
                    progress.advance(arm, len(part))
                arms.take(arm, chains)
            if path is not None and settings.chains is not None:
                inner[path.name if second else "experts"] = looked_into(settings, path, settings.chains)
    return arms, inner


def looked_into(settings: EvalSettings, path: Path, chains: Path) -> dict[str, Any]:
    model, _ = open_language_model(settings.model)
    mote = load(model, path, strict=settings.strict, trainable=True)
    return inside(mote, rows_of(mote, read_chains(chains, mote.settings.steps)), settings.batch_size)
