# SPDX-License-Identifier: Apache-2.0
"""Whether a file was made on this very model."""

import hashlib

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """sha-256 over every saved tensor's name, shape and values; half precision counts as the float32 that it equals."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
