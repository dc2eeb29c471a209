# SPDX-License-Identifier: Apache-2.0
"""Which files an index of weights may name: .safetensors beside it. Stock loaders follow it anywhere, pickles too."""

import json
from pathlib import Path

from anabranch.errors import UsageError

FORBIDDEN = frozenset('/\\:*?"<>|')


def refuse_strange_shards(folder: Path) -> None:
    """
    Raises:
        UsageError: an index in the folder cannot be read, or names what is no .safetensors file beside it.
    """
    for index in sorted(folder.rglob("*.index.json")):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{index} cannot be read", expected="a weight_map", received=repr(error)) from error
        for name in names:
            if not is_shard(name):
                received = repr(name)[:200]
                raise UsageError(
                    f"{index} names a strange file", expected="NAME.safetensors beside it", received=received
                )


def is_shard(name: object) -> bool:
    safe = isinstance(name, str) and name.isprintable() and len(name) <= 255 and not FORBIDDEN & set(name)
    return safe and str(name).endswith(".safetensors") and not str(name).startswith(".")
