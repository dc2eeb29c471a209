# SPDX-License-Identifier: Apache-2.0
"""`anabranch list`: every method, from its card, without importing one."""

from dataclasses import dataclass

from anabranch.cli.options import parse
from anabranch.errors import DONE, UsageError, did_you_mean
from anabranch.registry import cards


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Every method, from its card. Name one to read its whole card."""

    method: str | None = None
    """A key from the list, such as specialize/moce."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "list")
    known = cards()
    if flags.method is None:
        width = max(map(len, known))
        for key, card in known.items():
            print(f"{key:<{width}}  {card.purpose}")
        return DONE
    if flags.method not in known:
        raise UsageError(f"there is no method {flags.method!r}", hint=did_you_mean(flags.method, known))
    card = known[flags.method]
    print(f"{card.key}\n{card.purpose}\n")
    for name, text in card.fields.items():
        print(f"{name:<9} {text}")
    return DONE
