# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase train`: from a model and the labels of a scan to an adapter.

OUT/training         checkpoints, metrics.jsonl, latents of the images: what a stopped run goes on from
OUT/*                the adapter, see suppress/geom_erasing/adapter.py; geom_config.json is written last
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anabranch.data.boxes import flip_boxes, transform_boxes
from anabranch.data.captions import read_captions
from anabranch.data.folders import decode_into
from anabranch.data.images import UnreadableImages, allocate
from anabranch.data.labels import Label, Labels, read_labels
from anabranch.errors import CheckFailed, UsageError
from anabranch.jobs.erase_card import adapter_card
from anabranch.jobs.erase_settings import TrainSettings
from anabranch.jobs.stages import say
from anabranch.models.diffusion.family import family, image_side, open_pipeline
from anabranch.models.diffusion.latents import to_latents
from anabranch.suppress.captioned import CaptionedBatches
from anabranch.suppress.denoising import Denoising
from anabranch.suppress.geom_erasing.adapter import CONFIG, fingerprint, hashes, save_adapter
from anabranch.suppress.geom_erasing.bins import Box
from anabranch.suppress.geom_erasing.erase import Config, Prepared, check_contrast, grid_of, prepare
from anabranch.suppress.geom_erasing.negatives import strangers
from anabranch.suppress.geom_erasing.words import Vocabulary, check_room, room, token_count
from anabranch.train.loop import TrainConfig, train
from anabranch.train.publish import sync
from anabranch.train.run_folder import RunFolder
from anabranch.train.signals import StopFlag
from anabranch.train.touch import digest

RATES = {"lora": 1e-4, "denoiser": 1e-5, "tokens": 1e-3}
TRAINING, LATENTS = "training", "latents.safetensors"


def erase_train(settings: TrainSettings) -> dict[str, Any]:
    """Train and write `settings.out`; returns what geom_config.json holds."""
    labels = read_labels(settings.labels, settings.images)
    config = erase_config(settings)
    concept = settings.concept or labels.concept
    if not concept:
        raise UsageError("the concept has no name", expected="--concept NAME", hint="such as --concept watermark")
    pipe = open_pipeline(settings.model)
    vocabulary = vocabulary_of(settings, concept)
    check_room(pipe, vocabulary.name if not vocabulary.new_name else "", 1, "one place")
    captions = read_captions(labels.root, [row.file for row in labels.rows], settings.caption)
    side = image_side(pipe)
    boxes = [boxes_in_square(row, side) for row in labels.rows]
    warnings = [warning] if (warning := check_contrast(boxes)) else []
    with StopFlag(), RunFolder.open(settings.out, plain_values_of(settings), settings.resume) as run:
        latents = latents_of(pipe, labels, side, run.path / TRAINING, settings.flip)
        rows = doubled(captions, boxes, labels, side, settings.flip)
        base, before = fingerprint(pipe), hashes(pipe)
        prepared = prepare(
            pipe, vocabulary, config, latents, rows[0], rows[1], size=side, word=concept, time_ids=rows[2](pipe)
        )
        facts = run_training(settings, pipe, prepared, run.path / TRAINING)
        check_untouched(pipe, before, config)
        found = [bins for bins in prepared.bins if bins]
        policy = settings.policy or default_policy(config, vocabulary, pipe)
        most = room(pipe) - token_count(pipe, vocabulary.name)
        warnings += [warning] if (warning := strangers(policy, vocabulary, found, most)) else []
        facts |= described(settings, labels, prepared, config) | {"base": base, "policy": policy, "warnings": warnings}
        write_adapter(settings, run.path, pipe, vocabulary, prepared, found, facts | {"concept": concept})
    tell(settings, facts)
    return facts


def erase_config(settings: TrainSettings) -> Config:
    if settings.mode == "model" and settings.trained == "denoiser":
        raise UsageError(
            "trained=denoiser would change nothing: mode model trains the new words alone",
            hint="--mode data, or leave --trained out",
        )
    try:
        return Config(
            mode=settings.mode,
            trained="tokens" if settings.mode == "model" else settings.trained,
            alpha=settings.alpha,
            r=settings.r,
            token_rate=1.0 if settings.mode == "model" or settings.trained == "tokens" else settings.token_rate,
            seed=settings.seed,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def vocabulary_of(settings: TrainSettings, concept: str) -> Vocabulary:
    if settings.concept_token == "word":
        return Vocabulary(name=concept, grid=grid_of(settings.grid), new_name=False)
    word = "_".join("".join(c if c.isalnum() else " " for c in concept.lower()).split())
    return Vocabulary(name=f"<{word or 'concept'}>", grid=grid_of(settings.grid))


def boxes_in_square(row: Label, side: int) -> list[Box] | None:
    """Where the concept is in the square that the model sees; None of a clean image, [] where no box is known."""
    if not row.has_concept:
        return None
    kept = transform_boxes(row.boxes, row.width, row.height, side)
    return None if row.boxes and not kept else kept  # cut off with the margin: the square is clean


def latents_of(pipe: Any, labels: Labels, side: int, folder: Path, flip: bool) -> Tensor:
    """(N, c, h, w), encoded once; kept in the run for a resume."""
    key = latents_key(pipe, labels, side, flip)
    file = folder / LATENTS
    if file.is_file():
        kept = load_file(file)
        if key in kept:
            return kept[key]
    pixels = pixels_of(labels, side, pipe.vae.config.in_channels)
    parts = [to_latents(pipe, pixels)]
    if flip:
        parts.append(to_latents(pipe, pixels.flip(-1)))
    latents = torch.cat(parts).cpu()
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    save_file({key: latents}, unfinished)
    os.replace(unfinished, file)
    return latents


def latents_key(pipe: Any, labels: Labels, side: int, flip: bool) -> str:
    parts = [f"{row.file} {row.sha256} {row.width} {row.height}" for row in labels.rows]
    autoencoder = sorted(digest(pipe.vae).items())
    return hashlib.sha256(repr((parts, autoencoder, side, flip)).encode()).hexdigest()[:32]


def pixels_of(labels: Labels, side: int, channels: int) -> Tensor:
    """(N, C, S, S) uint8: resized and cropped to the middle, as the boxes are."""
    files = [row.file for row in labels.rows]
    decoded = decode_into(allocate((len(files), channels, side, side)), labels.root, files, None)
    if decoded.bad:
        bad = tuple(decoded.bad.values())
        raise UnreadableImages(
            f"{labels.root}: {len(bad)} images of the labels cannot be read",
            bad,
            received="; ".join(f"{b.path!r} ({b.reason})" for b in bad[:3]),
            hint="scan the folder again",
        )
    return decoded.pixels


def doubled(
    captions: list[str], boxes: list[list[Box] | None], labels: Labels, side: int, flip: bool
) -> tuple[list[str], list[list[Box] | None], Any]:
    """Captions, boxes and time ids of all rows: of the mirrored ones as well, where they are there."""
    sizes = torch.tensor([time_ids_of(row, side) for row in labels.rows], dtype=torch.float32)

    def time_ids(pipe: Any) -> Tensor | None:
        if not family(pipe).__name__.endswith("_xl"):
            return None
        return torch.cat([sizes, sizes]) if flip else sizes

    if not flip:
        return captions, boxes, time_ids
    mirrored = [None if found is None else flip_boxes(found, side) for found in boxes]
    return captions * 2, [*boxes, *mirrored], time_ids


def time_ids_of(row: Label, side: int) -> list[int]:
    """Original height and width, where the square was cut out (in pixels of the model), and its size."""
    scale = side / min(row.width, row.height)
    top, left = (row.height * scale - side) / 2, (row.width * scale - side) / 2
    return [row.height, row.width, round(top), round(left), side, side]


def run_training(settings: TrainSettings, pipe: Any, prepared: Prepared, folder: Path) -> dict[str, Any]:
    kind = "tokens" if settings.mode == "model" else settings.trained
    objective = Denoising(pipe, prepared.parameters)
    stream = CaptionedBatches(
        prepared.data,
        settings.batch_size,
        seed=settings.seed,
        prompt_dropout=settings.prompt_dropout,
        caption_dropout=settings.caption_dropout,
    )
    config = TrainConfig(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate or RATES[kind],
        warmup_steps=min(settings.warmup_steps, settings.steps // 2),
        weight_decay=0.0,  # of new words it would be a pull towards the origin
        betas=(0.9, 0.99),
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        save_every=settings.save_every,
        mixed_precision=settings.mixed_precision,
    )
    folder.mkdir(parents=True, exist_ok=True)
    before = prepared.attached.rows()
    resumed = (folder / "checkpoints").exists()
    result = train(objective, stream, config, folder, resume=resumed, report=say)
    pipe_norms = {
        name: round(float((rows - before[name]).norm(dim=1).mean() / before[name].norm(dim=1).mean()), 4)
        for name, rows in prepared.attached.rows().items()
    }
    if not any(pipe_norms.values()):
        raise CheckFailed("training left the new words as they were", hint="more --steps, or a higher learning_rate")
    return {"steps": result.step, "words_moved": pipe_norms}


def check_untouched(pipe: Any, before: dict[str, str], config: Config) -> None:
    """Nothing may have changed but what was named: new words, LoRA, or the denoiser where it is trained."""
    after = hashes(pipe)
    renamed = {name.replace(".base_layer", "").replace(".table.", "."): value for name, value in after.items()}
    changed = [name for name, value in before.items() if renamed.get(name) != value]
    allowed = family(pipe).DENOISER if config.trained == "denoiser" else None
    if strange := [name for name in changed if allowed is None or not name.startswith(f"{allowed}.")]:
        raise CheckFailed("tensors changed that were not to change", received=", ".join(strange[:5]))
    new = [name for name in renamed if name not in before]
    say(f"{len(new)} new tensors, {len(changed)} changed, {len(before) - len(changed)} as before")


def default_policy(config: Config, vocabulary: Vocabulary, pipe: Any) -> str:
    if config.mode == "data":
        return "name"
    fits = len(vocabulary.grid) <= room(pipe) - token_count(pipe, vocabulary.name)
    return "all" if fits else "prior"


def described(settings: TrainSettings, labels: Labels, prepared: Prepared, config: Config) -> dict[str, Any]:
    return {
        "model": str(settings.model),
        "mode": config.mode,
        "trained": config.trained,
        "alpha": config.alpha,
        "r": config.r,
        "seed": settings.seed,
        "images": len(labels.rows),
        "with_concept": sum(row.has_concept for row in labels.rows),
        "detector": labels.detector,
        "detector_version": labels.version,
        "threshold": labels.threshold,
        "coarsened": prepared.coarsened,
        "captions_cut": prepared.cut,
    }


def write_adapter(
    settings: TrainSettings,
    out: Path,
    pipe: Any,
    vocabulary: Vocabulary,
    prepared: Prepared,
    found: list[Any],
    facts: dict[str, Any],
) -> None:
    """Into a folder of its own first."""
    staged = out / ".adapter"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    save_adapter(
        pipe, staged, vocabulary, prepared.attached, found, facts, publish_tokens=settings.publish_tokens
    )  # fmt: skip
    written = json.loads((staged / CONFIG).read_text(encoding="utf-8"))
    (staged / "README.md").write_text(adapter_card(pipe, written), encoding="utf-8")
    install(staged, out)


def install(staged: Path, out: Path) -> None:
    """Move files from `staged` to `out`; geom_config.json, which makes the folder an adapter, comes last."""
    (out / CONFIG).unlink(missing_ok=True)
    for path in sorted(staged.iterdir(), key=lambda path: path.name == CONFIG):
        if path.is_dir():
            shutil.rmtree(out / path.name, ignore_errors=True)
        else:
            sync(path)
        os.replace(path, out / path.name)
    staged.rmdir()
    sync(out)


def tell(settings: TrainSettings, facts: dict[str, Any]) -> None:
    moved = ", ".join(f"{name} {share:.0%}" for name, share in facts["words_moved"].items())
    say(f"new words moved by {moved} of their length")
    if facts["coarsened"]:
        say(f"{facts['coarsened']} images covered more bins than a prompt has room for; those were thinned out")
    if facts["captions_cut"]:
        say(f"{facts['captions_cut']} captions were cut to make room for the places")
    for warning in facts["warnings"]:
        say(f"warning: {warning}")
    say(f"\nadapter  {settings.out}  (default policy {facts['policy']})")
    say(f"next     anabranch erase sample --model {settings.model} --adapter {settings.out} --prompt '...'")


def plain_values_of(settings: TrainSettings) -> dict[str, Any]:
    values = {name: value for name, value in asdict(settings).items() if name not in ("out", "resume")}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
