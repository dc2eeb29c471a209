# SPDX-License-Identifier: Apache-2.0
"""`anabranch doctor`: versions, cores, memory and disk, and what a missing piece costs."""

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from anabranch.cli.options import parse
from anabranch.errors import CHECK_FAILED, DONE

NEEDED = {
    "torch": (2, 10),
    "transformers": (5, 20),
    "accelerate": (1, 10),
    "safetensors": (0, 5),
    "scikit-learn": (1, 5),
}
UNWANTED = {
    "torchvision": "an incompatible build breaks transformers at import: pip uninstall torchvision, or match it"
}
FREE_GIB = 2


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Is this machine ready? Prints what is found; exits with 3 when something is missing."""


def found(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(argv: list[str]) -> int:
    parse(Flags, argv, "doctor")
    problems = []
    print(f"python        {sys.version.split()[0]}")
    for package, least in NEEDED.items():
        have = found(package)
        print(f"{package:<13} {have or 'missing'}")
        numbers = tuple(int(part) for part in (have or "0.0").split("+")[0].split(".")[:2])
        if numbers < least:
            problems.append(f"{package} {'.'.join(map(str, least))} or newer is needed: pip install -U {package}")
    problems += [f"{name} {have}: {why}" for name, why in UNWANTED.items() if (have := found(name))]
    free = shutil.disk_usage(os.getcwd()).free / 2**30
    print(f"cores         {len(os.sched_getaffinity(0))}\ndisk free     {free:.0f} GiB in {os.getcwd()}")
    if free < FREE_GIB:
        problems.append(f"less than {FREE_GIB} GiB are free here: runs keep two checkpoints")
    for problem in problems:
        print(f"problem: {problem}")
    print("ready" if not problems else f"{len(problems)} problem(s)")
    return CHECK_FAILED if problems else DONE
