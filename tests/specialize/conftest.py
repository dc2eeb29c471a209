# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from anabranch.models import vit_mae


@pytest.fixture
def base():
    return vit_mae.build("tiny", image_size=28, channels=1, seed=0)


@pytest.fixture
def batch():
    """Eight images of four clusters, two each."""
    g = torch.Generator().manual_seed(1)
    return {
        "pixels": torch.randint(0, 256, (8, 1, 28, 28), generator=g, dtype=torch.uint8),
        "noise": torch.rand(8, 16, generator=g),
        "cluster": torch.arange(4).repeat_interleave(2),
        "row": torch.arange(8),
        "step": torch.full((8,), 3),
    }


@pytest.fixture
def centroids():
    return torch.nn.functional.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(2)), dim=1)
