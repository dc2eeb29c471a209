# SPDX-License-Identifier: Apache-2.0
"""Images to features, in chunks, without gradients."""

import torch
from torch import Tensor, nn

from anabranch.data.images import Images
from anabranch.models.bridge import bridge

CHUNK = 500


@torch.no_grad()
def embed(model: nn.Module, images: Images) -> Tensor:
    """(N, D) float32: what the model's bridge calls its features."""
    was_training, family = model.training, bridge(model)
    model.eval()
    device = next(model.parameters()).device
    rows = torch.arange(len(images)).split(CHUNK)
    features = [family.features(model, family.normalise(images.store.read(chunk).to(device))).cpu() for chunk in rows]
    model.train(was_training)
    return torch.cat(features)
