# SPDX-License-Identifier: Apache-2.0
"""Geom-Erasing and its rivals on a mark that no caption names: every arm, on several bases, with its controls.

    python -m recipes.geom_erasing.base --seed 0 --out runs/geom/base-0     # about half an hour of one core each
    python -m recipes.geom_erasing.recipe --bases runs/geom/base-0 ... --seeds 0 ... --out runs/geom/table

Every arm of a base is a file, so that a stopped run goes on and several processes may share the work.
"""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from anabranch.data.images import Images, open_images
from anabranch.data.marks import glyph
from anabranch.jobs.erase.garment_arms import ARMS
from anabranch.jobs.erase.garment_bench import Bench, Made, Regime
from anabranch.jobs.erase.garment_judges import FEATURE_SPACE, Judges, train_judges
from anabranch.jobs.erase.garment_scores import Scored, draw_policies, place_control, score
from anabranch.jobs.erase.marked_garments import MARK, PLATE, caption_of
from anabranch.measure.frechet import frechet
from anabranch.suppress.detectors import open_detector
from anabranch.suppress.geom_erasing.adapter import fingerprint, save_adapter

POLICIES = {
    "base": ("none", "word"),
    "plain": ("none", "word"),
    "plain, long": ("none",),
    "boxes": ("none", "name", "detected", "sampled", "prior"),
    "model: boxes": ("none", "name", "detected", "sampled"),
    "new places, long": ("none", "name", "detected"),
    "name, long": ("name",),
    "shuffled, new places, long": ("name",),
    "boxes, recall 1": ("name",),
    "name, recall 1": ("name",),
    "shuffled, recall 1": ("name",),
    "model: name": ("name",),
    "model: shuffled": ("name", "detected"),
    "SLD": ("strong",),
}
OTHERWISE = ("none", "name")
ATTACKED = "new places, long"
COLUMNS = 40
REFERENCE = 10_000


def main(bases: list[Path], seeds: list[int], out: Path, samples: int, arms: list[str]) -> None:
    torch.set_num_threads(1)
    # 1. real garments, who looks at them, and the mark's own picture as the detector of the labels
    images = open_images("corpus:fashion-mnist", labelled=True)
    training, test = images.take(~images.is_test), images.take(images.is_test)
    judges = train_judges(training, out / "judges")
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "mark.png"
    Image.fromarray((glyph("plate-x", PLATE).value * 255).astype(np.uint8)).save(picture)
    reference = reference_features(judges, test)
    prompts = [caption_of(name) for name in images.class_names]
    (out / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    # 2. every arm of every base
    for seed, base in zip(seeds, bases, strict=True):
        bench = Bench(
            base=base, images=training, judges=judges, detector=open_detector(f"template:{picture}"),
            regime=Regime(), seed=seed, samples=samples,
        )  # fmt: skip
        for arm in arms:
            with claimed(out / f"seed-{seed}" / f"{arm}.json") as file:
                if file is not None:
                    file.write_text(json.dumps(run_arm(bench, arm, reference, file.parent)), encoding="utf-8")
                    print(f"seed {seed}  {arm}  {summary(file)}", flush=True)


def run_arm(bench: Bench, arm: str, reference: np.ndarray, folder: Path) -> dict[str, Any]:
    made = ARMS[arm](bench)
    policies = {}
    for policy, pixels in draw_policies(bench, made, POLICIES.get(arm, OTHERWISE)).items():
        policies[policy] = numbers(score(bench, pixels), reference)
        sheet(pixels).save(folder / f"{arm}-{policy}.png".replace(" ", "-"))
    control = place_control(bench, made) if made.prepared else None
    if arm == ATTACKED:
        publish(bench, made, folder / "adapter")
    return {"policies": policies, "place_control": control, "loss": bench.noted.get("loss"), "base": str(bench.base)}


def publish(bench: Bench, made: Made, folder: Path) -> None:
    """The arm as `anabranch erase train` would have left it, for `anabranch erase eval` to attack."""
    folder.mkdir()
    config = {
        "trained": bench.regime.trained,
        "base": fingerprint(bench.open()),
        "policy": "detected",
        "concept": MARK,
        "model": str(bench.base),
        "detector": bench.detector.name,
    }
    found = [bins for bins in made.prepared.bins if bins]
    save_adapter(made.pipe, folder, made.words, made.prepared.attached, found, config)


def sheet(pixels: Tensor) -> Image.Image:
    """Every picture (N, 1, H, W) in rows of COLUMNS, so that whatever is asked of them later can be."""
    rows = [row[:, 0].permute(1, 0, 2).reshape(pixels.shape[-2], -1) for row in pixels.split(COLUMNS)]
    padded = [nn.functional.pad(row, (0, rows[0].shape[1] - row.shape[1])) for row in rows]
    return Image.fromarray(torch.cat(padded).numpy())


def numbers(scored: Scored, reference: np.ndarray) -> dict[str, Any]:
    return {
        "hits": "".join("01"[hit] for hit in scored.hits.tolist()),
        "broken": "".join("01"[hit] for hit in scored.broken.tolist()),
        "second": "".join("01"[hit] for hit in scored.second.tolist()),
        "right": float(scored.right.float().mean()),
        "frechet": float(frechet(reference, scored.features.numpy())),
        "feature_space": FEATURE_SPACE,
    }


def reference_features(judges: Judges, test: Images) -> np.ndarray:
    pixels = test.store.read(torch.arange(min(REFERENCE, len(test))))
    features: np.ndarray = judges.look(pixels)[1].numpy()
    return features


def summary(file: Path) -> str:
    found = json.loads(file.read_text(encoding="utf-8"))
    rates = {name: f"{100 * p['hits'].count('1') / len(p['hits']):.1f}" for name, p in found["policies"].items()}
    return f"{rates}  {found['place_control'] or ''}"


@contextmanager
def claimed(file: Path) -> Iterator[Path | None]:
    """The file, if nobody has made it or is making it; None otherwise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.with_suffix(".lock")
    try:
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        yield None
        return
    try:
        yield None if file.exists() else file
    finally:
        lock.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bases", type=Path, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/geom-erasing"))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    main(**vars(parser.parse_args()))
