"""Photographs that nothing here was ever trained on, with marks whose places are known, and tiny pipelines."""

import hashlib
import json

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from anabranch.data.labels import Label, write_labels
from anabranch.jobs.erase.bake import erase_bake
from anabranch.jobs.erase.settings import BakeSettings, SampleSettings, TrainSettings
from anabranch.jobs.erase.train import erase_train
from anabranch.models.diffusion.family import save_pipeline
from tests.diffusion_pipelines import tiny

NAMES = ("dress", "bag")


def photographs(folder, count, size=(40, 40), seed=0):
    """Crops of two photographs, PNG and JPEG by turns, in two class folders; returns their names."""
    generator = np.random.default_rng(seed)
    sources = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    width, height = size
    names = []
    for i in range(count):
        source = sources[i % 2]
        x, y = (int(generator.integers(0, side - edge)) for side, edge in zip(source.shape[1::-1], size, strict=True))
        name = f"{NAMES[i % 2]}/{i:02}.{'png' if i % 3 else 'jpg'}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source[y : y + height, x : x + width]).save(folder / name)
        names.append(name)
    return names


def labelled(root, boxes, size=(40, 40), detector="boxes:known", concept="mark"):
    """ROOT/images and ROOT/labels.jsonl, as a scan writes them; `boxes` of each image, None of a clean one."""
    images, rows = root / "images", []
    for name, found in zip(photographs(images, len(boxes), size), boxes, strict=True):
        rows.append(
            Label(
                file=name,
                width=size[0],
                height=size[1],
                boxes=tuple(found or ()),
                score=float(found is not None),
                has_concept=found is not None,
                sha256=hashlib.sha256((images / name).read_bytes()).hexdigest(),
            )
        )
    who = {"name": detector, "version": "1", "threshold": 0.5}
    write_labels(root / "labels.jsonl", rows, {"images": str(images), "concept": concept, "detector": who})
    return root / "labels.jsonl"


CORNERS = [[(0, 0, 12, 12)], None, [(28, 28, 40, 40)], [(0, 0, 12, 12)], None, [(28, 0, 40, 12)]]
"""Of six images of 40 x 40 pixels, in a grid of 3 x 3: one bin each."""


def saved(folder, family="stable_diffusion", **options):
    save_pipeline(tiny(family, **options), folder)
    return folder


def train_settings(root, **changes):
    given = {
        "model": root / "model",
        "labels": root / "labels.jsonl",
        "out": root / "adapter",
        "grid": "3",
        "steps": 3,
        "batch_size": 4,
        "r": 2,
        "learning_rate": 1e-2,
    }
    return TrainSettings(**(given | changes))


def sample_settings(root, **changes):
    given = {
        "model": root / "model",
        "adapter": root / "adapter",
        "out": root / "samples",
        "prompt": ("a dress", "a bag"),
        "steps": 2,
    }
    return SampleSettings(**(given | changes))


def bake_settings(root, **changes):
    given = {
        "model": root / "model",
        "adapter": root / "adapter",
        "out": root / "baked",
        "prompts": root / "prompts.txt",
        "steps": 3,
        "sample_steps": 2,
        "num_latents": 4,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "r": 2,
    }
    return BakeSettings(**(given | changes))


def baked(root, prompts="a dress\na bag\n"):
    """A model, labelled pictures, an eraser of that model, and a LoRA baked from it, all in one folder."""
    saved(root / "model")
    labelled(root, CORNERS)
    erase_train(train_settings(root))
    (root / "prompts.txt").write_text(prompts)
    erase_bake(bake_settings(root))
    return root


def everything(folder):
    """Name -> bytes of every file in a folder, locks left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def config_of(folder):
    return json.loads((folder / "geom_config.json").read_text())
