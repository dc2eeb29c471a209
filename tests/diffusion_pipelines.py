"""Tiny pipelines of every family, built from configurations, with a real tokenizer."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from anabranch.models.diffusion.small import clip_tokenizer, small_pipeline

WORDS = ["a", "photo", "of", "dress", "bag", "coat", "mark", "ring", "top", "left"]
FAMILIES = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3")
CALL = {"stable_diffusion_3": {"max_sequence_length": 1}}
"""What the stock pipeline of a family has to be told besides."""


def text_encoder(tokenizer, width, projected):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=0,
        eos_token_id=2,  # as older checkpoints have it: the end of a text is then sought at its highest id
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def autoencoder():
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
    )


def unet(width, **more):
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=2,
        **more,
    )


def tiny(family, seed=0, max_length=16):
    """An untrained pipeline of 16 x 16 (28 x 28 for Stable Diffusion 3) pixels in evaluation mode."""
    torch.manual_seed(seed)
    if family == "stable_diffusion_3":
        pipe = small_pipeline(
            WORDS, max_length=max_length, width=32, depth=2, head_width=16, text_width=16, text_layers=2, seed=seed
        )
        randomised(pipe.transformer)
    else:
        first = clip_tokenizer(WORDS, max_length)
        scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        if family == "stable_diffusion":
            pipe = StableDiffusionPipeline(
                vae=autoencoder(),
                text_encoder=text_encoder(first, 16, projected=False),
                tokenizer=first,
                unet=unet(16),
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        else:
            pipe = StableDiffusionXLPipeline(
                vae=autoencoder(),
                text_encoder=text_encoder(first, 16, projected=False),
                tokenizer=first,
                text_encoder_2=text_encoder(first, 16, projected=True),
                tokenizer_2=clip_tokenizer(WORDS, max_length),
                unet=unet(
                    32, addition_embed_type="text_time", addition_time_embed_dim=4,
                    projection_class_embeddings_input_dim=6 * 4 + 16,
                ),
                scheduler=scheduler,
                add_watermarker=False,
            )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def randomised(network):
    """Layers that start at zero would hide what the test is about."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
