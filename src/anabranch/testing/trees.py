# SPDX-License-Identifier: Apache-2.0
"""Values inside values: what a method takes and returns, seen as one flat dictionary of leaves.

Containers are mappings, lists, tuples, sets, dataclasses, modules (parameters and buffers) and pipelines (whatever has
`components`). All else is a leaf: tensors, arrays, numbers, texts, and objects that are compared by their type alone.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Set
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Generator = torch.Generator | np.random.Generator


def children(value: Any) -> dict[str, Any] | None:
    """The parts of a container by name; None for a leaf."""
    if isinstance(value, nn.Module):
        return {**dict(value.named_parameters()), **dict(value.named_buffers())}
    if isinstance(value, Mapping):
        return {str(name): part for name, part in value.items()}
    if isinstance(getattr(value, "components", None), Mapping):
        return {name: part for name, part in value.components.items() if isinstance(part, nn.Module)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return value._asdict()
    if isinstance(value, Set):
        return {str(i): part for i, part in enumerate(in_order(value))}
    if isinstance(value, (list, tuple)):
        return {str(i): part for i, part in enumerate(value)}
    return None


def in_order(value: Any) -> list[Any]:
    """Members by number: of a set in the order of their words, as it has none of its own."""
    return sorted(value, key=repr) if isinstance(value, Set) else list(value)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of everything inside, such as ("batch.input_ids", tensor)."""
    parts = children(value)
    if parts is None:
        yield path, value
        return
    yield f"{path}()", len(parts)  # an empty list is not nothing
    for name, part in parts.items():
        yield from leaves(part, f"{path}.{name}" if path else name)


class Snapshot(dict[str, Any]):
    """Leaves by path; `difference` takes it as it is."""


def snapshot(value: Any) -> Snapshot:
    """All leaves, copied, so that they can be compared later."""
    return Snapshot({path: copied(leaf) for path, leaf in leaves(value)})


def copied(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    if isinstance(leaf, (torch.Generator, np.random.Generator)):
        return state_of(leaf)
    return leaf


def state_of(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return repr(generator.bit_generator.state)


def difference(received: Any, expected: Any, tolerance: float = 0.0, scale: float = 0.0) -> str | None:
    """Where two values (or snapshots) differ first and by how much; None where they are the same.

    tolerance   of floating numbers, relative to the largest expected one of the same leaf; 0 asks for the same bits
    scale       taken instead where the largest one is smaller
    """
    mine = received if isinstance(received, Snapshot) else snapshot(received)
    theirs = expected if isinstance(expected, Snapshot) else snapshot(expected)
    if mine.keys() != theirs.keys():
        return f"{sorted(mine.keys() ^ theirs.keys())[0] or 'the result'} is there in one and not in the other"
    for path, leaf in theirs.items():
        if (how := unlike(mine[path], leaf, tolerance, scale)) is not None:
            return f"{path or 'the result'} {how}"
    return None


def unlike(mine: Any, theirs: Any, tolerance: float, scale: float) -> str | None:
    mine, theirs = (as_array(leaf) for leaf in (mine, theirs))
    if not isinstance(mine, np.ndarray) or not isinstance(theirs, np.ndarray):
        if isinstance(theirs, (str, bytes, int, type(None))) or isinstance(mine, (str, bytes, int, type(None))):
            return None if mine == theirs else f"is {str(mine)[:60]!r} and not {str(theirs)[:60]!r}"
        return None if type(mine) is type(theirs) else f"is a {type(mine).__name__}, not a {type(theirs).__name__}"
    if mine.shape != theirs.shape:
        return f"has shape {mine.shape} and not {theirs.shape}"
    if theirs.dtype.kind not in "fc" or tolerance == 0:
        equal = (mine == theirs) | ((mine != mine) & (theirs != theirs))
        return None if equal.all() else f"differs in {int((~equal).sum())} of {equal.size} places"
    finite = np.isfinite(theirs)
    odd = ~finite & (mine != theirs) & ~((mine != mine) & (theirs != theirs)) | (finite & ~np.isfinite(mine))
    if odd.any():
        return f"is no number in {int(odd.sum())} places of one"
    scale = max(float(np.abs(theirs[finite]).max(initial=0.0)), scale, 1e-12)
    worst = float(np.abs(mine[finite] - theirs[finite]).max(initial=0.0)) / scale
    return None if worst <= tolerance else f"differs by {worst:.2g} of its largest value, at most {tolerance:.2g}"


def as_array(leaf: Any) -> Any:
    """Tensors, arrays and floats as fp64 or as they are; all else unchanged."""
    if isinstance(leaf, Tensor):
        leaf = leaf.detach().cpu()
        return (leaf.double() if leaf.is_floating_point() else leaf).numpy()
    if isinstance(leaf, (float, np.floating)):
        return np.asarray(float(leaf))
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f":
        return leaf.astype(np.float64)
    return leaf if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc" else plain(leaf)


def plain(leaf: Any) -> Any:
    return leaf.item() if isinstance(leaf, np.generic) else leaf


def replaced(value: Any, path: str, change: Any) -> Any:
    """A value whose leaf at `path` is `change(leaf)`; containers on the way are made anew, all else is shared."""
    if not path:
        return change(value)
    parts = children(value) or {}
    name = next(name for name in parts if path == name or path.startswith(f"{name}."))
    return rebuilt(value, {name: replaced(parts[name], path[len(name) + 1 :], change)})


class InPlace(Exception):
    """Tensors of a module are changed in place."""


def rebuilt(value: Any, parts: dict[str, Any]) -> Any:
    """The container with some of its parts exchanged."""
    if isinstance(value, nn.Module) or hasattr(value, "components"):
        raise InPlace
    if isinstance(value, Mapping):
        return type(value)({key: parts.get(str(key), part) for key, part in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        init = {field.name for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: part for name, part in parts.items() if name in init})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return value._replace(**parts)
    return type(value)(parts.get(str(i), part) for i, part in enumerate(in_order(value)))


def reordered(value: Any, along: Mapping[str, int], order: list[int], path: str = "") -> Any:
    """What lies at the paths that match a pattern, in another order along the given dimension; modules as they are."""
    if isinstance(value, nn.Module):
        return value
    dim = next((dim for pattern, dim in along.items() if fnmatchcase(path, pattern)), None)
    if dim is not None:
        if isinstance(value, Tensor):
            return value.index_select(dim, torch.tensor(order))
        if isinstance(value, np.ndarray):
            return value.take(order, axis=dim)
        if isinstance(value, (list, tuple)):
            return type(value)(value[i] for i in order)
    parts = children(value)
    if not parts or hasattr(value, "components"):
        return value
    changed = {name: reordered(part, along, order, f"{path}.{name}" if path else name) for name, part in parts.items()}
    return rebuilt(value, {name: part for name, part in changed.items() if part is not parts[name]})
