# SPDX-License-Identifier: Apache-2.0
"""The table of the contract: every method and check, what passed, what is exempt and why.

    python -m anabranch.testing [KEY ...] [--tests tests]

Exits with 1 if anything failed.
"""

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

from anabranch import registry
from anabranch.testing.discovery import find_subject
from anabranch.testing.method_contract import CHECKS, EXEMPT, FAILED, NOT_APPLICABLE, PASSED, Outcome, examine

MARKS = {PASSED: "x", EXEMPT: "e", NOT_APPLICABLE: ".", FAILED: "FAIL"}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m anabranch.testing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("keys", nargs="*", metavar="KEY", help="of methods, or beginnings of them; all by default")
    parser.add_argument("--tests", type=Path, default=Path("tests"), help="the folder that mirrors the methods")
    flags = parser.parse_args(argv)
    known = [key for key in registry.cards() if not flags.keys or key.startswith(tuple(flags.keys))]
    if not known:
        print("no method is called that; anabranch list names all", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(flags.tests.resolve().parent))  # tests import each other as `tests.…`
    table = {}
    print(heading(known))
    for key in known:
        table[key] = examine(key, find_subject(key, flags.tests))
        print(row(key, known, table[key]), flush=True)
    print("\n".join(["", *notes(table, EXEMPT), *notes(table, FAILED), *counts(table)]))
    return int(any(one.state == FAILED for outcomes in table.values() for one in outcomes.values()))


def heading(keys: list[str]) -> str:
    return f"{'':<{max(map(len, keys))}}  " + " ".join(CHECKS)


def row(key: str, keys: list[str], outcomes: dict[str, Outcome]) -> str:
    cells = [f"{MARKS[outcomes[name].state]:^{len(name)}}" for name in CHECKS]
    return f"{key:<{max(map(len, keys))}}  " + " ".join(cells)


def notes(table: dict[str, dict[str, Outcome]], state: str) -> list[str]:
    """One line for every reason of a method, with all checks that have it."""
    lines = []
    for key, outcomes in table.items():
        reasons: dict[str, list[str]] = {}
        for name, outcome in outcomes.items():
            if outcome.state == state:
                reasons.setdefault(outcome.why, []).append(name)
        for why, names in reasons.items():
            listed = "everything" if len(names) == len(CHECKS) else ", ".join(names)
            lines.append(f"{state} {key}: {listed} ({why})")
    return [*lines, ""] if lines else []


def counts(table: dict[str, dict[str, Outcome]]) -> list[str]:
    states = Counter(one.state for outcomes in table.values() for one in outcomes.values())
    told = ", ".join(f"{states[state]} {state}" for state in MARKS if states[state])
    return [f"{len(table)} methods, {len(CHECKS)} checks: {told}"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
