# SPDX-License-Identifier: Apache-2.0
"""What `anabranch erase` refuses before anything long: torn models and labels, data that changed since a run began."""

from pathlib import Path
from typing import Any

from anabranch.data.labels import Labels, read_labels, refuse_changed
from anabranch.errors import UsageError
from anabranch.models.diffusion.family import open_pipeline
from anabranch.suppress.geom_erasing.adapter_folder import UNREADABLE, told


def open_model(folder: Path) -> Any:
    """`open_pipeline`; a folder that is torn is an error that says so."""
    try:
        return open_pipeline(folder)
    except UNREADABLE as error:
        raise UsageError(
            f"the model {folder} cannot be opened",
            expected="a whole folder, as pipe.save_pretrained wrote it",
            received=told(error),
            hint="copy it again; nothing is downloaded here",
        ) from error


def open_labels(path: Path, images: Path | None) -> Labels:
    """`read_labels`, and every image is the very one that was scanned."""
    try:
        labels = read_labels(path, images)
    except UNREADABLE as error:
        raise UsageError(
            f"{path} cannot be read", expected="the labels.jsonl of anabranch erase scan", received=told(error),
            hint="scan the images again",
        ) from error  # fmt: skip
    refuse_changed(labels)
    return labels
