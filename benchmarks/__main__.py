# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: every ratio beside its bar, all in one run."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

SIZE_BAR = 16.0


def size() -> None:
    """The package's own files."""
    import anabranch

    root = Path(anabranch.__file__).parent
    files = [path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    total = sum(path.stat().st_size for path in files) / 1e6
    print(f"\nsize of the package: {total:.2f} MB   bar {SIZE_BAR} {'met' if total <= SIZE_BAR else 'missed'}")


def main() -> None:
    from benchmarks import clustering, erasing, experts, mixture, mote, mote_peers, processes, startup, subnets

    print("\nstart-up")
    startup.main()
    size()
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
    print("\nprocesses")
    processes.main()


if __name__ == "__main__":
    main()
