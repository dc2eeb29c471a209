# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts generate`: texts of a steered model, beside those of the model as it is; or its checkpoint."""

import json
from collections.abc import Sequence
from typing import Any

import torch

from anabranch.errors import UsageError
from anabranch.jobs.experts.card import experts_card
from anabranch.jobs.experts.settings import GenerateSettings
from anabranch.jobs.experts.skip import check as check_skipping
from anabranch.jobs.experts.skip import skipping
from anabranch.jobs.experts.texts import read_documents, read_windows
from anabranch.models.language.folder import hushed, open_language_model
from anabranch.models.mixtures.fingerprint import fingerprint
from anabranch.models.mixtures.layers import MixtureLayer, open_layers
from anabranch.reuse.steer import scmoe
from anabranch.reuse.steer.recipe import Recipe
from anabranch.swap import swap_text
from anabranch.train.publish import publish_folder
from anabranch.train.run_folder import place_for


def experts_generate(settings: GenerateSettings) -> list[dict[str, str]]:
    """Rows of prompt, plain and steered text; with settings.export a checkpoint and no rows."""
    recipes = [Recipe.load(file) for file in settings.steer]
    check(settings)
    prompts = [] if settings.export else prompts_of(settings)
    with hushed():
        model, tokenizer = open_language_model(settings.model)
    layers = open_layers(model)
    refuse_strangers(settings, recipes, model)
    if settings.export is not None:
        export(settings, recipes, model, tokenizer, layers)
        return []
    rows = [{"prompt": prompt, "plain": go_on(settings, model, tokenizer, prompt)} for prompt in prompts]
    if recipes:
        whole = Recipe(steps=tuple(step for recipe in recipes for step in recipe.steps))
        with whole.applied(layers):
            for row in rows:
                row["steered"] = go_on(settings, model, tokenizer, row["prompt"])
    if settings.contrast:
        for row in rows:
            row["steered"] = contrasted(settings, model, tokenizer, row["prompt"])
    if settings.skip:
        texts = read_windows(settings.data, tokenizer, length=128, limit=settings.skip_windows, part="train")
        with skipping(settings.skip, model, texts, settings.skip_share) as skipped:
            for row in rows:
                row["steered"] = go_on(settings, model, tokenizer, row["prompt"])
        print(f"{skipped.share():.1%} of the slots were passed over (computed all the same: a stock model does)")
    tell(settings, rows)
    return rows


def check(settings: GenerateSettings) -> None:
    if settings.max_new_tokens < 1:
        raise UsageError("max_new_tokens cannot be used", expected="at least 1", received=settings.max_new_tokens)
    if not 0 <= settings.temperature < float("inf"):
        raise UsageError("temperature cannot be used", expected="a number from 0", received=settings.temperature)
    for path in (settings.out, settings.export):
        if path is not None and path.exists():
            raise UsageError(f"{path} is there already", expected="a free name", hint="another name")
    if settings.out is not None:
        place_for(settings.out)
    if settings.export is not None and (settings.prompt or settings.prompts):
        raise UsageError("a prompt would not be heard: --export writes a checkpoint and ends", expected="no prompt")
    if settings.contrast and (settings.steer or settings.export):
        raise UsageError(
            "--contrast goes with a model as it is", expected="neither --steer nor --export",
            received="--steer" if settings.steer else "--export",
        )  # fmt: skip
    if bool(settings.skip) != bool(settings.data):
        raise UsageError(
            "--skip and --data go together: the thresholds come from texts", expected="both or neither",
            received="--skip" if settings.skip else "--data",
        )  # fmt: skip
    if settings.skip:
        check_skipping(settings.skip, settings.skip_share)
        if settings.steer or settings.export or settings.contrast:
            raise UsageError("--skip goes with a model as it is", expected="no --steer, --export or --contrast")
    if settings.export is not None and not settings.steer:
        raise UsageError("nothing would be exported but the model itself", expected="--steer", received="none")


def prompts_of(settings: GenerateSettings) -> list[str]:
    if bool(settings.prompt) == (settings.prompts is not None):
        received = "both" if settings.prompt else "neither"
        raise UsageError("what shall be gone on with?", expected="--prompt or --prompts", received=received)
    if settings.prompts is None:
        return [settings.prompt]
    documents = read_documents(str(settings.prompts), "test")
    if settings.prompts.suffix == ".jsonl":
        return documents
    return [line for line in documents[0].split("\n") if line.strip()]


def refuse_strangers(settings: GenerateSettings, recipes: Sequence[Recipe], model: Any) -> None:
    own = fingerprint(model)
    for file, recipe in zip(settings.steer, recipes, strict=True):
        if settings.strict and recipe.model not in ("", own):
            raise UsageError(
                f"{file} was made on another model", expected=own, received=recipe.model,
                hint="--set strict=false takes it all the same",
            )  # fmt: skip


@torch.no_grad()
def go_on(settings: GenerateSettings, model: Any, tokenizer: Any, prompt: str) -> str:
    """The text after the prompt; the same draws for the plain and the steered model."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    drawn = {"do_sample": True, "temperature": settings.temperature, "top_k": 0} if settings.temperature else {}
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=settings.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id, **({"do_sample": False} | drawn),
        )  # fmt: skip
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def contrasted(settings: GenerateSettings, model: Any, tokenizer: Any, prompt: str) -> str:
    try:
        config = scmoe.Config(
            ranks=settings.contrast, alpha=settings.alpha, beta=settings.beta, temperature=settings.temperature
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    generator = torch.Generator(model.device).manual_seed(settings.seed)
    out = scmoe.generate(model, ids, config, max_new_tokens=settings.max_new_tokens, generator=generator)
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def export(
    settings: GenerateSettings, recipes: Sequence[Recipe], model: Any, tokenizer: Any, layers: Sequence[MixtureLayer]
) -> None:
    touched = sorted({name for recipe in recipes for name in recipe.bake(layers)})
    assert settings.export is not None

    def write(folder: Any) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(experts_card("steered", {"touched": touched}, settings), encoding="utf-8")

    with hushed():
        publish_folder(write, settings.export)
    print(f"{len(touched)} tensors changed: {', '.join(touched)}")
    print(f"checkpoint  {settings.export}    (transformers opens it alone)")


def tell(settings: GenerateSettings, rows: Sequence[dict[str, str]]) -> None:
    if settings.out is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        swap_text(lines, settings.out)
        print(f"{len(rows)} texts  {settings.out}")
        return
    for row in rows:
        for name in ("prompt", "plain", "steered"):
            if name in row:
                print(f"{name:<8} {row[name]}")
        print()
