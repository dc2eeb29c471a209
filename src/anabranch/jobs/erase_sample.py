# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase sample`: pictures with the concept as negative prompt, and how each was made."""

import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anabranch.data.streams import derived_seed
from anabranch.errors import UsageError
from anabranch.jobs.erase_settings import SampleSettings
from anabranch.jobs.stages import say
from anabranch.models.diffusion.conditioning import Conditioning
from anabranch.models.diffusion.family import image_side, open_pipeline
from anabranch.models.diffusion.latents import to_pixels
from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.detectors import contains, detect_checked, open_detector
from anabranch.suppress.detectors.protocol import Detector
from anabranch.suppress.geom_erasing.adapter import Applied, apply
from anabranch.suppress.geom_erasing.bins import Bin, Grid, covered_bins
from anabranch.suppress.guidance import Guidance, Negative, ThreeBranch, check_guidance, first_noise, sample
from anabranch.train.publish import publish_folder


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are drawn: what does not depend on the prompt."""

    scale: float
    steps: int
    batch_size: int = 8
    negative_scale: float | None = None
    window: tuple[float, float] = (0.0, 1.0)


def draw(
    pipe: Any, prompts: Sequence[str], negatives: Sequence[str] | Conditioning, seeds: Sequence[int], how: Sampling
) -> Tensor:
    """(N, C, S, S) uint8, one prompt, negative and seed a picture."""
    return to_pixels(pipe, draw_latents(pipe, prompts, negatives, seeds, how))


def draw_latents(
    pipe: Any, prompts: Sequence[str], negatives: Sequence[str] | Conditioning, seeds: Sequence[int], how: Sampling
) -> Tensor:
    """(N, c, h, w)."""
    parts = []
    for rows in batches(len(prompts), how.batch_size):
        positive = encode_prompts(pipe, [prompts[i] for i in rows])
        negative = (
            negatives.take(torch.tensor(rows))
            if isinstance(negatives, Conditioning)
            else encode_prompts(pipe, [negatives[i] for i in rows])
        )
        chosen = [seeds[i] for i in rows]
        parts.append(sample(pipe, rule(pipe, positive, negative, how), first_noise(pipe, chosen), how.steps, chosen))
    return torch.cat(parts)


def rule(pipe: Any, positive: Conditioning, negative: Conditioning, how: Sampling) -> Guidance:
    empty = encode_prompts(pipe, [""]).repeat(len(positive))
    common = {"positive": positive, "negative": negative, "empty": empty, "scale": how.scale, "window": how.window}
    if how.negative_scale is None:
        return Negative(**common)
    return ThreeBranch(**common, negative_scale=how.negative_scale)


def batches(count: int, size: int) -> Iterator[list[int]]:
    for start in range(0, count, size):
        yield list(range(start, min(start + size, count)))


def bins_found(pixels: Tensor, detector: Detector, grid: Grid) -> list[list[Bin]]:
    """The bins of what a detector sees in each picture; [] where it sees nothing."""
    found = []
    for detections in detect_checked(detector, as_arrays(pixels)):
        boxes = [d.box for d in detections if d.score > detector.threshold and d.box is not None]
        if contains(detections, detector.threshold) and not boxes:
            raise UsageError(
                f"{detector.name} sees the concept but not where",
                expected="a detector with boxes",
                hint="policy name, or a detector that places boxes",
            )
        side = pixels.shape[-1]
        found.append(covered_bins(boxes, side, side, grid) if boxes else [])
    return found


def as_arrays(pixels: Tensor) -> list[np.ndarray]:
    """(H, W, 3) uint8 each, as detectors take them."""
    return list(pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())


def draw_with(
    applied: Applied,
    policy: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    how: Sampling,
    *,
    own: str = "",
    detector: Detector | None = None,
) -> Tensor:
    """`draw` under one of the adapter's policies; `detected` makes again what the detector finds the concept in."""
    count = len(prompts)
    if policy != "detected":
        return draw(applied.pipe, prompts, applied.negative(policy, count, own=own, seed=seeds[0]), seeds, how)
    if detector is None:
        raise UsageError("policy detected needs a detector", expected="--detector", hint="or the policy name")
    first = draw(applied.pipe, prompts, [own] * count, seeds, how)
    bins = bins_found(first, detector, applied.adapter.vocabulary.grid)
    again = [i for i, places in enumerate(bins) if places]
    if again:
        negative = applied.negative("detected", len(again), own=own, detected=[bins[i] for i in again])
        first[again] = draw(applied.pipe, [prompts[i] for i in again], negative, [seeds[i] for i in again], how)
    return first


def sampling_of(pipe: Any, settings: Any, **more: Any) -> Sampling:
    """The pipeline's own scale and steps where none were given."""
    defaults = inspect.signature(type(pipe).__call__).parameters
    scale, steps = settings.guidance, settings.steps
    return Sampling(
        scale=float(defaults["guidance_scale"].default if scale is None else scale),
        steps=int(defaults["num_inference_steps"].default if steps is None else steps),
        batch_size=settings.batch_size,
        **more,
    )


def erase_sample(settings: SampleSettings) -> list[dict[str, Any]]:
    """Write settings.out, pictures and metadata.jsonl; returns its rows."""
    if not settings.prompt or settings.count < 1:
        raise UsageError("nothing to draw", expected="--prompt TEXT ..., and a --count of at least 1")
    pipe = open_pipeline(settings.model)
    how = sampling_of(pipe, settings, negative_scale=settings.negative_scale, window=settings.window)
    prompts = [prompt for prompt in settings.prompt for _ in range(settings.count)]
    seeds = [derived_seed("picture", settings.seed, number) % 2**32 for number in range(len(prompts))]
    if settings.adapter is None:
        refuse_adapter_settings(settings)
        policy = "none"
        drawn = draw(pipe, prompts, [settings.negative] * len(prompts), seeds, how)
    else:
        applied = apply(pipe, settings.adapter, strength=settings.strength)
        policy = settings.policy or applied.policy
        if policy != "none":
            check_guidance(pipe, how.scale)
        detector = None
        if policy == "detected":
            detector = open_detector(
                settings.detector, concept=str(applied.adapter.config["concept"]), threshold=settings.threshold
            )
        drawn = draw_with(applied, policy, prompts, seeds, how, own=settings.negative, detector=detector)
    rows = [
        {"file_name": f"{number:05d}.png", "text": prompt, "seed": seed, "policy": policy}
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    publish_folder(lambda folder: write_pictures(folder, drawn, rows), settings.out)
    say(f"{len(rows)} pictures of {image_side(pipe)} pixels, policy {policy}, guidance {how.scale:g}: {settings.out}")
    return rows


def refuse_adapter_settings(settings: SampleSettings) -> None:
    for name in ("policy", "detector", "negative_scale", "strength"):
        if getattr(settings, name) != getattr(SampleSettings, name):
            raise UsageError(
                f"{name} would change nothing without an adapter",
                received=getattr(settings, name),
                hint="--adapter FOLDER",
            )


def write_pictures(folder: Path, pixels: Tensor, rows: Sequence[dict[str, Any]]) -> None:
    """PNG files and metadata.jsonl, which the `datasets` library reads."""
    for image, row in zip(pixels.permute(0, 2, 3, 1).numpy(), rows, strict=True):
        Image.fromarray(image.squeeze()).save(folder / row["file_name"])
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
