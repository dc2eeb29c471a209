# SPDX-License-Identifier: Apache-2.0
"""Open a transformers model that lies in a folder: no download, no pickle, no code from the folder."""

import hashlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from anabranch.errors import UsageError
from anabranch.models.language.folder import ALONE
from anabranch.models.shards import refuse_strange_shards

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


def load_local(folder: Path, processor: str, model: str, what: str) -> tuple[Any, Any]:
    """(processor, model in eval mode), by the names of transformers' auto classes."""
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder}: {'this folder holds no config.json' if folder.is_dir() else 'there is no such folder'}",
            expected=f"a folder with {what}, as save_pretrained of transformers writes it",
            hint="models are never downloaded here; fetch it first and name its folder",
        )
    refuse_strange_shards(folder)
    import transformers

    try:
        return (
            getattr(transformers, processor).from_pretrained(folder, **ALONE),
            getattr(transformers, model).from_pretrained(folder, use_safetensors=True, **ALONE).eval(),
        )
    except UNREADABLE as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{folder} is not {what} that can be opened", received=first) from error


def fingerprint(folder: Path) -> str:
    """Of the weights: two folders with one fingerprint answer alike."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256 {digest.hexdigest()[:16]}"
