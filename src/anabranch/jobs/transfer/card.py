# SPDX-License-Identifier: Apache-2.0
"""The model card of a customised model: what it is, how it was chosen, how to open it."""

from dataclasses import dataclass
from typing import Any

from anabranch.models.hub.card import front_matter


@dataclass(frozen=True, kw_only=True)
class Words:
    """How one says what a stock model is and how it is opened."""

    short: str
    long: str
    tags: tuple[str, ...]
    options: str
    """Further arguments of `from_pretrained`."""
    features: str


WORDS = {
    "vit": Words(
        short="ViT",
        long="Vision Transformer",
        tags=("vit", "masked-autoencoder"),
        options=", add_pooling_layer=False",
        features="mean of last_hidden_state[:, 1:]",
    ),
    "resnet": Words(
        short="ResNet",
        long="ResNet",
        tags=("resnet", "self-supervised"),
        options="",
        features="pooler_output.flatten(1)",
    ),
}
"""By the model type of what is handed over."""

ORIGINS = {
    "mae": "the encoder of a masked autoencoder trained without experts",
    "simsiam": "trained by SimSiam (arXiv 2011.10566) on all images alike",
    "byol": "trained by BYOL (arXiv 2006.07733) on all images alike",
}


def opened(model_type: str, path: str) -> str:
    """How a person opens the model."""
    return f'AutoModel.from_pretrained("{path}"{WORDS[model_type].options})'


def size_of(config: Any, said: dict[str, Any]) -> str:
    """1 x 28 x 28, and how a ViT cuts it."""
    patches = f", patches of {config.patch_size}" if hasattr(config, "patch_size") else ""
    return f"{said['channels']} x {said['image_size']} x {said['image_size']}{patches}"


def proven(said: dict[str, Any]) -> str:
    """What the extraction was compared with."""
    difference = said.get("largest_difference")
    if difference is None:
        return ""
    return f"\nOn images of the task its features are those of the routed model, to {difference:.1e}."


def model_card(said: dict[str, Any], config: Any) -> str:
    """README.md in the form that model hubs read; a method may bring `origin` and `how` in its own words."""
    words = WORDS[config.model_type]
    origin = said.get("origin") or f"A plain {words.long}, {ORIGINS[said['method']]}."
    how = said.get("how") or "Nothing was chosen: this is the plain model, the same for every task."
    more = " `customize.json` holds the histogram." if said.get("histogram") is not None else ""
    warnings = "".join(f"\n* {warning}" for warning in said["warnings"]) or "\nNone."
    model = opened(config.model_type, "PATH")
    timed = f"\n| milliseconds an image, where it was made | {said['latency_ms']:.2f} |" if "latency_ms" in said else ""
    head = front_matter(
        library_name="transformers", tags=[*words.tags, said["method"]], pipeline_tag="image-feature-extraction"
    )
    return f"""{head}# A {words.short} for {said["task"]}

{origin}
It needs no library but transformers.

```python
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("PATH")
model = {model}          # features: {words.features}
classifier = AutoModelForImageClassification.from_pretrained("PATH", num_labels=10)   # a new head, to be fine-tuned
```

| | |
| --- | --- |
| images | {size_of(config, said)} |
| parameters | {said["parameters"]:,} |
| multiply-accumulates an image | {said["macs"]:,} |{timed}

## How it was chosen
{how}{more}{proven(said)}

Whether it serves the task better than the plain model was not measured by the choice;
`anabranch measure` compares models on a labelled task.

## Warnings
{warnings}
"""
