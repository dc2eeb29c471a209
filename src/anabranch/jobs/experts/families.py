# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts families`: a tiny model of every family through every operation of the bridge, as a table.

With a model of yours the same is tried on it.
"""

from pathlib import Path

from anabranch.errors import CheckFailed
from anabranch.models.language.folder import hushed, open_language_model
from anabranch.models.mixtures.families import FAMILIES, tiny
from anabranch.testing.mixture_contract import Outcome, contract


def experts_families(model: Path | None = None) -> dict[str, dict[str, Outcome]]:
    """Print the table; returns it.

    Raises:
        CheckFailed: something did not pass.
    """
    found: dict[str, dict[str, Outcome]] = {}
    with hushed():
        names = list(FAMILIES) if model is None else [model.name]
        for name in names:
            own = tiny(name) if model is None else open_language_model(model)[0]
            found[name] = contract(own)
            if len(found) == 1:
                print(f"{'':<12}" + "".join(f"{operation:>9}" for operation in found[name]))
            print(f"{name:<12}" + "".join(f"{shown(outcome):>9}" for outcome in found[name].values()), flush=True)
    print("\nthe largest difference, relative to the largest value; FAILED where it is more than rounding")
    failures = [f"{name}, {operation}: {outcome.why}" for name, row in found.items()
                for operation, outcome in row.items() if not outcome]  # fmt: skip
    if failures:
        raise CheckFailed(f"{len(failures)} operations failed", received="; ".join(failures))
    return found


def shown(outcome: Outcome) -> str:
    return ("0" if outcome.difference == 0 else f"{outcome.difference:.0e}") if outcome else "FAILED"
