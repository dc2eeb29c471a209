# SPDX-License-Identifier: Apache-2.0
"""LoRA on a pipeline's denoiser through diffusers and PEFT, written and read as those write and read it.

Paper     : Hu et al. 2021 (arXiv 2106.09685).
Equation  : W x + (alpha / r) B A x, B zero at the start
Shapes    : r the rank; A (r, in), B (out, r).
Differs   : lora_alpha = r, so that the file means the same to every reader.
Check     : stock diffusers samples bit for bit the same with it (tests/suppress/geom_erasing/test_adapter.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anabranch.errors import UsageError
from anabranch.models.diffusion.family import denoiser, family, quiet

NAME = "anabranch"
WEIGHTS = "pytorch_lora_weights.safetensors"


def add_lora(pipe: Any, r: int, seed: int, target_modules: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """New LoRA layers in the denoiser, which compute nothing yet; returns their weights, alone set to be trained."""
    from peft import LoraConfig

    network = denoiser(pipe)
    targets = list(family(pipe).TARGET_MODULES if target_modules is None else target_modules)
    present = [name for name, _ in network.named_modules() if any(name.endswith(f".{target}") for target in targets)]
    if not present:
        raise UsageError(
            "none of the target modules is in the model",
            expected=f"names that end in one of {', '.join(targets)}",
            received=", ".join(sorted({name.rsplit(".", 1)[-1] for name, _ in network.named_modules()})[:20]),
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        config = LoraConfig(r=r, lora_alpha=r, init_lora_weights="gaussian", target_modules=targets)
        network.add_adapter(config, adapter_name=NAME)
    return lora_parameters(pipe)


def lora_parameters(pipe: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in denoiser(pipe).named_parameters() if "lora_" in name and f".{NAME}." in name}


def save_lora(pipe: Any, folder: Path) -> None:
    """`pytorch_lora_weights.safetensors`, as the pipeline itself writes it."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(denoiser(pipe), adapter_name=NAME)
    if family(pipe).LORA_KEYWORD == "unet_lora_layers":
        layers = convert_state_dict_to_diffusers(layers)
    layers = {name: tensor.detach().contiguous().cpu() for name, tensor in layers.items()}
    pipe.save_lora_weights(folder, **{family(pipe).LORA_KEYWORD: layers})


def load_lora(pipe: Any, folder: Path, strength: float = 1.0) -> None:
    with quiet():  # the libraries wonder aloud why the text encoders have no LoRA
        pipe.load_lora_weights(folder, weight_name=WEIGHTS, adapter_name=NAME, local_files_only=True)
    pipe.set_adapters([NAME], [strength])


def remove_lora(pipe: Any) -> None:
    """The denoiser with its own layers again; those were never written to."""
    pipe.unload_lora_weights()
