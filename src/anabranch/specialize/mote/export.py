# SPDX-License-Identifier: Apache-2.0
"""One step as one plain LoRA of twice the rank: what engines that serve an adapter a request can load.

Equation  : A' = [A_e; A_u],  B' = [alpha s B_e, (1 - alpha) s B_u],  scale 1
Shapes    : A' (2 r, I), B' (O, 2 r).

Exact for a token of that step. A chain that is served request by request has its earlier tokens read again by the
present step's adapter, which the mixture does not do: there it is an approximation.
"""

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from anabranch.mixture.lora import lora_layers
from anabranch.specialize.mote.mote import SHARED, MoTE


@torch.no_grad()
def fuse(mote: MoTE, step: str, folder: str | Path) -> None:
    """Write one step as a stock PEFT folder, the rows of the steps' tokens in it."""
    folder, config = Path(folder), mote.settings
    config.steps.index(step)
    parts = [(step, config.alpha if config.shared else 1.0)]
    parts += [(SHARED, 1 - config.alpha)] if config.shared else []
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(mote.model).items():
        A = torch.cat([layer.lora_A[part].weight for part, _ in parts])
        B = torch.cat([share * layer.scaling[part] * layer.lora_B[part].weight for part, share in parts], dim=1)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = A.cpu(), B.cpu().contiguous()
    seen: set[int] = set()
    for name, tensor in mote.model.state_dict().items():
        if name.endswith(f"tokens_delta.{config.carrier}") and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name.removesuffix(f".{config.carrier}")] = tensor.cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    said = copy.deepcopy(mote.model.peft_config[config.carrier])
    said.r = said.lora_alpha = len(parts) * config.r
    said.inference_mode = True
    said.save_pretrained(folder)
