# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase sample`: pictures with the concept as negative prompt, and how each was made."""

import inspect
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anabranch.data.streams import derived_seed
from anabranch.errors import UsageError
from anabranch.jobs.erase.checks import open_model
from anabranch.jobs.erase.settings import SampleSettings
from anabranch.jobs.progress import say
from anabranch.models.diffusion.conditioning import Conditioning
from anabranch.models.diffusion.family import image_side
from anabranch.models.diffusion.latents import to_pixels
from anabranch.models.diffusion.prompts import encode_negatives, encode_prompts
from anabranch.suppress.detectors import contains, detect_checked, open_detector
from anabranch.suppress.detectors.protocol import Detector
from anabranch.suppress.geom_erasing.adapter import Applied, apply
from anabranch.suppress.geom_erasing.bins import Bin, Grid, covered_bins
from anabranch.suppress.geom_erasing.words import room, token_count
from anabranch.suppress.guidance import Guidance, Negative, ThreeBranch, check_guidance, first_noise, sample
from anabranch.train.publish import publish_folder, refuse_other_results
from anabranch.train.signals import StopFlag

RESULT = "samples.json"


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
    """(N, c, h, w).

    Raises:
        Stopped: a signal came; what was drawn is lost, and drawn again in little time.
    """
    parts = []
    with StopFlag() as stop:
        for rows in batches(len(prompts), how.batch_size):
            stop.check(f"stopped on request with {rows[0]} of {len(prompts)} pictures drawn; none of them was kept")
            positive = encode_prompts(pipe, [prompts[i] for i in rows])
            negative = (
                negatives.take(torch.tensor(rows))
                if isinstance(negatives, Conditioning)
                else encode_negatives(pipe, [negatives[i] for i in rows])
            )
            chosen = [seeds[i] for i in rows]
            parts.append(
                sample(pipe, rule(pipe, positive, negative, how), first_noise(pipe, chosen), how.steps, chosen)
            )
    return torch.cat(parts)


def rule(pipe: Any, positive: Conditioning, negative: Conditioning, how: Sampling) -> Guidance:
    common = {"positive": positive, "negative": negative, "scale": how.scale}
    if how.negative_scale is None and how.window == (0.0, 1.0):
        return Negative(**common)
    common |= {"empty": encode_negatives(pipe, [""]).repeat(len(positive)), "window": how.window}
    return (
        Negative(**common) if how.negative_scale is None else ThreeBranch(**common, negative_scale=how.negative_scale)
    )


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
    how = Sampling(
        scale=float(defaults["guidance_scale"].default if scale is None else scale),
        steps=int(defaults["num_inference_steps"].default if steps is None else steps),
        batch_size=settings.batch_size,
        **more,
    )
    check_sampling(how)
    return how


def check_sampling(how: Sampling) -> None:
    away = how.negative_scale
    start, end = how.window
    for name, fine, expected, received in (
        ("guidance", 0 <= how.scale < math.inf, "a number from 0; above 1 for a negative prompt", how.scale),
        ("steps", how.steps >= 1, "at least 1", how.steps),
        ("batch_size", how.batch_size >= 1, "at least 1", how.batch_size),
        ("negative_scale", away is None or 0 < away < math.inf, "a number above 0, or none", away),
        ("window", 0 <= start < end <= 1, "two shares of the run, the first below the second", [start, end]),
    ):
        if not fine:
            raise UsageError(
                f"{name} cannot be used", expected=expected, received=received, hint=f"leave {name} out for the default"
            )


def erase_sample(settings: SampleSettings) -> list[dict[str, Any]]:
    """Write settings.out: pictures, metadata.jsonl and samples.json; returns the rows of metadata.jsonl."""
    check_request(settings)
    refuse_other_results(settings.out, RESULT)
    pipe = open_model(settings.model)
    how = sampling_of(pipe, settings, negative_scale=settings.negative_scale, window=settings.window)
    applied = None if settings.adapter is None else apply(pipe, settings.adapter, strength=settings.strength)
    policy = "none" if applied is None else settings.policy or applied.policy
    refuse_no_ops(settings, policy)
    if policy != "none" or settings.negative:
        check_guidance(pipe, how.scale)
    detector = None
    if applied is not None and policy == "detected":
        detector = open_detector(
            settings.detector, concept=str(applied.adapter.config["concept"]), threshold=settings.threshold
        )
    warn_of_length(pipe, settings)
    prompts = [prompt for prompt in settings.prompt for _ in range(settings.count)]
    seeds = [derived_seed("picture", settings.seed, number) % 2**32 for number in range(len(prompts))]
    rows = [
        {"file_name": f"{number:05d}.png", "text": prompt, "seed": seed, "policy": policy}
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    facts = facts_of(settings, how, policy)

    def write(folder: Path) -> None:
        if applied is None:
            drawn = draw(pipe, prompts, [settings.negative] * len(prompts), seeds, how)
        else:
            drawn = draw_with(applied, policy, prompts, seeds, how, own=settings.negative, detector=detector)
        write_pictures(folder, drawn, rows, facts)

    publish_folder(write, settings.out)
    say(f"{len(rows)} pictures of {image_side(pipe)} pixels, policy {policy}, guidance {how.scale:g}: {settings.out}")
    return rows


def check_request(settings: SampleSettings) -> None:
    if not settings.prompt or settings.count < 1:
        raise UsageError(
            "nothing to draw",
            expected="--prompt TEXT ..., and a --count of at least 1",
            received=f"{len(settings.prompt)} prompts, count {settings.count}",
            hint="--prompt 'a photo of a street' --count 4",
        )
    if settings.adapter is not None:
        return
    for name in ("policy", "detector", "negative_scale", "strength", "threshold"):
        if getattr(settings, name) != getattr(SampleSettings, name):
            raise UsageError(
                f"{name} would change nothing without an adapter",
                expected="--adapter FOLDER",
                received=f"{name} {getattr(settings, name)} and no adapter",
                hint=f"anabranch erase train makes an adapter; leave {name} out to see the model as it is",
            )


def refuse_no_ops(settings: SampleSettings, policy: str) -> None:
    """A setting that does nothing would be believed to have done something; one that is missing is missed early."""
    if policy != "detected":
        for name in ("detector", "threshold"):
            refuse_no_op(settings, name, "policy detected", policy)
    elif not settings.detector:
        raise UsageError(
            "policy detected needs a detector",
            expected="--detector, as in anabranch erase scan",
            received="none",
            hint="--detector qr, or --policy name",
        )
    if policy == "none" and not settings.negative:
        for name in ("negative_scale", "window"):
            refuse_no_op(settings, name, "a negative prompt", policy)


def refuse_no_op(settings: SampleSettings, name: str, needs: str, policy: str) -> None:
    value = getattr(settings, name)
    if value != getattr(SampleSettings, name):
        raise UsageError(
            f"{name} would change nothing",
            expected=needs,
            received=f"{name} {value} under policy {policy}",
            hint=f"leave {name} out, or another --policy",
        )


def warn_of_length(pipe: Any, settings: SampleSettings) -> None:
    most = room(pipe)
    for text in dict.fromkeys([*settings.prompt, settings.negative]):
        if (needed := token_count(pipe, text)) > most:
            say(f"warning: {needed} tokens, of which the model reads the first {most}: {text[:60]!r}")


def facts_of(settings: SampleSettings, how: Sampling, policy: str) -> dict[str, Any]:
    """How all of the pictures were made, as samples.json tells it."""
    given = {name: value for name, value in asdict(settings).items() if name not in ("out", "prompt")}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    return plain | {"format": 1, "policy": policy, "guidance": how.scale, "steps": how.steps}


def write_pictures(
    folder: Path, pixels: Tensor, rows: Sequence[dict[str, Any]], facts: dict[str, Any] | None = None
) -> None:
    """PNG files and metadata.jsonl, which the `datasets` library reads; `facts` of all of them beside it."""
    for image, row in zip(pixels.permute(0, 2, 3, 1).numpy(), rows, strict=True):
        Image.fromarray(image.squeeze()).save(folder / row["file_name"])
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    if facts is not None:
        (folder / RESULT).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
