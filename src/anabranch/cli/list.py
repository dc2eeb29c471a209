# SPDX-License-Identifier: Apache-2.0
"""`anabranch list`: every method, from its card, without importing one."""

from dataclasses import dataclass, field

from anabranch.cli.flags import OFFERS, parse
from anabranch.errors import DONE, UsageError, did_you_mean
from anabranch.plugins import GROUPS, package_of, plugins
from anabranch.registry import cards, installed_cards


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Every method, from its card. Name one to read its whole card: anabranch list specialize/moce."""

    method: str | None = field(default=None, metadata={OFFERS: lambda flags: cards()})
    """A key from the list, such as specialize/moce."""
    plugins: bool = False
    """What installed packages bring: methods, detectors, judges."""


def main(argv: list[str]) -> int:
    named = ["--method"] if argv and not argv[0].startswith("-") else []
    flags = parse(Flags, [*named, *argv], "list")
    if flags.plugins:
        if flags.method is not None:
            raise UsageError("--method would not be heard: --plugins lists what packages bring", expected="one of them")
        return list_plugins()
    known = installed_cards() | cards()
    if flags.method is None:
        width = max(map(len, known))
        for key, card in sorted(known.items(), key=lambda item: item[1].package != "anabranch"):
            print(f"{key:<{width}}  {card.purpose}" + ("" if card.package == "anabranch" else f" [{card.package}]"))
        return DONE
    if flags.method not in known:
        raise UsageError(f"there is no method {flags.method!r}", hint=did_you_mean(flags.method, known))
    card = known[flags.method]
    print(f"{card.key}\n{card.purpose}\n")
    for name, text in card.fields.items():
        print(f"{name:<9} {text}")
    return DONE


def list_plugins() -> int:
    """By group, with the package that each is from; none is imported."""
    for group in GROUPS:
        print(f"{group}")
        for name, points in plugins(group).items():
            print(f"  {name:<24} {', '.join(map(package_of, points))}  ({', '.join(point.value for point in points)})")
        if not plugins(group):
            print("  none; a package announces them in its entry points, see docs/interfaces.md")
    return DONE
