# SPDX-License-Identifier: Apache-2.0
"""The README of a mixture that was pruned, merged, tuned or steered: what was done, what it costs, what was touched."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anabranch.models.hub.card import front_matter
from anabranch.report.result import Result
from anabranch.report.text import estimate

WAYS = {
    "pruned": "Experts that the targets need least were taken out.",
    "merged": "Experts of a group share one set of weights, held by each of them.",
    "tuned": "Only the experts that the target uses learned it; all else is as it was.",
    "steered": "A steering recipe is written into the weights: outputs of experts are scaled or silenced.",
}
PRIVATE = ("model", "out", "merged", "stats", "data", "steer", "export", "prompt", "prompts")
"""Settings that name places on somebody's machine."""
STOCK = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""
ADAPTER = """\
```python
from transformers import AutoModelForCausalLM
from anabranch.models.mixtures.adapter import ExpertAdapter, merge

model = AutoModelForCausalLM.from_pretrained("path/to/the/base")
merge(model, ExpertAdapter.from_pretrained("path/to/this/folder"))  # from here on a stock model
```
"""


def experts_card(way: str, told: Mapping[str, Any], settings: Any, *, adapter: bool = False) -> str:
    """
    told       what experts.json holds
    settings   of the command; `model` is the base
    adapter    the folder holds the tuned experts alone
    """
    head = front_matter(
        library_name="anabranch" if adapter else "transformers", tags=["mixture-of-experts", f"experts-{way}"],
        base=settings.model, relation="adapter" if adapter else "finetune", pipeline_tag="text-generation",
    )  # fmt: skip
    opening = ADAPTER if adapter else f"It needs no library but transformers.\n\n{STOCK}"
    parts = [
        f"{head}# {Path(settings.model).absolute().name}, {way}", f"{WAYS[way]} Made by `anabranch experts`.", opening,
        "## Configuration", configuration(settings),
        "## What it costs, and its controls", costs(told), "## What was touched", touched(told),
    ]  # fmt: skip
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def configuration(settings: Any) -> str:
    told = asdict(settings).items()
    rows = [[name, str(value)] for name, value in told if name not in PRIVATE and not isinstance(value, Path)]
    return Result("What the command was told", ["setting", "value"], rows).table()


def costs(told: Mapping[str, Any]) -> str:
    """Nats a token on texts by label: the method and the controls beside it."""
    losses = told.get("losses")
    if not losses:
        return "Not measured here."
    labels = list(next(iter(losses.values())))
    first = next(iter(losses.values()))
    rows = [["as it was", *(f"{first[label]['before']:.3f}" for label in labels)]]
    for arm, found in losses.items():
        cells = [estimate(*(found[label][end] for end in ("change", "low", "high")), digits=3) for label in labels]
        rows.append([arm, *cells])
    return Result("Nats a token as it was, then the change [95 %]", ["", *labels], rows).table()


def touched(told: Mapping[str, Any]) -> str:
    names = list(told["touched"])
    shown = ", ".join(f"`{name}`" for name in names[:8]) + (", …" if len(names) > 8 else "")
    alone = f" {told['left_alone']} are as before, bit for bit." if "left_alone" in told else ""
    return f"{len(names)} tensors changed: {shown}.{alone}"
