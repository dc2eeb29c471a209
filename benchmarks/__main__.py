# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: every ratio beside its bar, all in one run."""

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

HELP_BAR = 0.2
SIZE_BAR = 16.0


def processor_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def start_up() -> None:
    """CPU seconds of a command that only answers, beside a bare interpreter."""
    cases = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "anabranch --help": [sys.executable, "-m", "anabranch", "--help"],
        "anabranch measure --help": [sys.executable, "-m", "anabranch", "measure", "--help"],
        "anabranch list": [sys.executable, "-m", "anabranch", "list"],
    }
    print("\nstart-up: CPU seconds, median of 9")
    for name, command in cases.items():
        seconds = statistics.median(processor_seconds(command) for _ in range(9))
        bar = f"   bar {HELP_BAR} {'met' if seconds <= HELP_BAR else 'missed'}" if name == "anabranch --help" else ""
        print(f"  {name:<28} {seconds:.3f}{bar}")


def size() -> None:
    """The package's own files."""
    import anabranch

    root = Path(anabranch.__file__).parent
    files = [path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    total = sum(path.stat().st_size for path in files) / 1e6
    print(f"\nsize of the package: {total:.2f} MB   bar {SIZE_BAR} {'met' if total <= SIZE_BAR else 'missed'}")


def main() -> None:
    start_up()
    size()
    from benchmarks import clustering, erasing, experts, mixture, mote, mote_peers, subnets

    print("\nmixture layer")
    mixture.main()
    print("\nclusters")
    clustering.main()
    print("\nsub-nets")
    subnets.main()
    print("\nerasing")
    erasing.main()
    print("\nstep experts")
    mote.main()
    mote_peers.main()
    print("\nexperts of trained mixtures")
    experts.main()


if __name__ == "__main__":
    main()
