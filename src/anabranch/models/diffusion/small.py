# SPDX-License-Identifier: Apache-2.0
"""A small text-to-image model of the Stable Diffusion 3 layout, for pictures of a few dozen pixels.

Every part is a stock class of transformers or diffusers, so that `pipe.save_pretrained` writes a folder which the stock
pipeline opens. The autoencoder is an identity: pictures this small need none, and the pipeline wants one.

Differs   : two CLIP encoders of one or two layers share a tokenizer of few words; there is no T5 encoder.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789-_"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
LATENT_RANGE = 0.1
"""Half-width of the identity's raw latents: the decoder's soft clamp is linear to 4e-4 of the range there."""
OVERSHOOT = 8.0
"""How far outside black to white, in units of that distance, latents stay on the linear side of the decoder's ReLU."""


def clip_tokenizer(words: Sequence[str], max_length: int) -> Any:
    """A byte-pair tokenizer of CLIP's kind in which each of the words is one token and others are spelt out."""
    from transformers import CLIPTokenizer

    vocabulary = [letter + end for end in ("", "</w>") for letter in LETTERS]
    merges = []
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        whole = pieces[0]
        for piece in pieces[1:]:
            merges.append((whole, piece))
            whole += piece
            vocabulary.append(whole)
    tokens = [*dict.fromkeys(vocabulary), BEGIN, END]
    merges = list(dict.fromkeys(merges))
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=merges, model_max_length=max_length
    )


def clip_encoder(tokenizer: Any, width: int, layers: int) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 16),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def pixel_autoencoder(channels: int) -> nn.Module:
    """A stock AutoencoderTiny whose latents are the pixels themselves, in [-1, 1] after its scaling factor."""
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(
        in_channels=channels,
        out_channels=channels,
        latent_channels=channels,
        encoder_block_out_channels=(channels,),
        decoder_block_out_channels=(channels,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        scaling_factor=1 / LATENT_RANGE,
    )
    enter, leave = vae.encoder.layers[0], vae.encoder.layers[-1]
    into, out = vae.decoder.layers[0], vae.decoder.layers[-1]
    with torch.no_grad():
        for layer in (enter, leave, into, out):
            layer.weight.zero_()
            layer.weight[:, :, 1, 1] = torch.eye(channels)
            layer.bias.zero_()
        leave.weight.mul_(2 * LATENT_RANGE)  # the encoder is given pictures in [0, 1]
        leave.bias.fill_(-LATENT_RANGE)
        into.weight.div_(2 * LATENT_RANGE)
        into.bias.fill_(0.5 + OVERSHOOT)
        out.bias.fill_(-OVERSHOOT)
    return vae


def small_pipeline(
    words: Sequence[str],
    *,
    image_size: int = 28,
    channels: int = 1,
    max_length: int = 16,
    width: int = 96,
    depth: int = 4,
    head_width: int = 32,
    patch_size: int = 4,
    text_width: int = 48,
    text_layers: int = 2,
    seed: int = 0,
) -> Any:
    """An untrained StableDiffusion3Pipeline; about 1.3 million weights with these sizes."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer, nothing = clip_tokenizer(words, max_length), clip_tokenizer(words, 1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoders = [clip_encoder(tokenizer, text_width, text_layers) for _ in range(2)]
        transformer = SD3Transformer2DModel(
            sample_size=image_size,
            patch_size=patch_size,
            in_channels=channels,
            out_channels=channels,
            num_layers=depth,
            attention_head_dim=head_width,
            num_attention_heads=width // head_width,
            joint_attention_dim=2 * text_width,
            caption_projection_dim=width,
            pooled_projection_dim=2 * text_width,
            pos_embed_max_size=image_size // patch_size,
            qk_norm="rms_norm",
        )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=pixel_autoencoder(channels),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=clip_tokenizer(words, max_length),
        text_encoder_3=None,
        tokenizer_3=nothing,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
