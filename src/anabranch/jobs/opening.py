# SPDX-License-Identifier: Apache-2.0
"""A steered, tuned or aligned model as any program wants one: a transformers model and its tokenizer.

model, tokenizer = open_model("olmoe", steer="steer.json")
model, tokenizer = open_model("smollm2", experts="mote", mode="adaptive")
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from anabranch.errors import UsageError
from anabranch.models.language.folder import hushed, open_language_model
from anabranch.models.mixtures.adapter import ExpertAdapter, merge
from anabranch.reuse.steer.attached import attach
from anabranch.reuse.steer.recipe import Recipe

Place = str | Path


def open_model(
    folder: Place, *, steer: Place | Recipe | tuple[Place | Recipe, ...] = (), tuned: Place | None = None,
    experts: Place | None = None, mode: str = "adaptive", budget: Mapping[str, int] | None = None, strict: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Any]:  # fmt: skip
    """The model of the folder and its tokenizer; `generate` and a forward pass just work.

    steer      recipes of `anabranch experts steer`, files or folders, one after another
    tuned      the adapter of `anabranch experts tune`
    experts    the folder of `anabranch align train`; `mode` and `budget` say how its steps are walked
    strict     refuse what was made on another model

    Raises:
        UsageError: something is not there, was made on another model, or does not go together.
    """
    recipes = [recipe_of(one) for one in (steer if isinstance(steer, tuple) else (steer,))]
    if experts is not None and (recipes or tuned is not None):
        raise UsageError("step experts go on a model as it is", expected="experts, or steer and tuned", received="both")
    if experts is None and (mode != "adaptive" or budget):
        raise UsageError("a model without step experts walks no steps", expected="experts", received=f"mode={mode}")
    adapter = None if tuned is None else ExpertAdapter.from_pretrained(tuned)
    with hushed():
        model, tokenizer = open_language_model(folder, dtype)
    if adapter is not None:
        merge(model, adapter)
    if recipes:
        attach(model, joined(recipes, strict), strict=strict)
    if experts is None:
        return model, tokenizer
    from anabranch.specialize.mote.mote import MoTE
    from anabranch.specialize.mote.plain import as_model

    mote = MoTE.from_pretrained(experts, base=model, strict=strict)
    return as_model(mote, mode=mode, budget=budget), mote.tokenizer


def joined(recipes: Sequence[Recipe], strict: bool) -> Recipe:
    """The steps of all, one after another."""
    made = {recipe.model for recipe in recipes} - {""}
    if strict and len(made) > 1:
        raise UsageError("the recipes were made on different models", received=", ".join(sorted(made)))
    return Recipe(steps=tuple(step for recipe in recipes for step in recipe.steps), model=min(made, default=""))


def recipe_of(given: Place | Recipe) -> Recipe:
    if isinstance(given, Recipe):
        return given
    return Recipe.load(Path(given)) if Path(given).is_file() else Recipe.from_pretrained(given)
