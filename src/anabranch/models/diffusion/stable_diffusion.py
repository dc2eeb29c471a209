# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1 and 2 and all of their layout: one text encoder, a U-Net with cross-attention."""

from typing import Any

from torch import Tensor

from anabranch.models.diffusion.conditioning import Conditioning

PIPELINES = ("StableDiffusionPipeline",)
DENOISER = "unet"
ENCODERS = (("tokenizer", "text_encoder"),)
TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
LORA_KEYWORD = "unet_lora_layers"


def max_length(pipe: Any) -> int:
    """Tokens of a prompt, begin and end among them."""
    return int(pipe.tokenizer.model_max_length)


def encode(pipe: Any, ids: list[Tensor], time_ids: Tensor | None = None) -> Conditioning:
    """Token ids (B, L), one tensor a text encoder, as what the denoiser sees."""
    mask = None
    if getattr(pipe.text_encoder.config, "use_attention_mask", None):
        mask = (ids[0] != pipe.tokenizer.pad_token_id).long()
    return Conditioning(embeds=pipe.text_encoder(ids[0], attention_mask=mask)[0])


def predict(pipe: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """The denoiser's output for latents (B, C, h, w) at one timestep, or one a row."""
    output: Tensor = pipe.unet(latents, timestep, encoder_hidden_states=conditioning.embeds, return_dict=False)[0]
    return output


def call_arguments(conditioning: Conditioning, prefix: str) -> dict[str, Tensor]:
    """Arguments of the stock pipeline that stand for a prompt; `prefix` is "" or "negative_"."""
    return {f"{prefix}prompt_embeds": conditioning.embeds}


def latent_size(pipe: Any) -> int:
    return int(pipe.unet.config.sample_size)
