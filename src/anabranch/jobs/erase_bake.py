# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase bake`: what an adapter's negative prompt does, put into a LoRA that needs none.

OUT/training    checkpoints and metrics.jsonl; OUT/* the LoRA, geom_config.json and README.md
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from anabranch.data.streams import derived_seed
from anabranch.errors import CheckFailed, UsageError
from anabranch.jobs.erase_sample import draw_latents, sampling_of
from anabranch.jobs.erase_settings import BakeSettings
from anabranch.jobs.erase_train import install, plain_values_of
from anabranch.jobs.stages import say
from anabranch.models.diffusion.family import open_pipeline
from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.geom_erasing.adapter import CONFIG, Applied, apply
from anabranch.suppress.geom_erasing.bake import Baking, BakingBatches
from anabranch.suppress.lora import add_lora, save_lora
from anabranch.train.loop import TrainConfig, train
from anabranch.train.run_folder import RunFolder
from anabranch.train.signals import StopFlag

README = """\
# Less {concept}, without a negative prompt

A LoRA distilled from an adapter of Geom-Erasing (policy {policy}, eta {eta:g}, {steps} steps).

```python
import diffusers

pipe = diffusers.DiffusionPipeline.from_pretrained("{model}")
pipe.load_lora_weights("path/to/this/folder")
image = pipe("...").images[0]
```

Erasing makes accidental output rarer; it is no security barrier. The words that stand for the concept are not in here.
"""


def erase_bake(settings: BakeSettings) -> dict[str, Any]:
    """Train and write `settings.out`; returns what its geom_config.json holds."""
    prompts = read_prompts(settings.prompts)
    if not settings.eta > 0:
        raise UsageError("eta would change nothing", expected="above 0", received=settings.eta)
    student, teacher = open_pipeline(settings.model), open_pipeline(settings.model)
    applied = apply(teacher, settings.adapter)
    policy = settings.policy or applied.policy
    if policy in ("none", "detected"):
        raise UsageError(
            f"policy {policy} cannot be baked", expected="one negative prompt for all: name, prior, all or sampled"
        )
    how = sampling_of(teacher, settings)
    with StopFlag(), RunFolder.open(settings.out, plain_values_of(settings), settings.resume) as run:
        numbers = torch.arange(settings.num_latents) % len(prompts)
        seeds = [derived_seed("baking", settings.seed, i) % 2**32 for i in range(settings.num_latents)]
        asked = [prompts[i] for i in numbers.tolist()]
        say(f"{settings.num_latents} pictures of the model's own to learn from")
        latents = draw_latents(teacher, asked, applied.negative(policy, len(asked)), seeds, how)
        parameters = add_lora(student, settings.r, settings.seed)
        objective = Baking(
            student, teacher, parameters,
            encode_prompts(teacher, prompts), applied.negative(policy, len(prompts)), encode_prompts(teacher, [""]),
            eta=settings.eta, keep_coef=settings.keep_coef,
        )  # fmt: skip
        config = TrainConfig(
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            warmup_steps=min(settings.warmup_steps, settings.steps // 2),
            weight_decay=0.0,
            max_grad_norm=settings.max_grad_norm,
            seed=settings.seed,
            save_every=settings.save_every,
        )
        folder = run.path / "training"
        folder.mkdir(exist_ok=True)
        stream = BakingBatches(latents, numbers, settings.batch_size, settings.seed)
        train(objective, stream, config, folder, resume=(folder / "checkpoints").exists(), report=say)
        if not any(p.any() for name, p in parameters.items() if "lora_B" in name):
            raise CheckFailed("training left the LoRA at nothing", hint="more --steps")
        facts = described(settings, applied, policy)
        write_baked(run.path, student, facts)
    say(f"\nbaked    {settings.out}: no negative prompt is needed")
    return facts


def read_prompts(path: Path | None) -> list[str]:
    if path is None:
        raise UsageError("no prompts were given", expected="--prompts FILE", hint="a text file, a prompt a line")
    if not path.is_file():
        raise UsageError(f"{path} cannot be read", expected="a text file, a prompt a line", received="no such file")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise UsageError(f"{path} holds no prompts", expected="a prompt a line", received="empty lines")
    return list(dict.fromkeys(prompts))


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
    filled = {name: facts[name] for name in ("concept", "eta", "steps", "model")}
    (staged / "README.md").write_text(README.format(policy=facts["baked_policy"], **filled), encoding="utf-8")
    (staged / CONFIG).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    install(staged, out)
