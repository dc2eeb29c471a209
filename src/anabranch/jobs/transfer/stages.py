# SPDX-License-Identifier: Apache-2.0
"""What the stories of `pretrain` have in common: a folder, images, a base, a stage of training, a summary."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anabranch.data.images import Images, write_quarantine
from anabranch.data.streams import ShuffledIndices, derived_seed
from anabranch.errors import CheckFailed
from anabranch.jobs.progress import say
from anabranch.jobs.settings import plain_values_of
from anabranch.jobs.together import first_alone
from anabranch.jobs.transfer.corpus import at_most, check_same_images, mixture, open_together
from anabranch.jobs.transfer.learners import family_of, learner, training
from anabranch.jobs.transfer.settings import PretrainSettings
from anabranch.train.loop import TrainConfig, train
from anabranch.train.processes import processes
from anabranch.train.publish import replace_folder, write_json
from anabranch.train.run_folder import RunFolder
from anabranch.train.touch import digest

TOUCHED = "touched.json"
LOOK_IMAGES = 2000


def learner_of(settings: PretrainSettings) -> str:
    """How the model learns that the method starts from, or is."""
    return {"moce": "mae", "token-moe": "mae", "sdr": settings.ssl}.get(settings.method, settings.method)


@contextmanager
def open_run(settings: PretrainSettings, images: Images) -> Iterator[Path]:
    """The run's folder, created or resumed, which has seen these images and no others."""
    with RunFolder.open(settings.out, plain_values_of(settings), settings.resume) as run:
        note_images(images, run.path)
        yield run.path


def open_pool(settings: PretrainSettings) -> Images:
    """All images of all folders at the model's size."""
    family = learner(learner_of(settings)).FAMILY
    size, channels, preset = settings.image_size, settings.channels, settings.preset
    if settings.base is not None:
        config = family_of(learner_of(settings)).load(settings.base).config
        size, channels, preset = getattr(config, "image_size", None), config.num_channels, None
    unlabelled = [False] * len(settings.images)
    images = mixture(open_together(settings.images, unlabelled, size, channels, preset, family))
    say(f"{len(images):,} images of {images.channels} x {images.image_size} x {images.image_size}")
    return images


def note_images(images: Images, run: Path) -> None:
    """Unreadable images are listed in quarantine.jsonl; a resumed run has to see the images that it began with."""
    check_same_images(run, [images])
    if processes().is_main_process and images.quarantine:
        write_quarantine(run / "quarantine.jsonl", images.quarantine)
        say(f"{len(images.quarantine)} unreadable images are listed in {run / 'quarantine.jsonl'}")


def start_model(settings: PretrainSettings, images: Images, run: Path) -> nn.Module:
    """The given base, which is kept in RUN/base, or a fresh model."""
    family = family_of(learner_of(settings))
    if settings.base is None:
        fresh: nn.Module = family.build(
            settings.preset, image_size=images.image_size, channels=images.channels, seed=settings.seed
        )
        return fresh
    base: nn.Module = family.load(settings.base)
    base.config.image_size = images.image_size  # a ResNet from elsewhere names none
    publish_once(run / "base", base.save_pretrained)
    return base


def obtain_base(settings: PretrainSettings, images: Images, run: Path, steps: int) -> nn.Module:
    """The model that the next stage starts from: given, finished before, or trained now for `steps`."""
    name = learner_of(settings)
    if settings.base is None and (run / "base").exists():
        finished: nn.Module = family_of(name).load(run / "base")
        return finished
    base = start_model(settings, images, run)
    if settings.base is not None:
        return base
    say(f"base: one model of all images ({name})")
    objective = learner(name).objective(base, seed=settings.seed)
    stream = plain_stream(settings, images, base, settings.seed)
    train_stage(settings, objective, stream, steps, run / "base-training", settings.learning_rate)
    publish(run / "base", lambda folder: base.eval().save_pretrained(folder))
    return base


def second_stage(settings: PretrainSettings) -> int:
    """Seed of the batches and masks after the base: others than it has seen."""
    return derived_seed("second stage", settings.seed)


def plain_stream(settings: PretrainSettings, images: Images, model: nn.Module, seed: int) -> Any:
    indices = ShuffledIndices(len(images), settings.batch_size, seed)
    return learner(learner_of(settings)).stream(images, model, indices, seed=seed, augment=settings.augment)


def train_stage(
    settings: PretrainSettings, objective: nn.Module, stream: Any, steps: int, folder: Path, rate: float | None
) -> dict[str, Any]:
    """Train, or go on training, in a folder of its own; fails if training left every named tensor as it was.

    rate     peak of the learning rate; None takes that of how the model learns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(
        steps=steps,
        batch_size=settings.batch_size,
        **training(learner_of(settings), rate, settings.weight_decay),
        warmup_steps=min(settings.warmup_steps, steps // 2),
        seed=settings.seed,
        save_every=settings.save_every,
        mixed_precision=settings.mixed_precision,
        sharding=settings.sharding,
        tracker=settings.tracker,
    )
    before, trainable = digest(objective), [n for n, p in objective.named_parameters() if p.requires_grad]
    result = train(objective, stream, config, folder, resume=(folder / "checkpoints").exists(), report=say)
    if result.losses and processes().is_main_process:
        write_json(folder / TOUCHED, touched(before, digest(objective), trainable, followers(objective)))
    processes().wait_for_everyone()
    facts = json.loads((folder / TOUCHED).read_text(encoding="utf-8"))
    say(f"{facts['named']} tensors named, {facts['changed']} changed, {len(facts['untouched'])} of the named as before")
    return {"steps": result.step, "images_seen": result.step * settings.batch_size, **facts}


def followers(objective: nn.Module) -> set[str]:
    """Tensors that change without a gradient: running statistics, and what the objective's `follows()` names.

    `follows` gives patterns such as "target_*", for a network that is a moving average of another one.
    """
    patterns = objective.follows() if hasattr(objective, "follows") else []
    named = {name for name in objective.state_dict() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    norms = [name for name, module in objective.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return named | {f"{name}.{statistic}" for name in norms for statistic in statistics}


def touched(
    before: dict[str, str], after: dict[str, str], trainable: list[str], followers: set[str] | frozenset[str]
) -> dict[str, Any]:
    """What training named and changed; raises if it changed a tensor that it did not name."""
    changed = {name for name in before if before[name] != after[name]}
    if strangers := changed - set(trainable) - followers:
        raise CheckFailed("tensors changed that were not to change", received=", ".join(sorted(strangers)[:5]))
    untouched = [name for name in trainable if name not in changed]
    return {"named": len(trainable), "changed": len(trainable) - len(untouched), "untouched": untouched}


def publish(folder: Path, write: Callable[[Path], Any]) -> None:
    """The first process writes; nobody goes on before it is there."""
    first_alone(lambda: replace_folder(write, folder))


def publish_once(folder: Path, write: Callable[[Path], Any]) -> None:
    """As `publish`, if it is not there yet: the first process looks, for a later one would see what that one wrote."""
    first_alone(lambda: None if folder.exists() else replace_folder(write, folder))


def pixel_statistics(images: Images) -> dict[str, list[float]]:
    """Mean and standard deviation of every channel, in [0, 1], over a sample."""
    few = at_most(images, LOOK_IMAGES, seed=0)
    pixels = few.store.read(torch.arange(len(few))).float() / 255
    return {"pixel_mean": pixels.mean((0, 2, 3)).tolist(), "pixel_std": pixels.std((0, 2, 3)).tolist()}


def finish(run: Path, settings: PretrainSettings, images: Images, summary: dict[str, Any]) -> None:
    """summary.json and report.html; the summary is filled up in place."""
    if not processes().is_main_process:
        return
    summary |= {"method": settings.method, "images": len(images), "quarantine": len(images.quarantine)}
    summary |= pixel_statistics(images)
    write_json(run / "summary.json", summary)
    from anabranch.jobs.transfer.pretrain_page import write_pretrain_page

    write_pretrain_page(run, images)
