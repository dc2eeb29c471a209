# SPDX-License-Identifier: Apache-2.0
"""Images to features, in chunks, without gradients."""

import torch
from torch import Tensor, nn

from anabranch.data.images import Images
from anabranch.models.vit_mae import encode, normalise, pooled

CHUNK = 500


@torch.no_grad()
def embed(model: nn.Module, images: Images) -> Tensor:
    """(N, D) float32: mean of the patch tokens of the unmasked image."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    rows = torch.arange(len(images)).split(CHUNK)
    features = [pooled(encode(model, normalise(images.store.read(chunk).to(device)))).cpu() for chunk in rows]
    model.train(was_training)
    return torch.cat(features)
