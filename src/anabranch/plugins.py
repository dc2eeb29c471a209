# SPDX-License-Identifier: Apache-2.0
"""What other packages bring: found by name in the entry points that they announce, never by a path of import.

anabranch.methods      a module with a card
anabranch.detectors    detector(rest, *, concept, threshold) -> what suppress/detectors/protocol.py calls a Detector
anabranch.judges       judge(rest, *, threshold, batch_size) -> what jobs/align/judges.py calls a Judge

To list them imports none. One that can't be loaded is an error that says whose it is.
"""

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from anabranch.errors import AnabranchError, UsageError, did_you_mean

METHODS, DETECTORS, JUDGES = GROUPS = ("anabranch.methods", "anabranch.detectors", "anabranch.judges")


def plugins(group: str) -> dict[str, list[EntryPoint]]:
    """By name, sorted; more than one where several packages use the same name."""
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, package_of(point))):
        others = found.setdefault(point.name, [])
        if (package_of(point), point.value) not in [(package_of(other), other.value) for other in others]:
            others.append(point)
    return found


def package_of(point: EntryPoint) -> str:
    """Name and version."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"


def load(group: str, name: str) -> tuple[Any, str]:
    """What is announced under a name, and the package that it is from.

    Raises:
        UsageError: several packages use the name.
        AnabranchError: it can't be imported.
    """
    first, *others = plugins(group)[name]
    if others:
        raise UsageError(
            f"{name!r} is the name of several {group.partition('.')[2]}", expected="one",
            received=", ".join(map(package_of, (first, *others))), hint="uninstall all but one of them",
        )  # fmt: skip
    try:
        return first.load(), package_of(first)
    except Exception as error:
        raise broken(name, package_of(first), error, f"{first.value} to be importable") from error


def broken(name: str, package: str, error: Exception | str, expected: str) -> AnabranchError:
    told = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return AnabranchError(
        f"{name!r}, from the package {package}, does not work", expected=expected, received=told[:500],
        hint="another version of that package, or tell its authors",
    )  # fmt: skip


def opened(group: str, name: str, rest: str, needed: Iterable[str], **options: Any) -> Any:
    """The detector or judge that a package makes of `rest`; it has to have the attributes in `needed`."""
    make, package = load(group, name)
    try:
        made = make(rest, **options)
    except AnabranchError:
        raise
    except Exception as error:
        raise broken(name, package, error, f"{name}({rest!r}, {', '.join(options)}) to work") from error
    if missing := [attribute for attribute in needed if not hasattr(made, attribute)]:
        received = f"a {type(made).__name__} without {', '.join(missing)}"
        raise broken(name, package, received, f"an object with {', '.join(needed)}")
    return made


def unknown(kind: str, given: str, own: Iterable[str], group: str) -> UsageError:
    """The error for a name that is neither ours nor installed; the installed ones are in it."""
    names = list(plugins(group))
    others = f"; installed: {', '.join(names)}" if names else ""
    own = list(own)
    known = [spec.partition(":")[0] for spec in own] + names
    return UsageError(
        f"there is no {kind} {given!r}", expected=", ".join(own) + others, hint=did_you_mean(given, known)
    )
