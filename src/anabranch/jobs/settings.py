# SPDX-License-Identifier: Apache-2.0
"""What the settings of all jobs have in common, and what the demos can be told.

Light on purpose: the command line reads this without importing torch.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NO_NUMBER = ("out", "resume", "sharding", "workers")
"""Settings that decide where a run is and how it is spread out, but not what it learns: a resumed one may differ."""
DEMOS = {
    "transfer": "where sharing hurts, and what experts do about it",
    "erase": "a mark that nobody asked for, and what erasing does about it",
    "align": "a model that thinks before it answers, with one expert for each step",
    "experts": "what the experts of a small mixture know",
}


@dataclass(frozen=True, kw_only=True)
class DemoFlags:
    topic: str = "all"
    """What to show: transfer, erase, align, experts, or all of them."""
    out: Path = Path("runs/demo")
    """The folder to write; of one topic runs/demo/TOPIC, where the demo of all of them finds it."""
    seeds: int = 3
    """Repetitions; of transfer alone."""
    steps: int = 1000
    """Optimiser steps of a model; the stage with experts gets as many again. Of erase: of an eraser, else its own."""
    resume: bool = False
    """Go on: of all, keep the finished ones and run the rest; of transfer, keep the models that are trained."""


def plain_values_of(settings: Any) -> dict[str, Any]:
    """What a run folder keeps of its settings, in plain values: all but where it is and whether it goes on."""
    return {name: plain(value) for name, value in asdict(settings).items() if name not in NO_NUMBER}


def plain(value: Any) -> Any:
    """As it is read again from YAML."""
    if isinstance(value, (tuple, list)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
