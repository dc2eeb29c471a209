# SPDX-License-Identifier: Apache-2.0
"""The page of a training alone: `align train`, `erase train`, `erase bake`, `experts tune`; finished or not."""

from pathlib import Path
from typing import Any

import yaml

from anabranch.errors import UsageError
from anabranch.report.figures import curves
from anabranch.report.page import Page, Section, Table, write
from anabranch.train.metrics import read_metrics

FINISHED = ("experts.json", "mote.json", "geom_config.json")
"""What these commands write last: a run with none of them is not at its end."""
CONFIG, METRICS = "config.resolved.yaml", Path("training") / "metrics.jsonl"
NO_TERM = ("step", "learning_rate", "images_per_second")


def write_training_page(run: Path) -> Path:
    lines = read_metrics(run / METRICS) if (run / METRICS).exists() else []
    settings = read_settings(run / CONFIG)
    done = any((run / name).exists() for name in FINISHED)
    page = Page(
        title="How it was trained" if done else "How it was trained (unfinished)",
        lead=lead(lines, done),
        facts=[(name, settings[name]) for name in ("model", "seed") if name in settings],
        sections=[
            *([Section("Curves", figures=[curve(lines, term) for term in terms(lines)])] if lines else []),
            Section("Settings", tables=[Table("Every setting", ["name", "value"], told(settings))], kind="detail"),
        ],
    )
    return write(page, run / "report.html")


def read_settings(file: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UsageError(f"{file} cannot be read", expected="what the run wrote", received=str(error)) from error


def lead(lines: list[dict[str, Any]], done: bool) -> list[str]:
    going_on = [] if done else ["The same command with --resume goes on."]
    if not lines:
        return ["No step is told of yet.", *going_on]
    said = [f"{line['loss']:.3g} at step {line['step']:,}" for line in ([lines[0], lines[-1]] if lines[1:] else lines)]
    return [
        f"Loss {', '.join(said)}.",
        "A training loss says that something was learnt, not what it is worth: the job's own evaluation does.",
        *going_on,
    ]


def terms(lines: list[dict[str, Any]]) -> list[str]:
    return [name for name in sorted(lines[0], key=lambda name: (name != "loss", name)) if name not in NO_TERM]


def curve(lines: list[dict[str, Any]], term: str) -> Any:
    had = [line for line in lines if term in line]
    series = {term: ([line["step"] for line in had], [line[term] for line in had], None, None)}
    return curves(series, "optimiser steps", term.replace("_", " "), term.replace("_", " ").capitalize())


def told(settings: dict[str, Any]) -> list[list[str]]:
    return [[name, "none" if value is None else str(value)] for name, value in sorted(settings.items())]
