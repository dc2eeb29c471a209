# SPDX-License-Identifier: Apache-2.0
"""Who speaks for a model: the module of this folder that bears the name of its model type.

Every bridge offers

    PRESETS                                         the sizes it can build, by name
    build(preset, *, image_size, channels, seed)    a fresh model, its weights a function of the seed
    load(path)                                      a model from a local transformers folder
    check_size(preset, image_size)                  raises where the preset cannot take such images
    check_images(model, *, image_size, channels, name)
    normalise(pixels)                               uint8 -> what the model takes
    features(model, pixel_values)                   (B, C, S, S) -> (B, D) float32, what probes and clusters see
    image_processor(image_size, channels)           preprocessor_config.json
    macs(model)                                     multiply-accumulates of one image
    copy_of(model)                                  an independent copy, in eval mode
    to_plain(model)                                 the stock model that is handed over; every tensor is a copy
    FEATURES                                        what `features` are, in a few words

and its models' configurations hold `image_size` and `num_channels`.
"""

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError
from torch import nn

from anabranch.errors import UsageError, did_you_mean, near
from anabranch.models.shards import refuse_strange_shards

NO_BRIDGES = ("__init__", "bridge", "shards", "shipped")


def bridge(model: nn.Module | str) -> ModuleType:
    """The bridge of a model, or of a model type such as `vit_mae`."""
    model_type = model if isinstance(model, str) else str(model.config.model_type)
    known = [path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in NO_BRIDGES]
    if model_type not in known:
        raise UsageError(f"there is no bridge to models of type {model_type!r}", hint=did_you_mean(model_type, known))
    return import_module(f"anabranch.models.{model_type}")


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a transformers folder."""
    folder = Path(path)
    file = folder / "config.json"
    if not file.is_file():
        raise UsageError(
            f"{folder} is not a model folder",
            expected="config.json and model.safetensors, as save_pretrained writes them",
            received="no such folder" if not folder.exists() else "no config.json",
            hint=near(folder),
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read", expected="JSON", received=error) from error
    if not isinstance(config, dict):
        raise UsageError(f"{file} cannot be read", expected="a JSON object", received=type(config).__name__)
    return config


def open_model(path: str | Path) -> nn.Module:
    """The model of a transformers folder, by whichever bridge its config.json names."""
    model: nn.Module = bridge(str(read_config(path).get("model_type"))).load(path)
    return model


def transformers() -> Any:
    """The library, without its progress bars: a bar for one small file says nothing."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_stock(path: str | Path, class_name: str, *, model_type: str, expected: str, hint: str) -> nn.Module:
    """A model of transformers from a local folder, in eval mode.

    Raises:
        UsageError: the folder is missing, holds another kind of model, or lacks tensors of its own configuration.
    """
    folder = Path(path)
    found = read_config(folder).get("model_type")
    if found != model_type:
        raise UsageError(f"{folder} holds a {found} model", expected=f"{expected} (model_type {model_type})", hint=hint)
    refuse_strange_shards(folder)
    try:
        model, info = getattr(transformers(), class_name).from_pretrained(
            folder, output_loading_info=True, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UsageError(
            f"{folder} cannot be loaded", expected="tensors of the shapes its config.json gives", received=error
        ) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        missing, mismatched = (sorted(map(str, info[kind]))[:3] for kind in ("missing_keys", "mismatched_keys"))
        raise UsageError(
            f"{folder} does not hold the model that its config.json describes",
            expected="every tensor, in its shape",
            received=f"missing {missing}, of another shape {mismatched}",
        )
    loaded: nn.Module = model.eval()
    return loaded


def check_fit(name: str, image_size: int, channels: int, expected_size: int, expected_channels: int) -> None:
    """Raises where images are not of the size and channels that a model was made for."""
    for what, expected, received in (
        ("channels", expected_channels, channels),
        ("pixels a side", expected_size, image_size),
    ):
        if expected != received:
            raise UsageError(
                f"{name} does not fit the model",
                expected=f"images of {expected} {what}",
                received=received,
                hint="read the images at the model's size and channels",
            )
