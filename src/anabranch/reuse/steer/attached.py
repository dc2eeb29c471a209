# SPDX-License-Identifier: Apache-2.0
"""A recipe on a model until it is taken off again: for programs that are handed a model and know nothing of recipes."""

from contextlib import ExitStack
from typing import Any

from anabranch.errors import AnabranchError, UsageError
from anabranch.models.mixtures.fingerprint import fingerprint
from anabranch.models.mixtures.layers import open_layers
from anabranch.reuse.steer.recipe import Recipe

HELD = "_anabranch_steering"


def attach(model: Any, recipe: Recipe, *, strict: bool = True) -> None:
    """From here on every forward pass of the model is steered; its class, weights and files are as before.

    Raises:
        UsageError: it is steered already, has no such experts, or (strict) the recipe was made on another model.
    """
    if HELD in vars(model):
        raise UsageError("the model is steered already", hint="detach(model) first, or one recipe of all the steps")
    if strict and recipe.model not in ("", own := fingerprint(model)):
        raise UsageError(
            "the recipe was made on another model", expected=own, received=recipe.model,
            hint="strict=False takes it all the same",
        )  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(recipe.applied(open_layers(model)))
        vars(model)[HELD] = stack.pop_all()


def detach(model: Any) -> None:
    """The model as it was.

    Raises:
        UsageError: it is not steered.
        AnabranchError: the recipe never acted, as no forward pass was made or none came by its layers.
    """
    stack: ExitStack | None = vars(model).pop(HELD, None)
    if stack is None:
        raise UsageError("the model is not steered", hint="attach(model, recipe) does that")
    try:
        stack.close()
    except AnabranchError as error:
        raise AnabranchError("the recipe never acted", received=error.what) from error
