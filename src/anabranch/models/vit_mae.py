# SPDX-License-Identifier: Apache-2.0
"""Bridge to the masked autoencoder of transformers: build, run masked and unmasked, hand back a plain ViT.

Paper     : He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377).
Equation  : L = sum over masked patches of mean((yhat - y)^2) / number of masked patches;
            norm_pix: y <- (y - mean(y)) / sqrt(var(y) + norm_pix_eps), per patch.
Shapes    : B images, C channels, S pixels a side, L patches, V visible ones, D width, P values a patch.
Differs   : the variance epsilon is an option (1e-6 in the paper's code; 1e-3 keeps flat patches of small images quiet).
            A model that transformers 5.x builds starts with positions of zero, frozen: neither encoder nor decoder can
            tell patches apart; `build` restores the sine-cosine tables (and the encoder's class token and projection).
Check     : `masked_loss` equals the loss of ViTMAEForPreTraining, `encode` the tokens of ViTModel
            (tests/models/test_vit_mae.py).
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError, did_you_mean
from anabranch.models.bridge import check_fit, load_stock, transformers


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The size of a masked autoencoder, without its image size."""

    hidden_size: int
    num_layers: int
    num_heads: int
    decoder_hidden_size: int
    decoder_num_layers: int
    decoder_num_heads: int
    mask_ratio: float
    norm_pix_eps: float
    grid: int | None
    """Patches a side; None fixes the patch at 16 pixels."""
    intermediate_size: int | None = None
    """Hidden units of the encoder's feed-forward networks; four times the width by default."""


PRESETS = {
    "tiny": Preset(
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        decoder_hidden_size=16,
        decoder_num_layers=1,
        decoder_num_heads=2,
        mask_ratio=0.6,
        norm_pix_eps=1e-3,
        grid=4,
    ),
    "narrow": Preset(  # starved feed-forward networks: sharing costs most where there is least to share
        hidden_size=32,
        num_layers=3,
        num_heads=2,
        intermediate_size=8,
        decoder_hidden_size=16,
        decoder_num_layers=1,
        decoder_num_heads=2,
        mask_ratio=0.6,
        norm_pix_eps=1e-3,
        grid=4,
    ),
    "small": Preset(
        hidden_size=192,
        num_layers=6,
        num_heads=3,
        decoder_hidden_size=96,
        decoder_num_layers=2,
        decoder_num_heads=3,
        mask_ratio=0.75,
        norm_pix_eps=1e-6,
        grid=8,
    ),
    "base": Preset(
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        decoder_hidden_size=512,
        decoder_num_layers=8,
        decoder_num_heads=16,
        mask_ratio=0.75,
        norm_pix_eps=1e-6,
        grid=None,
    ),
}
SHARED_CONFIG = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "qkv_bias"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps"),
    *("image_size", "patch_size", "num_channels"),
)
"""What a ViT configuration takes over from the autoencoder's."""
FEATURES = "mean of the patch tokens, unmasked"
MLP_RATIO = 4
BASE_PATCH = 16


class MaskedForward(NamedTuple):
    loss: Tensor  # ()
    tokens: Tensor  # (B, 1 + V, D) visible tokens after the final norm, class token first


def patch_size_for(preset: str, image_size: int) -> int:
    """The preset's patch at this image size: an equal grid for the small presets, 16 pixels for base."""
    if preset not in PRESETS:
        raise UsageError(f"there is no preset {preset!r}", hint=did_you_mean(preset, PRESETS))
    grid = PRESETS[preset].grid
    divisor = grid if grid is not None else BASE_PATCH
    if image_size % divisor:
        nearest = [max(image_size // divisor, 1) * divisor, (image_size // divisor + 1) * divisor]
        raise UsageError(
            f"preset {preset} cannot cut images of {image_size} pixels into whole patches",
            expected=f"an image size divisible by {divisor}",
            received=image_size,
            hint=f"--image-size {nearest[0]} or --image-size {nearest[1]}",
        )
    return image_size // grid if grid is not None else BASE_PATCH


def check_size(preset: str, image_size: int) -> None:
    """Raises where the preset cannot cut such images into whole patches."""
    patch_size_for(preset, image_size)


def depth_of(preset: str) -> int:
    """Blocks of the encoder."""
    if preset not in PRESETS:
        raise UsageError(f"there is no preset {preset!r}", hint=did_you_mean(preset, PRESETS))
    return PRESETS[preset].num_layers


def build(preset: str, *, image_size: int, channels: int, seed: int, mask_ratio: float | None = None) -> nn.Module:
    """A fresh ViTMAEForPreTraining, its initial weights a function of `seed` alone."""
    patch_size = patch_size_for(preset, image_size)
    size = PRESETS[preset]
    config = transformers().ViTMAEConfig(
        image_size=image_size,
        patch_size=patch_size,
        num_channels=channels,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=size.intermediate_size or MLP_RATIO * size.hidden_size,
        decoder_hidden_size=size.decoder_hidden_size,
        decoder_num_hidden_layers=size.decoder_num_layers,
        decoder_num_attention_heads=size.decoder_num_heads,
        decoder_intermediate_size=MLP_RATIO * size.decoder_hidden_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        mask_ratio=size.mask_ratio if mask_ratio is None else mask_ratio,
        norm_pix_loss=True,
    )
    config.norm_pix_eps = size.norm_pix_eps
    return fresh(config, seed)


def fresh(config: Any, seed: int) -> nn.Module:
    """A new model of this configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers().ViTMAEForPreTraining(config)
        _restore_embeddings(model)
    _restore_decoder_positions(model)
    num_visible(model)
    return model.eval()


def _restore_embeddings(model: nn.Module) -> None:
    """transformers 5 initialises the patch projection first and then takes the whole module for finished."""
    embeddings = model.vit.embeddings
    if embeddings.position_embeddings.abs().sum() == 0:
        for marked in (embeddings.patch_embeddings.projection, *embeddings.parameters()):
            marked._is_hf_initialized = False
        embeddings.initialize_weights()


def _restore_decoder_positions(model: nn.Module) -> None:
    decoder = model.decoder
    if decoder.decoder_pos_embed.abs().sum() == 0:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            mask_token = decoder.mask_token.clone()
            for parameter in (decoder.decoder_pos_embed, decoder.mask_token):
                parameter._is_hf_initialized = False  # else transformers skips what it has marked as initialised
            decoder.initialize_weights(decoder.decoder_pos_embed.shape[1] - 1)
            decoder.mask_token.copy_(mask_token)


def load(path: str | Path) -> nn.Module:
    """A masked autoencoder from a local transformers folder, with its decoder.

    Raises:
        UsageError: the folder is missing, holds another kind of model, or lacks tensors of its own configuration.
    """
    model = load_stock(
        path,
        "ViTMAEForPreTraining",
        model_type="vit_mae",
        expected="a masked autoencoder with its decoder",
        hint="give the checkpoint before it was customised, or leave --base out to train one",
    )
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table.requires_grad_(False)  # fixed when built, but from_pretrained forgets it
    return model.eval()


def num_patches(model: nn.Module) -> int:
    """L, of one image."""
    return int(model.vit.embeddings.position_embeddings.shape[1]) - 1


def num_visible(model: nn.Module) -> int:
    """V = floor(L (1 - mask_ratio)); at least one patch has to stay visible, and one has to be masked."""
    patches = num_patches(model)
    visible = int(patches * (1 - model.config.mask_ratio))
    if not 1 <= visible < patches:
        raise UsageError(
            f"a mask ratio of {model.config.mask_ratio} leaves {visible} of {patches} patches visible",
            expected="at least one visible and one masked patch",
            hint="a smaller patch or another mask ratio",
        )
    return visible


def check_images(model: nn.Module, *, image_size: int, channels: int, name: str) -> None:
    """Say at the door what a forward would only say later, and less clearly."""
    check_fit(name, image_size, channels, model.config.image_size, model.config.num_channels)


def normalise(pixels: Tensor, mean: float = 0.5, std: float = 0.5) -> Tensor:
    """uint8 (B, C, S, S) -> float32, (x / 255 - mean) / std: what the exported image processor does."""
    return (pixels.float() / 255 - mean) / std


def encode(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """All tokens of unmasked images, after the final norm: (B, 1 + L, D), class token first."""
    vit = model.vit if hasattr(model, "vit") else model
    hidden_BLD = vit.embeddings.patch_embeddings(pixel_values)
    return _through_layers(vit, hidden_BLD + vit.embeddings.position_embeddings[:, 1:])


def _through_layers(vit: nn.Module, patches_BLD: Tensor) -> Tensor:
    class_token = vit.embeddings.cls_token + vit.embeddings.position_embeddings[:, :1]
    hidden = torch.cat([class_token.expand(len(patches_BLD), -1, -1), patches_BLD], 1)
    for layer in vit.layers:
        hidden = layer(hidden)
    return vit.layernorm(hidden)


def masked_loss(model: nn.Module, pixel_values: Tensor, noise: Tensor) -> MaskedForward:
    """The autoencoder's training forward; `noise` (B, L) orders the patches, the smallest V stay visible.

    Raises:
        ValueError: noise that is not finite, which orders nothing.
    """
    if not bool(noise.isfinite().all()):
        raise ValueError("noise: expected finite numbers to order the patches by, received NaN or infinity")
    vit = model.vit
    hidden_BLD = vit.embeddings.patch_embeddings(pixel_values) + vit.embeddings.position_embeddings[:, 1:]
    order_BL = noise.argsort(1)
    visible = num_visible(model)
    keep_BV, hide_BM = order_BL[:, :visible], order_BL[:, visible:]
    kept_BVD = hidden_BLD.gather(1, keep_BV[..., None].expand(-1, -1, hidden_BLD.shape[-1]))
    tokens = _through_layers(vit, kept_BVD)
    predicted_BLP = model.decoder(tokens, order_BL.argsort(1)).logits
    index = hide_BM[..., None].expand(-1, -1, predicted_BLP.shape[-1])
    target_BMP = model.patchify(pixel_values).gather(1, index)
    if model.config.norm_pix_loss:
        target_BMP = norm_pix(target_BMP, getattr(model.config, "norm_pix_eps", 1e-6))
    return MaskedForward(loss=nn.functional.mse_loss(predicted_BLP.gather(1, index), target_BMP), tokens=tokens)


def norm_pix(patches: Tensor, eps: float) -> Tensor:
    """y <- (y - mean(y)) / sqrt(var(y) + eps), per patch."""
    centred = patches - patches.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(patches.shape[-1] - 1, 1)
    return centred / (variance + eps).sqrt()


def pooled(tokens: Tensor) -> Tensor:
    """Mean of the patch tokens, the class token left out: (B, 1 + L, D) -> (B, D)."""
    return tokens[:, 1:].float().mean(1)


def features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """(B, D): what probes and clusters see of unmasked images."""
    return pooled(encode(model, pixel_values))


def to_plain(model: nn.Module) -> nn.Module:
    """The encoder alone as a plain ViTModel (no pooling layer); every tensor is a copy."""
    source = model.config
    library = transformers()
    vit = library.ViTModel(
        library.ViTConfig(**{name: getattr(source, name) for name in SHARED_CONFIG}), add_pooling_layer=False
    )
    state = {name: tensor.clone() for name, tensor in model.vit.state_dict().items()}
    # MAE adds a position to the class token too (a row of zeros as built); ViTModel does the same, so keys agree
    vit.load_state_dict(state, strict=True)
    return vit.eval()


def image_processor(image_size: int, channels: int, mean: float = 0.5, std: float = 0.5) -> dict[str, object]:
    """preprocessor_config.json for the model: what training did to an image.

    Shorter side to the size (bicubic), centre crop, rescale to [0, 1], normalise.
    """
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [mean] * channels,
        "image_std": [std] * channels,
        **({"do_convert_rgb": True} if channels == 3 else {"do_convert_rgb": False}),
    }


def macs(model: nn.Module) -> int:
    """Multiply-accumulates of one unmasked image through the encoder (matrix products and attention)."""
    config = model.config
    patches = (config.image_size // config.patch_size) ** 2
    tokens, width, hidden = patches + 1, config.hidden_size, config.intermediate_size
    embed = patches * config.patch_size**2 * config.num_channels * width
    layer = tokens * (4 * width * width + 2 * width * hidden) + 2 * tokens * tokens * width
    return embed + config.num_hidden_layers * layer


def copy_of(model: nn.Module) -> nn.Module:
    """An independent copy, in eval mode."""
    return copy.deepcopy(model).eval()
