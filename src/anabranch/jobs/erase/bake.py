# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase bake`: what an adapter's negative prompt does, put into a LoRA that needs none.

OUT/training    checkpoints and metrics.jsonl; OUT/* the LoRA, geom_config.json and README.md
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.data.streams import derived_seed
from anabranch.errors import CheckFailed, UsageError
from anabranch.jobs.erase.card import baked_card
from anabranch.jobs.erase.checks import open_model
from anabranch.jobs.erase.sample import draw_latents, sampling_of
from anabranch.jobs.erase.settings import BakeSettings, SampleSettings
from anabranch.jobs.erase.train import check_untouched
from anabranch.jobs.progress import say
from anabranch.jobs.resumed import fingerprint_of, kept, same_as_before
from anabranch.jobs.settings import plain_values_of
from anabranch.jobs.together import first_alone
from anabranch.models.diffusion.noising import noising
from anabranch.models.diffusion.prompts import encode_negatives, encode_prompts
from anabranch.suppress.geom_erasing.adapter import Applied, apply, fingerprint, hashes
from anabranch.suppress.geom_erasing.adapter_folder import CONFIG
from anabranch.suppress.geom_erasing.bake import Baking, BakingBatches
from anabranch.suppress.lora import add_lora, save_lora
from anabranch.train.loop import TrainConfig, train
from anabranch.train.publish import install
from anabranch.train.run_folder import RunFolder
from anabranch.train.signals import StopFlag

TRAINING, LATENTS, SEEN = "training", "latents.safetensors", "seen.json"


def erase_bake(settings: BakeSettings) -> dict[str, Any]:
    """Train and write `settings.out`; returns what its geom_config.json holds."""
    check_settings(settings)
    training = training_config(settings)
    prompts = read_prompts(settings.prompts)
    student, teacher = open_model(settings.model), open_model(settings.model)
    noising(student.scheduler)  # refuses what cannot be trained for
    base = fingerprint(student)
    applied = apply(teacher, settings.adapter)
    policy = policy_of(settings, applied)
    negative = applied.negative(policy, len(prompts))
    sampling_of(teacher, request(settings))
    with StopFlag(), RunFolder.open(settings.out, plain_values_of(settings), settings.resume) as run:
        adapter = fingerprint_of([(settings.adapter / CONFIG).read_text(encoding="utf-8")])
        seen = {"model": base, "adapter": adapter, "prompts": fingerprint_of(prompts)}
        same_as_before(run.path / TRAINING / SEEN, seen)
        numbers = torch.arange(settings.num_latents) % len(prompts)
        latents = latents_of(settings, applied, policy, [prompts[i] for i in numbers.tolist()], run.path / TRAINING)
        before, parameters = hashes(student), add_lora(student, settings.r, settings.seed)
        objective = Baking(
            student, teacher, parameters,
            encode_prompts(teacher, prompts), negative, encode_negatives(teacher, [""]),
            eta=settings.eta, keep_coef=settings.keep_coef,
        )  # fmt: skip
        stream = BakingBatches(latents, numbers, settings.batch_size, settings.seed)
        folder = run.path / TRAINING
        train(objective, stream, training, folder, resume=(folder / "checkpoints").exists(), report=say)
        if not any(p.any() for name, p in parameters.items() if "lora_B" in name):
            raise CheckFailed(
                "training left the LoRA at nothing",
                expected="weights that moved",
                received=f"zeros after {settings.steps} steps",
                hint="more --steps, or a higher learning_rate",
            )
        facts = described(settings, applied, policy) | {"touched": check_untouched(student, before, "lora")}
        first_alone(lambda: write_baked(run.path, student, facts))
    say(f"\nbaked    {settings.out}: no negative prompt is needed")
    return facts


# wrong uses


def check_settings(settings: BakeSettings) -> None:
    for name, fine, expected in (
        ("eta", 0 < settings.eta < math.inf, "a number above 0; at 0 nothing would change"),
        ("keep_coef", 0 <= settings.keep_coef < math.inf, "a number from 0"),
        ("r", settings.r >= 1, "at least 1"),
        ("num_latents", settings.num_latents >= 1, "at least 1"),
        ("learning_rate", settings.learning_rate > 0, "above 0"),
    ):
        if not fine:
            raise UsageError(
                f"{name} cannot be used", expected=expected, received=getattr(settings, name),
                hint=f"{getattr(BakeSettings, name)}, the default",
            )  # fmt: skip


def training_config(settings: BakeSettings) -> TrainConfig:
    try:
        return TrainConfig(
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            warmup_steps=min(settings.warmup_steps, settings.steps // 2),
            weight_decay=0.0,
            max_grad_norm=settings.max_grad_norm,
            seed=settings.seed,
            save_every=settings.save_every,
            tracker=settings.tracker,
        )
    except ValueError as error:
        raise UsageError(str(error), hint="anabranch erase bake --help names the defaults") from None


def read_prompts(path: Path | None) -> list[str]:
    if path is None:
        raise UsageError("no prompts were given", expected="--prompts FILE", hint="a text file, a prompt a line")
    if not path.is_file():
        raise UsageError(f"{path} cannot be read", expected="a text file, a prompt a line", received="no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read", expected="UTF-8 text, a prompt a line", received=str(error)
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{path} holds no prompts", expected="a prompt a line", received="empty lines")
    return list(dict.fromkeys(prompts))


def policy_of(settings: BakeSettings, applied: Applied) -> str:
    if applied.adapter.trained == "baked":
        raise UsageError(
            f"{settings.adapter} is baked already",
            expected="what anabranch erase train wrote",
            received="what anabranch erase bake wrote",
            hint=f"the adapter that it was baked from: {applied.adapter.config.get('adapter', 'not recorded')}",
        )
    policy = settings.policy or applied.policy
    if policy in ("none", "detected"):
        raise UsageError(
            f"policy {policy} cannot be baked",
            expected="one negative prompt for all: name, prior, all or sampled",
            received=policy,
            hint="--policy name",
        )
    return policy


# the work


def request(settings: BakeSettings) -> SampleSettings:
    """How the model's own pictures are drawn."""
    return SampleSettings(
        guidance=settings.guidance, steps=settings.sample_steps, batch_size=settings.batch_size, seed=settings.seed
    )


def latents_of(settings: BakeSettings, applied: Applied, policy: str, asked: list[str], folder: Path) -> Tensor:
    """Pictures of the model with its adapter, drawn once and kept in the run for a resume."""
    seeds = [derived_seed("baking", settings.seed, i) % 2**32 for i in range(len(asked))]
    how = sampling_of(applied.pipe, request(settings))

    def made() -> Tensor:
        say(f"{len(asked)} pictures of the model's own to learn from")
        return draw_latents(applied.pipe, asked, applied.negative(policy, len(asked)), seeds, how)

    return kept(folder / LATENTS, "latents", made)


def described(settings: BakeSettings, applied: Applied, policy: str) -> dict[str, Any]:
    kept = ("format", "family", "name", "new_name", "grid", "base", "concept", "detector")
    facts = {name: applied.adapter.config[name] for name in kept if name in applied.adapter.config}
    return facts | {
        "trained": "baked",
        "policy": "none",
        "training_bins": [],
        "training_counts": [],
        "baked_policy": policy,
        "adapter": str(settings.adapter),
        "model": str(settings.model),
        "eta": settings.eta,
        "steps": settings.steps,
    }


def write_baked(out: Path, student: Any, facts: dict[str, Any]) -> None:
    """All files beside each other first, then to their places, the configuration last."""
    staged = out / ".adapter"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    save_lora(student, staged)
    (staged / "README.md").write_text(baked_card(student, facts), encoding="utf-8")
    (staged / CONFIG).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    install(staged, out, last=CONFIG)
