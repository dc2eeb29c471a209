# SPDX-License-Identifier: Apache-2.0
"""Everything public that opens a file, each with a folder that it opens."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from anabranch.cli.options import read_yaml
from anabranch.data.captions import read_captions
from anabranch.data.images import open_images
from anabranch.data.labels import Label, read_labels, write_labels
from anabranch.jobs.align.chain import read_prompts as read_chain_prompts
from anabranch.jobs.align.questions import read_questions
from anabranch.jobs.align.train import read_chains
from anabranch.jobs.erase.bake import read_prompts
from anabranch.jobs.experts.texts import read_documents
from anabranch.measure.experts.statistics import Collector, ExpertStats
from anabranch.models import resnet, vit_mae
from anabranch.models.bridge import open_model
from anabranch.models.diffusion.family import open_pipeline
from anabranch.models.language.folder import open_language_model
from anabranch.models.mixtures.adapter import ExpertAdapter, read_experts
from anabranch.models.mixtures.families import tiny as tiny_mixture
from anabranch.models.mixtures.layers import mixture_layers
from anabranch.reuse.merge.compressed_experts import CompressedExperts
from anabranch.reuse.prune.premoe import TaskLibrary
from anabranch.reuse.steer.recipe import Recipe, Step
from anabranch.specialize.mote import folder as mote_folder
from anabranch.specialize.mote.steps import Steps
from anabranch.suppress.detectors.open import open_detector
from anabranch.suppress.geom_erasing.adapter import apply, remove
from anabranch.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from anabranch.train.metrics import read_metrics
from anabranch.train.run_folder import RunFolder
from tests.specialize.mote.tiny import base as tiny_language_model
from tests.specialize.mote.tiny import tiny as tiny_mote
from tests.specialize.mote.tiny import tokenizer
from tests.suppress.geom_erasing.test_adapter import trained_adapter


@dataclass(frozen=True, kw_only=True)
class Loader:
    name: str
    folder: Path
    """A good one; tests copy it."""
    open: Callable[[Path], Any]
    files: tuple[str, ...]
    """Files in it that somebody may have written into."""
    elsewhere: tuple[str, ...] = ()
    """Pickled files that a library would open in the place of the first one, were it missing."""
    slow: bool = False


COCO = {
    "images": [{"id": 1, "file_name": "0.png", "width": 16, "height": 16}],
    "annotations": [{"image_id": 1, "category_id": 3, "bbox": [1, 1, 8, 8]}],
    "categories": [{"id": 3, "name": "mark"}],
}


def sign(folder: Path) -> None:
    """Whoever can write a file can write its manifest."""
    for manifest in folder.rglob("manifest.json"):
        document = json.loads(manifest.read_text())
        for name in document["files"]:
            content = (manifest.parent / name).read_bytes()
            document["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest.write_text(json.dumps(document))
    for manifest in folder.rglob("experts.json"):
        content = (manifest.parent / "experts.safetensors").read_bytes()
        document = json.loads(manifest.read_bytes())
        manifest.write_text(json.dumps(document | {"sha256": hashlib.sha256(content).hexdigest()}))


def checkpoint_loader(root: Path) -> Loader:
    weight = {"weight": torch.arange(6.0)}
    save_checkpoint(root, Checkpoint(step=1, model=weight, optimizer={"exp_avg/weight": weight["weight"]}, config={}))
    names = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
    files = tuple(f"checkpoints/step-000001/{name}" for name in names)
    return Loader(name="checkpoint", folder=root, open=load_checkpoint, files=files)


def model_loaders(root: Path) -> list[Loader]:
    vit_mae.build("tiny", image_size=28, channels=1, seed=0).save_pretrained(root / "vit")
    resnet.build("tiny", image_size=28, channels=1, seed=0).save_pretrained(root / "resnet")
    language = tiny_language_model("llama")
    language.save_pretrained(root / "language")
    tokenizer().save_pretrained(root / "language")
    sizes = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
    classifier = ResNetForImageClassification(ResNetConfig(**sizes, id2label={0: "clean", 1: "mark"}))
    classifier.save_pretrained(root / "classifier")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / "classifier")
    openers = {
        "vit": open_model,
        "resnet": open_model,
        "language": open_language_model,
        "classifier": lambda folder: open_detector(f"classifier:{folder}:mark", geometry="none"),
    }
    texts = {"language": ("tokenizer.json", "tokenizer_config.json"), "classifier": ("preprocessor_config.json",)}
    return [
        Loader(
            name=name,
            folder=root / name,
            open=opener,
            files=("model.safetensors", "config.json", *texts.get(name, ())),
            elsewhere=("pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "model.pt", "flax_model.msgpack"),
            slow=True,
        )
        for name, opener in openers.items()
    ]


def diffusion_loaders(root: Path) -> list[Loader]:
    folder, _ = trained_adapter(root, "stable_diffusion_3")
    pipe = open_pipeline(root / "model")

    def use(adapter: Path) -> None:
        apply(pipe, adapter)
        remove(pipe)

    weights = "transformer/diffusion_pytorch_model"
    return [
        Loader(
            name="pipeline",
            folder=root / "model",
            open=open_pipeline,
            files=(f"{weights}.safetensors", "model_index.json", "scheduler/scheduler_config.json"),
            elsewhere=(f"{weights}.bin",),
            slow=True,
        ),
        Loader(
            name="eraser",
            folder=folder,
            open=use,
            files=(
                "pytorch_lora_weights.safetensors", "geom_tokens.safetensors", "negative.safetensors",
                "geom_config.json",
            ),
            elsewhere=("pytorch_lora_weights.bin",),
        ),
    ]  # fmt: skip


def expert_loaders(root: Path) -> list[Loader]:
    model = tiny_mixture("OLMoE")
    layers = mixture_layers(model)
    for name in ("adapter", "library", "compressed", "statistics", "recipe"):
        (root / name).mkdir()
    read_experts(model, {layers[0].name: [0, 2]}, "a base").save(root / "adapter")
    order = torch.arange(layers[0].num_experts).expand(2, len(layers), -1)
    names = tuple(layer.name for layer in layers)
    TaskLibrary(("law", "code"), names, 1, torch.zeros(2, 3), order).save(root / "library")
    CompressedExperts(layers, 1).save(root / "compressed" / "c.safetensors")
    Collector(model, layers, ["law"]).stats.save(root / "statistics" / "s.safetensors")
    Recipe(steps=(Step(kind="empty", experts=((names[0], 1),)),), made_by="", model="").save(root / "recipe" / "r.json")
    openers = {
        "adapter": (ExpertAdapter.load, ("experts.safetensors", "experts.json")),
        "library": (TaskLibrary.load, ("library.safetensors", "library.json")),
        "compressed": (lambda folder: CompressedExperts.load(folder / "c.safetensors", layers), ("c.safetensors",)),
        "statistics": (lambda folder: ExpertStats.load(folder / "s.safetensors"), ("s.safetensors",)),
        "recipe": (lambda folder: Recipe.load(folder / "r.json"), ("r.json",)),
    }
    found = [Loader(name=n, folder=root / n, open=opener, files=files) for n, (opener, files) in openers.items()]
    mote_folder.save(tiny_mote("llama"), root / "steps")
    first = next(path.parent.name for path in sorted((root / "steps").glob("*/adapter_config.json")))
    weights = f"{first}/adapter_model"
    steps = Loader(
        name="steps",
        folder=root / "steps",
        open=lambda folder: mote_folder.load(tiny_language_model("llama"), folder),
        files=(f"{weights}.safetensors", "mote.json", f"{first}/adapter_config.json", "tokenizer.json"),
        elsewhere=(f"{weights}.bin",),
        slow=True,
    )
    return [*found, steps]


def picture_loaders(root: Path) -> list[Loader]:
    folder = root / "pictures"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), (40 * i, 9, 200)).save(folder / f"{i}.png")
    Image.radial_gradient("L").resize((16, 16)).convert("RGB").save(folder / "mark.png")
    detector = {"name": "qr", "version": "1", "threshold": 0.5}
    write_labels(
        root / "labels.jsonl",
        [Label("0.png", 16, 16, ((1, 1, 9, 9),), 0.9, True)],
        {"images": str(folder), "concept": "mark", "detector": detector},
    )
    for file in (*root.glob("labels.*"),):
        shutil.move(file, folder / file.name)
    names = ["0.png", "1.png", "mark.png"]
    rows = [json.dumps({"file_name": name, "text": "a"}) + "\n" for name in names]
    (folder / "metadata.jsonl").write_text("".join(rows))
    (folder / "coco.json").write_text(json.dumps(COCO))
    openers = {
        "images": (open_images, ("0.png",)),
        "labels": (lambda f: read_labels(f / "labels.jsonl", f), ("labels.jsonl", "labels.json")),
        "captions": (lambda f: read_captions(f, names), ("metadata.jsonl",)),
        "template": (lambda f: open_detector(f"template:{f / 'mark.png'}"), ("mark.png",)),
        "boxes": (lambda f: open_detector(f"boxes:{f / 'labels.jsonl'}"), ("labels.jsonl",)),
        "coco": (lambda f: open_detector(f"boxes:{f / 'coco.json'}"), ("coco.json",)),
        "masks": (
            lambda f: open_detector(f"masks:{f}").detect([torch.zeros(16, 16, 3).numpy()], ["0.png"]),
            ("0.png",),
        ),
    }
    return [Loader(name=n, folder=folder, open=opener, files=files) for n, (opener, files) in openers.items()]


def text_loaders(root: Path) -> list[Loader]:
    root.mkdir()
    (root / "settings.yaml").write_text("steps: 3\nbatch_size: 64\n")
    (root / "questions.jsonl").write_text('{"question": "why?", "kind": "benign"}\n')
    (root / "chains.jsonl").write_text('{"question": "why?", "chain": {"answer": "so"}}\n')
    (root / "prompts.txt").write_text("a photo of a cat\na dog\n")
    (root / "prompts.json").write_text("{}")
    (root / "texts.jsonl").write_text('{"text": "some words"}\n')
    (root / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n')
    RunFolder.open(root / "run", {"seed": 1}).close()
    openers = {
        "settings.yaml": lambda f: read_yaml(f / "settings.yaml"),
        "questions.jsonl": lambda f: read_questions(f / "questions.jsonl"),
        "chains.jsonl": lambda f: read_chains(f / "chains.jsonl", Steps()),
        "prompts.txt": lambda f: read_prompts(f / "prompts.txt"),
        "prompts.json": lambda f: read_chain_prompts(f / "prompts.json"),
        "texts.jsonl": lambda f: read_documents(str(f / "texts.jsonl"), "train"),
        "metrics.jsonl": lambda f: read_metrics(f / "metrics.jsonl"),
        "run/config.resolved.yaml": lambda f: RunFolder.open(f / "run", {"seed": 1}, resume=True).close(),
    }
    return [Loader(name=name, folder=root, open=opener, files=(name,)) for name, opener in openers.items()]


def all_loaders(root: Path) -> list[Loader]:
    for name in ("models", "diffusion", "experts", "images"):
        (root / name).mkdir()
    return [
        checkpoint_loader(root / "run"),
        *model_loaders(root / "models"),
        *diffusion_loaders(root / "diffusion"),
        *expert_loaders(root / "experts"),
        *picture_loaders(root / "images"),
        *text_loaders(root / "texts"),
    ]
