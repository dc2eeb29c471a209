# SPDX-License-Identifier: Apache-2.0
"""Several processes against one: speed of the pre-training loop, one thread a process, and memory of each process.

`python -m benchmarks.processes [--rounds 7]`, or `--plan` for the arithmetic of docs/scaling.md. Cases run in turn,
round for round; a process stays alive between its rounds. Memory is the peak over what was resident before the model
was built, in processes of their own.
"""

import argparse
import os
import resource
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

BAR = 1.6
LIMIT = 600
"""Seconds for any answer."""
ROWS, STEPS = 64, 8
CASES = {"one process": (1, "none"), "two, copies": (2, "none"), "two, sharded": (2, "full")}


class Team:
    """The processes of a case, which do a round at every line they are sent and answer with its seconds."""

    def __init__(self, world: int, sharding: str, what: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ANABRANCH_TIMEOUT": str(LIMIT)}
        if what == "memory":  # else what is freed stays with the process, and the peak is that of the allocator
            alone |= {"MALLOC_MMAP_THRESHOLD_": "65536"}
        shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(port)} | alone
        command = [sys.executable, "-m", "benchmarks.processes", "--worker", what, "--sharding", sharding]
        self.members = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world)
        ]  # fmt: skip

    def round(self) -> list[str]:
        for member in self.members:
            assert member.stdin is not None
            member.stdin.write("go\n")
            member.stdin.flush()
        answers = []
        for member in self.members:
            assert member.stdout is not None
            answer = member.stdout.readline()  # a member that waits for a lost one ends by its own time limit
            while answer and not answer.startswith("answer "):
                answer = member.stdout.readline()
            answers.append(answer.removeprefix("answer ").strip())
        if not all(answers):
            raise SystemExit("a process of the benchmark was lost")
        return answers

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *exception: object) -> None:
        for member in self.members:
            member.kill()
            member.wait()


def worker(what: str, sharding: str) -> None:
    import torch

    from anabranch.data.images import Images, Store
    from anabranch.data.streams import ShuffledIndices
    from anabranch.models import vit_mae
    from anabranch.specialize import mae
    from anabranch.train.loop import TrainConfig, train
    from anabranch.train.processes import processes

    torch.set_num_threads(1)
    processes()
    preset, size, rows, steps = ("small", 32, ROWS, STEPS) if what == "speed" else ("base", 224, 2, 2)
    pixels = torch.randint(0, 256, (256, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = Images(name="noise", store=Store.of(pixels))
    config = TrainConfig(steps=steps, batch_size=rows, learning_rate=1e-4, deterministic=False, sharding=sharding)  # type: ignore[arg-type]
    for _ in sys.stdin:
        before = resident()
        model = vit_mae.build(preset, image_size=size, channels=3, seed=0)
        stream = mae.stream(images, model, ShuffledIndices(256, rows, 0), seed=0)
        found = []

        def look(step: int, logs: object, found: list[float] = found, before: float = before) -> None:
            found.append(resident() - before)  # between two steps

        seconds = train(mae.objective(model, seed=0), stream, config, on_step=look).seconds
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        print(f"answer {seconds} {found[-1]} {peak}", flush=True)


def resident() -> float:
    """Bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def speed(rounds: int) -> None:
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors: above 1 it slows two more than one")
    with ExitStack() as stack:
        teams = {name: stack.enter_context(Team(*case, "speed")) for name, case in CASES.items()}
        seconds: dict[str, list[float]] = {name: [] for name in teams}
        for turn in range(rounds + 1):
            for name, team in teams.items():
                took = max(float(answer.split()[0]) for answer in team.round())
                if turn:  # the first warms up
                    seconds[name].append(took)
    print(f"small ViT-MAE, {ROWS} images of 32 pixels a step, {STEPS} steps a round, median of {rounds} rounds in turn")
    for name, own in seconds.items():
        ratios = [alone / mine for alone, mine in zip(seconds["one process"], own, strict=True)]
        ratio, rate = statistics.median(ratios), STEPS * ROWS / statistics.median(own)
        verdict = f"   bar {BAR} {'met' if ratio >= BAR else 'missed'}" if name == "two, copies" else ""
        print(f"  {name:<16} {rate:8.1f} images/s   {ratio:.2f} x{verdict}")


def memory() -> None:
    print("\nbase ViT-MAE, 2 images of 224 pixels a step: MB of a process over what it had before the model was built")
    for name, case in CASES.items():
        with Team(*case, "memory") as team:
            for rank, answer in enumerate(team.round()):
                _, between, peak = map(float, answer.split())
                print(f"  {name:<16} process {rank}: {between / 1e6:7.0f} between steps, {peak / 1e6:7.0f} at the peak")


def main(rounds: int = 7) -> None:
    speed(rounds)
    memory()


def command(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--worker", choices=["speed", "memory"])
    parser.add_argument("--sharding", default="none")
    given = parser.parse_args(arguments)
    if given.worker:
        worker(given.worker, given.sharding)
    elif given.plan:
        from benchmarks import scaling_plan

        scaling_plan.main()
    else:
        main(given.rounds)


if __name__ == "__main__":
    command(sys.argv[1:])
