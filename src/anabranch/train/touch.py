# SPDX-License-Identifier: Apache-2.0
"""Touch report: which tensors were named, trained, changed and left alone. Guards against the silent no-op.

before = digest(model)
...
touch_report(before, digest(model), named=["decoder.*"])  # raises CheckFailed unless just these changed
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from anabranch.errors import CheckFailed, did_you_mean


@dataclass(frozen=True, kw_only=True)
class TouchReport:
    named: tuple[str, ...]
    trained: tuple[str, ...]
    changed: tuple[str, ...]
    left_alone: tuple[str, ...]

    def __str__(self) -> str:
        counts = (len(self.named), len(self.trained), len(self.changed), len(self.left_alone))
        return "{} tensors named, {} trained, {} changed, {} left alone".format(*counts)


def digest(module: nn.Module) -> dict[str, str]:
    """sha-256 of each parameter and saved buffer, over its type, shape and bits."""
    return {name: digest_of(tensor) for name, tensor in module.state_dict().items()}


def digest_of(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten()
    told = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(told + flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def touch_report(
    before: Mapping[str, str], after: Mapping[str, str], named: Sequence[str], trained: Iterable[str] = ()
) -> TouchReport:
    """Compare two digests. Each pattern of `named` must have changed something, and nothing else may have changed."""
    names = sorted(before.keys() | after.keys())
    changed = {name for name in names if before.get(name) != after.get(name)}
    matches = {pattern: [name for name in names if fnmatchcase(name, pattern)] for pattern in named}
    for pattern, matched in matches.items():
        if not matched:
            raise CheckFailed(f"no tensor is called {pattern!r}", hint=did_you_mean(pattern, names)[:500])
        if not changed & set(matched):
            raise CheckFailed(f"{pattern!r} was to change, but all {len(matched)} of its tensors are as before")
    named_tensors = {name for matched in matches.values() for name in matched}
    surprises = sorted(changed - named_tensors)
    if surprises:
        raise CheckFailed(
            f"{len(surprises)} tensors changed that were not to change",
            expected=f"changes only in {', '.join(named) or 'nothing'}",
            received=", ".join(surprises[:5]),
        )
    return TouchReport(
        named=tuple(sorted(named_tensors)),
        trained=tuple(sorted(trained)),
        changed=tuple(sorted(changed)),
        left_alone=tuple(name for name in names if name not in changed),
    )
