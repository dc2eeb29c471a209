# SPDX-License-Identifier: Apache-2.0
"""Images to features, in chunks, without gradients."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from anabranch.data.images import Images
from anabranch.jobs.together import gathered
from anabranch.models.bridge import bridge

CHUNK = 500


@torch.no_grad()
def embed(model: nn.Module, images: Images) -> Tensor:
    """(N, D) float32: what the model's bridge calls its features."""
    was_training = model.training
    make = of_rows(model.eval(), images)
    features = torch.cat([make(rows) for rows in torch.arange(len(images)).split(CHUNK)])
    model.train(was_training)
    return features


@torch.no_grad()
def embed_together(model: nn.Module, images: Images) -> Tensor | None:
    """The same by all processes of a run, in the first one; None in the others."""
    was_training = model.training
    features = gathered(torch.arange(len(images)).split(CHUNK), of_rows(model.eval(), images))
    model.train(was_training)
    return features


def of_rows(model: nn.Module, images: Images) -> Callable[[Tensor], Tensor]:
    family, device = bridge(model), next(model.parameters()).device
    return lambda rows: family.features(model, family.normalise(images.store.read(rows).to(device))).cpu()
