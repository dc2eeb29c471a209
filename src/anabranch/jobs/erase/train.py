# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase train`: from a model and the labels of a scan to an adapter.

OUT/training         checkpoints, metrics.jsonl, latents of the images: what a stopped run goes on from
OUT/*                the adapter, see suppress/geom_erasing/adapter.py; geom_config.json is written last
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.data.boxes import flip_boxes, transform_boxes
from anabranch.data.captions import read_captions
from anabranch.data.folders import decode_into
from anabranch.data.images import UnreadableImages, allocate
from anabranch.data.labels import Label, Labels
from anabranch.errors import CheckFailed, Stopped
from anabranch.jobs.erase.card import adapter_card
from anabranch.jobs.erase.checks import open_labels, open_model
from anabranch.jobs.erase.plan import (
    check_vocabulary,
    concept_of,
    erase_config,
    place_room,
    policy_of,
    refuse_mirrors,
    training_config,
    vocabulary_of,
    warnings_for,
)
from anabranch.jobs.erase.settings import TrainSettings
from anabranch.jobs.progress import say
from anabranch.jobs.resumed import fingerprint_of, kept, same_as_before
from anabranch.jobs.settings import plain_values_of
from anabranch.jobs.together import first_alone
from anabranch.models.diffusion.family import family, image_side
from anabranch.models.diffusion.latents import CHUNK, to_latents
from anabranch.models.diffusion.noising import noising
from anabranch.suppress.captioned import CaptionedBatches
from anabranch.suppress.denoising import Denoising
from anabranch.suppress.geom_erasing.adapter import fingerprint, hashes, save_adapter
from anabranch.suppress.geom_erasing.adapter_folder import CONFIG
from anabranch.suppress.geom_erasing.bins import Box
from anabranch.suppress.geom_erasing.erase import Config, Prepared, prepare
from anabranch.suppress.geom_erasing.negatives import strangers
from anabranch.suppress.geom_erasing.words import Vocabulary
from anabranch.train.loop import TrainConfig, train
from anabranch.train.publish import install
from anabranch.train.run_folder import RunFolder
from anabranch.train.signals import StopFlag
from anabranch.train.touch import digest

TRAINING, LATENTS, SEEN = "training", "latents.safetensors", "seen.json"
STILL = 1e-6
"""Share of its length by which a word that learned nothing may still move."""


def erase_train(settings: TrainSettings) -> dict[str, Any]:
    """Train and write `settings.out`; returns what geom_config.json holds."""
    config, training = erase_config(settings), training_config(settings)
    labels = open_labels(settings.labels, settings.images)
    refuse_mirrors(settings, labels)
    pipe = open_model(settings.model)
    noising(pipe.scheduler)  # refuses what cannot be trained for
    concept = concept_of(settings, labels)
    vocabulary = vocabulary_of(settings, concept)
    check_vocabulary(pipe, vocabulary)
    captions = read_captions(labels.root, [row.file for row in labels.rows], settings.caption)
    side = image_side(pipe)
    boxes = [boxes_in_square(row, side) for row in labels.rows]
    warnings = warnings_for(settings, pipe, boxes, captions, vocabulary)
    policy = policy_of(settings, config, pipe, vocabulary, boxes)
    for warning in warnings:
        say(f"warning: {warning}")
    with StopFlag() as stop, RunFolder.open(settings.out, plain_values_of(settings), settings.resume) as run:
        base, before = fingerprint(pipe), hashes(pipe)
        seen = {"model": base, "labels": fingerprint_of(labels.rows), "captions": fingerprint_of(captions)}
        same_as_before(run.path / TRAINING / SEEN, seen)
        latents = latents_of(pipe, labels, side, run.path / TRAINING, settings.flip, stop)
        captions, boxes, sizes = doubled(captions, boxes, labels, side, settings.flip)
        time_ids = sizes if family(pipe).__name__.endswith("_xl") else None
        prepared = prepare(
            pipe, vocabulary, config, latents, captions, boxes, size=side, word=concept, time_ids=time_ids
        )
        facts = run_training(settings, training, pipe, prepared, run.path / TRAINING)
        facts["touched"] = check_untouched(pipe, before, config.trained)
        found = [bins for bins in prepared.bins if bins]
        warnings += [warning] if (warning := strangers(policy, vocabulary, found, place_room(pipe, vocabulary))) else []
        facts |= described(settings, labels, prepared, config) | {"base": base, "policy": policy, "warnings": warnings}
        told = facts | {"concept": concept}
        first_alone(lambda: write_adapter(settings, run.path, pipe, vocabulary, prepared, found, told))
    tell(settings, facts)
    return facts


# the data


def boxes_in_square(row: Label, side: int) -> list[Box] | None:
    """Where the concept is in the square that the model sees; None of a clean image, [] where no box is known."""
    if not row.has_concept:
        return None
    kept = transform_boxes(row.boxes, row.width, row.height, side)
    return None if row.boxes and not kept else kept  # cut off with the margin: the square is clean


def latents_of(pipe: Any, labels: Labels, side: int, folder: Path, flip: bool, stop: StopFlag) -> Tensor:
    """(N, c, h, w), encoded once and kept in the run for a resume; with `flip` those of mirrored images as well."""
    key = latents_key(pipe, labels, side, flip)
    return kept(folder / LATENTS, key, lambda: encoded(pipe, labels, side, flip, stop))


def encoded(pipe: Any, labels: Labels, side: int, flip: bool, stop: StopFlag) -> Tensor:
    parts, mirrored = [], []
    for start in range(0, len(labels.rows), CHUNK):
        if stop.is_set:
            raise Stopped(
                f"stopped on request with {start} of {len(labels.rows)} images encoded; none of them was kept",
                hint="the same command with --resume",
            )
        pixels = pixels_of(labels, labels.rows[start : start + CHUNK], side, pipe.vae.config.in_channels)
        parts.append(to_latents(pipe, pixels).cpu())
        if flip:
            mirrored.append(to_latents(pipe, pixels.flip(-1)).cpu())
    return torch.cat(parts + mirrored)


def latents_key(pipe: Any, labels: Labels, side: int, flip: bool) -> str:
    parts = [f"{row.file} {row.sha256} {row.width} {row.height}" for row in labels.rows]
    autoencoder = sorted(digest(pipe.vae).items())
    return hashlib.sha256(repr((parts, autoencoder, side, flip)).encode()).hexdigest()[:32]


def pixels_of(labels: Labels, rows: Sequence[Label], side: int, channels: int) -> Tensor:
    """(n, C, S, S) uint8: resized and cropped to the middle, as the boxes are."""
    files = [row.file for row in rows]
    decoded = decode_into(allocate((len(files), channels, side, side)), labels.root, files, None)
    if decoded.bad:
        bad = tuple(decoded.bad.values())
        raise UnreadableImages(
            f"{labels.root}: images of the labels cannot be read",
            bad,
            expected="every image as it was scanned",
            received="; ".join(f"{b.path!r} ({b.reason})" for b in bad[:3]),
            hint="scan the folder again",
        )
    return decoded.pixels


def doubled(
    captions: list[str], boxes: list[list[Box] | None], labels: Labels, side: int, flip: bool
) -> tuple[list[str], list[list[Box] | None], Tensor]:
    """Captions, boxes and time ids of all rows: of the mirrored ones as well, where they are there."""
    sizes = torch.tensor([time_ids_of(row, side) for row in labels.rows], dtype=torch.float32)
    if not flip:
        return captions, boxes, sizes
    mirrored = [None if found is None else flip_boxes(found, side) for found in boxes]
    return captions * 2, [*boxes, *mirrored], torch.cat([sizes, sizes])


def time_ids_of(row: Label, side: int) -> list[int]:
    """Original height and width, where the square was cut out (in pixels of the model), and its size."""
    scale = side / min(row.width, row.height)
    top, left = (row.height * scale - side) / 2, (row.width * scale - side) / 2
    return [row.height, row.width, round(top), round(left), side, side]


# train, look, write


def run_training(
    settings: TrainSettings, config: TrainConfig, pipe: Any, prepared: Prepared, folder: Path
) -> dict[str, Any]:
    objective = Denoising(pipe, prepared.parameters)
    stream = CaptionedBatches(
        prepared.data,
        settings.batch_size,
        seed=settings.seed,
        prompt_dropout=settings.prompt_dropout,
        caption_dropout=settings.caption_dropout,
    )
    before = prepared.attached.rows()
    result = train(objective, stream, config, folder, resume=(folder / "checkpoints").exists(), report=say)
    after = prepared.attached.rows()
    moved = {
        name: float((rows - before[name]).norm(dim=1).mean() / before[name].norm(dim=1).mean())
        for name, rows in after.items()
    }
    if not any(share > STILL for share in moved.values()):
        raise CheckFailed(
            "training left the new words as they were",
            expected="words that moved",
            received=f"the same after {result.step} steps",
            hint="more --steps, or a higher learning_rate",
        )
    return {"steps": result.step, "words_moved": {name: round(share, 4) for name, share in moved.items()}}


def check_untouched(pipe: Any, before: dict[str, str], trained: str) -> dict[str, int]:
    """Nothing may have changed but what was named: new words, LoRA, or the denoiser where it is trained."""
    after = hashes(pipe)
    renamed = {name.replace(".base_layer", "").replace(".table.", "."): value for name, value in after.items()}
    changed = [name for name, value in before.items() if renamed.get(name) != value]
    allowed = family(pipe).DENOISER if trained == "denoiser" else None
    if strange := [name for name in changed if allowed is None or not name.startswith(f"{allowed}.")]:
        raise CheckFailed("tensors changed that were not to change", received=", ".join(strange[:5]))
    new = [name for name in renamed if name not in before]
    found = {"new": len(new), "changed": len(changed), "as_before": len(before) - len(changed)}
    say("{new} new tensors, {changed} changed, {as_before} as before".format(**found))
    return found


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
    install(staged, out, last=CONFIG)


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
