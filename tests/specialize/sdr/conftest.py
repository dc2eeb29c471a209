# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from anabranch.models import resnet
from anabranch.models.bridge import transformers


@pytest.fixture
def make_backbone():
    """A small ResNetModel whose norms have been somewhere: nothing in it is zero or one by accident."""

    def make(layer_type="basic", hidden_sizes=(8, 12, 16, 20), depths=(1, 2, 1, 1), seed=0):
        config = transformers().ResNetConfig(
            num_channels=1,
            embedding_size=8,
            hidden_sizes=list(hidden_sizes),
            depths=list(depths),
            layer_type=layer_type,
        )
        config.image_size = 28
        model = resnet.fresh(config, seed)
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in (
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.5, 0.5),
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.5, 2),
                ):
                    tensor.data.uniform_(low, high, generator=generator)
        return model

    return make


@pytest.fixture
def disturb():
    """Move every parameter and statistic a little, so that no two paths are alike."""

    def move(net, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            for name, buffer in net.named_buffers():
                if "mean" in name:
                    buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
        return net

    return move


@pytest.fixture
def pixels():
    return torch.randn(6, 1, 28, 28, generator=torch.Generator().manual_seed(1))
