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

from torch import nn

from anabranch.errors import UsageError, did_you_mean

NO_BRIDGES = ("__init__", "bridge")


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
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} cannot be read", expected="JSON", received=error) from error
    if not isinstance(config, dict):
        raise UsageError(f"{file} cannot be read", expected="a JSON object", received=type(config).__name__)
    return config


def open_model(path: str | Path) -> nn.Module:
    """The model of a transformers folder, by whichever bridge its config.json names."""
    model: nn.Module = bridge(str(read_config(path).get("model_type"))).load(path)
    return model
