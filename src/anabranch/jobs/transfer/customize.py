# SPDX-License-Identifier: Apache-2.0
"""For one task the ordinary checkpoint that serves it: choose, extract, prove, hand over."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from anabranch.data.images import Images, open_images
from anabranch.errors import UsageError
from anabranch.jobs.transfer.card import model_card, opened
from anabranch.jobs.transfer.corpus import at_most, short_name, with_split
from anabranch.jobs.transfer.settings import CustomizeSettings
from anabranch.jobs.transfer.stages import pixel_statistics
from anabranch.models.bridge import bridge, open_model, read_config
from anabranch.train.publish import publish_folder, write_json

CHOICES = {"moce": "customize_experts", "sdr": "customize_sdr"}
"""The module of this folder whose `choose_and_extract(settings, task, summary)` gives the task's dense model, and what
is to be said about it (path, warnings; for the card origin and how, for the terminal chosen). Any other method is a
plain model, the same for every task."""


def customize(settings: CustomizeSettings) -> dict[str, Any]:
    """Write settings.out, a transformers folder with model card and customize.json; returns what the latter holds."""
    if not settings.task:
        raise UsageError("no task was named", expected="--task DIR", hint="a folder of the task's images")
    summary = read_summary(settings.run)
    check_keep(settings, summary["method"])
    task = open_task(settings, read_config(settings.run / ("base" if summary["method"] in CHOICES else "model")))
    dense, said = chosen_model(settings, task, summary)
    said["warnings"] += foreign_pixels(summary, task)
    family = bridge(dense)
    plain = family.to_plain(dense)
    said |= {
        "task": task.name,
        "task_images": len(task),
        "unreadable_images": [bad.path for bad in task.quarantine],
        "run": str(settings.run),
        "image_size": task.image_size,
        "channels": task.channels,
        "parameters": sum(p.numel() for p in plain.parameters()),
        "macs": family.macs(dense),
    }
    processor = family.image_processor(task.image_size, task.channels)
    publish_folder(lambda folder: write_model(folder, plain, processor, said), settings.out)
    tell(said, settings.out, plain.config.model_type)
    return said


def check_keep(settings: CustomizeSettings, method: str) -> None:
    """A share of channels, and of sub-nets alone."""
    if not 0 < settings.keep <= 1:
        raise UsageError("keep is no share of channels", expected="above 0 and at most 1", received=settings.keep)
    if settings.keep < 1 and method != "sdr":
        raise UsageError(
            f"keep would change nothing: a model of {method} has no groups of channels",
            received=settings.keep,
            hint="leave keep out, or a run of pretrain --method sdr",
        )


def chosen_model(
    settings: CustomizeSettings, task: Images, summary: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """The dense model for the task, and what is to be said about it."""
    if summary["method"] not in CHOICES:
        return open_model(settings.run / "model"), {"method": summary["method"], "path": [], "warnings": []}
    module = import_module(f"anabranch.jobs.transfer.{CHOICES[summary['method']]}")
    dense, said = module.choose_and_extract(settings, task, summary)
    return dense, said


def read_summary(run: Path) -> dict[str, Any]:
    file = run / "summary.json"
    if not file.is_file():
        state = "no such folder" if not run.exists() else "an unfinished run, or another kind of folder"
        raise UsageError(
            f"{run} is not a finished run of anabranch pretrain",
            expected="a folder with summary.json",
            received=state,
            hint="finish it with --resume",
        )
    summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if summary["method"] == "token-moe":
        raise UsageError(
            f"{run} is a TokenMoE: its experts are chosen token by token, so no dense model equals it",
            hint="pretrain --method moce",
        )
    return summary


def open_task(settings: CustomizeSettings, config: dict[str, Any]) -> Images:
    """The training images of the task; with labels, where they are asked for, half of them to score routes on."""
    labelled = settings.select == "knn"
    task = open_images(
        settings.task, image_size=config["image_size"], channels=config["num_channels"], labelled=labelled
    )
    if labelled and task.is_test is not None:
        task = replace(task.take(~task.is_test), is_test=None)  # the task's own test images are never looked at
    task = with_split(task) if labelled else task.unlabelled()
    return replace(at_most(task, settings.max_images, seed=0), name=short_name(settings.task))


def foreign_pixels(summary: dict[str, Any], task: Images) -> list[str]:
    """A warning where the task's brightness or colours lie far from those that were learned from."""
    theirs = pixel_statistics(task)["pixel_mean"]
    learned = list(zip(summary.get("pixel_mean", []), summary.get("pixel_std", []), strict=True))
    far = [f"{t:.2f} instead of {m:.2f}" for t, (m, s) in zip(theirs, learned, strict=False) if abs(t - m) > s]
    return (
        [f"the task's pixels have another mean ({', '.join(far)} of full brightness): inverted, or scaled?"]
        if far
        else []
    )


def write_model(folder: Path, plain: nn.Module, processor: dict[str, object], said: dict[str, Any]) -> None:
    plain.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n", encoding="utf-8")
    write_json(folder / "customize.json", said)
    (folder / "README.md").write_text(model_card(said, plain.config), encoding="utf-8")


def tell(said: dict[str, Any], out: Path, model_type: str) -> None:
    if said.get("chosen"):
        print(f"{said['task']}: {said['chosen']}")
    if said["unreadable_images"]:
        print(f"{len(said['unreadable_images'])} unreadable images are listed in customize.json")
    for warning in said["warnings"]:
        print(f"warning: {warning}")
    print(f"model  {out}   ({said['parameters']:,} parameters, {said['macs']:,} multiply-accumulates an image)")
    print(f"       transformers.{opened(model_type, str(out))}")
