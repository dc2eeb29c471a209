# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion XL: two text encoders side by side, the second one's pooled text, and the size of the picture."""

from typing import Any

import torch
from torch import Tensor

from anabranch.models.diffusion.conditioning import Conditioning

PIPELINES = ("StableDiffusionXLPipeline",)
DENOISER = "unet"
ENCODERS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
LORA_KEYWORD = "unet_lora_layers"


def max_length(pipe: Any) -> int:
    """Tokens of a prompt, begin and end among them."""
    return min(int(pipe.tokenizer.model_max_length), int(pipe.tokenizer_2.model_max_length))


def encode(pipe: Any, ids: list[Tensor], time_ids: Tensor | None = None) -> Conditioning:
    """Token ids (B, L), one tensor a text encoder, as what the denoiser sees; `time_ids` (B, 6) where it is cropped."""
    first = pipe.text_encoder(ids[0], output_hidden_states=True)
    second = pipe.text_encoder_2(ids[1], output_hidden_states=True)
    embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    if time_ids is None:
        side = latent_size(pipe) * pipe.vae_scale_factor
        time_ids = embeds.new_tensor([side, side, 0, 0, side, side]).expand(len(embeds), -1)
    return Conditioning(embeds=embeds, pooled=second[0], time_ids=time_ids)


def predict(pipe: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """The denoiser's output for latents (B, C, h, w) at one timestep, or one a row."""
    output: Tensor = pipe.unet(
        latents,
        timestep,
        encoder_hidden_states=conditioning.embeds,
        added_cond_kwargs={"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids},
        return_dict=False,
    )[0]
    return output


def call_arguments(conditioning: Conditioning, prefix: str) -> dict[str, Tensor | None]:
    """Arguments of the stock pipeline that stand for a prompt; `prefix` is "" or "negative_"."""
    return {
        f"{prefix}prompt_embeds": conditioning.embeds,
        f"{prefix}pooled_prompt_embeds": conditioning.pooled,
    }


def latent_size(pipe: Any) -> int:
    return int(pipe.unet.config.sample_size)
