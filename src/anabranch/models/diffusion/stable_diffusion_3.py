# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3: a transformer with joint attention trained by flow matching; two CLIP encoders and maybe a T5.

Without the T5 encoder the stock pipeline puts `max_sequence_length` zero tokens in its place. A zero vector still takes
part in attention, so their number has to be the same in training and sampling: it is the length of tokenizer_3, at most
the stock default.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anabranch.models.diffusion.conditioning import Conditioning

PIPELINES = ("StableDiffusion3Pipeline",)
DENOISER = "transformer"
ENCODERS = (
    ("tokenizer", "text_encoder"),
    ("tokenizer_2", "text_encoder_2"),
    ("tokenizer_3", "text_encoder_3"),
)
TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LORA_KEYWORD = "transformer_lora_layers"
T5_LENGTH = 256
"""The stock pipeline's own default."""


def max_length(pipe: Any) -> int:
    """Tokens of a prompt in the CLIP encoders, begin and end among them."""
    return int(pipe.tokenizer_max_length)


def encode(pipe: Any, ids: list[Tensor], time_ids: Tensor | None = None) -> Conditioning:
    """Token ids (B, L), one tensor a text encoder, as what the denoiser sees."""
    outputs = [
        encoder(tokens, output_hidden_states=True)
        for encoder, tokens in zip((pipe.text_encoder, pipe.text_encoder_2), ids[:2], strict=True)
    ]
    clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    width = pipe.transformer.config.joint_attention_dim
    clip = F.pad(clip, (0, width - clip.shape[-1]))
    t5 = clip.new_zeros(len(clip), t5_length(pipe), width) if len(ids) < 3 else pipe.text_encoder_3(ids[2])[0]
    pooled = torch.cat([output[0] for output in outputs], dim=-1)
    return Conditioning(embeds=torch.cat([clip, t5], dim=-2), pooled=pooled)


def predict(pipe: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """The denoiser's output for latents (B, C, h, w) at one timestep, or one a row."""
    output: Tensor = pipe.transformer(
        hidden_states=latents,
        timestep=timestep.expand(len(latents)),
        encoder_hidden_states=conditioning.embeds,
        pooled_projections=conditioning.pooled,
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
    return int(pipe.transformer.config.sample_size)


def t5_length(pipe: Any) -> int:
    """Tokens of the T5 part, `max_sequence_length` of the stock pipeline."""
    tokenizer = getattr(pipe, "tokenizer_3", None)
    return T5_LENGTH if tokenizer is None else min(T5_LENGTH, int(tokenizer.model_max_length))
