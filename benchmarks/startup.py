# SPDX-License-Identifier: Apache-2.0
"""What a command costs that only answers: processor seconds of its process, beside a bare interpreter."""

import resource
import statistics
import subprocess
import sys

BAR = 0.2
"""Of every command here; none of them imports torch."""
ROUNDS = 9
CASES = {
    "--help": [],
    "measure --help": ["measure", "--help"],
    "list": ["list"],
    "doctor": ["doctor"],
    "a misspelt command": ["mesure"],
    "a misspelt flag": ["measure", "--stps", "3"],
    "a misspelt method": ["list", "--method", "specialize/mocee"],
    "a wrong choice": ["pretrain", "--method", "mocee"],
    "a misspelt setting": ["measure", "--set", "learning_rat=1"],
    "a wrong value": ["measure", "--set", "learning_rate=fast"],
    "no settings file": ["measure", "--config", "nowhere.yaml"],
}


def processor_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """The median of nine, every case once a round, so that a busy moment hits all alike."""
    bare = "python -c pass"
    commands = {bare: [sys.executable, "-c", "pass"]}
    commands |= {f"anabranch, {name}": [sys.executable, "-m", "anabranch", *given] for name, given in CASES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            seconds[name].append(processor_seconds(command))
    print(f"processor seconds, median of {ROUNDS}; bar {BAR}")
    for name, found in seconds.items():
        middle = statistics.median(found)
        told = "" if name == bare else "   met" if middle <= BAR else "   missed"
        print(f"  {name:<34} {middle:.3f}   least {min(found):.3f}{told}")


if __name__ == "__main__":
    main()
