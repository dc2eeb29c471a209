# SPDX-License-Identifier: Apache-2.0
"""In which space generated pictures are compared with real ones: a plain one without a network, or a model's from disk.

Shapes    : pictures (N, C, S, S) uint8; features (N, D) float.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from anabranch.suppress.detectors.local_model import load_local

BATCH = 32
THUMBNAIL, CELLS = 8, 4
PLAIN = f"{THUMBNAIL}×{THUMBNAIL} grey thumbnail and mean gradients of {CELLS}×{CELLS} cells (96 numbers, no network)"


@dataclass(frozen=True)
class FeatureSpace:
    name: str
    images: Callable[[Tensor], np.ndarray]
    agreement: Callable[[Tensor, Sequence[str]], np.ndarray] | None = None
    """100 max(cos(picture, prompt), 0) of each pair, where the model knows text as well."""


def plain_features(pixels: Tensor) -> np.ndarray:
    """Brightness at 8 x 8 places, mean absolute difference of neighbours along and across in 4 x 4 cells."""
    grey = pixels.float().mean(1, keepdim=True) / 255
    across, down = grey.diff(dim=-1).abs(), grey.diff(dim=-2).abs()
    parts = [adaptive_avg_pool2d(grey, THUMBNAIL), *(adaptive_avg_pool2d(part, CELLS) for part in (across, down))]
    return torch.cat([part.flatten(1) for part in parts], dim=1).numpy()


def open_features(folder: Path | None) -> FeatureSpace:
    """Of a transformers image model in a folder (CLIP, DINO, ViT, ...); the plain one without a folder."""
    if folder is None:
        return FeatureSpace(PLAIN, plain_features)
    processor, model = load_local(folder, "AutoImageProcessor", "AutoModel", "an image model")
    knows_text = hasattr(model, "get_text_features")

    @torch.inference_mode()
    def images(pixels: Tensor) -> np.ndarray:
        parts = []
        for chunk in pixels.split(BATCH):
            arrays = list(chunk.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
            inputs = processor(images=arrays, return_tensors="pt").to(model.device)
            found = embedding(model.get_image_features(**inputs)) if knows_text else mean_over_places(model(**inputs))
            parts.append(found.float().cpu())
        return torch.cat(parts).numpy()

    if not knows_text:
        return FeatureSpace(f"{folder.name}, mean over places", images)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    @torch.inference_mode()
    def agreement(pixels: Tensor, prompts: Sequence[str]) -> np.ndarray:
        inputs = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(model.device)
        text = embedding(model.get_text_features(**inputs)).float().cpu()
        cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(images(pixels)), text)
        return (100 * cosine.clamp(min=0)).numpy()

    return FeatureSpace(f"{folder.name}, image embedding", images, agreement)


def embedding(output: Any) -> Tensor:
    """(N, D) in the space that pictures and texts share."""
    return output if isinstance(output, Tensor) else output.pooler_output


def mean_over_places(output: Any) -> Tensor:
    """(N, D) of hidden states (N, T, D) or (N, D, h, w)."""
    hidden = output.last_hidden_state
    return hidden.flatten(2).mean(-1) if hidden.ndim == 4 else hidden.mean(1)
