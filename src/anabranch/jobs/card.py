# SPDX-License-Identifier: Apache-2.0
"""The model card of a customised model: what it is, how it was chosen, how to open it."""

from typing import Any


def model_card(said: dict[str, Any], config: Any) -> str:
    """README.md in the form that model hubs read."""
    how = (
        f"The route {said['path']} through the experts was chosen because {said['coverage']:.0%} of the task's "
        f"{said['task_images']:,} training images belong to clusters that take it "
        f"(effective number of clusters: {said['effective_clusters']:.1f})."
        if said.get("coverage") is not None
        else "No route through experts was chosen: this is the plain model."
    )
    moce = said["method"] == "moce"
    origin = (
        "A plain Vision Transformer, taken out of a mixture of cluster-conditional experts (MoCE, arXiv 2402.05382)."
        if moce
        else "A plain Vision Transformer, the encoder of a masked autoencoder trained without experts."
    )
    more = " `customize.json` holds the histogram." if said.get("coverage") is not None else ""
    warnings = "".join(f"\n* {warning}" for warning in said["warnings"]) or "\nNone."
    return f"""---
library_name: transformers
tags: [vit, masked-autoencoder, {said["method"]}]
---
# A ViT for {said["task"]}

{origin}
It needs no library but transformers.

```python
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("PATH")
model = AutoModel.from_pretrained("PATH", add_pooling_layer=False)          # features: mean of last_hidden_state[:, 1:]
classifier = AutoModelForImageClassification.from_pretrained("PATH", num_labels=10)   # a new head, to be fine-tuned
```

| | |
| --- | --- |
| images | {config.num_channels} x {config.image_size} x {config.image_size}, patches of {config.patch_size} |
| parameters | {said["parameters"]:,} |
| multiply-accumulates an image | {said["macs"]:,} |

## How it was chosen
{how}{more}

## Warnings
{warnings}
"""
