# SPDX-License-Identifier: Apache-2.0
"""MoCE: experts chosen by the cluster an image belongs to, so that each learns from images of one kind.

Paper     : Liu et al., ICLR 2023, "Task-customized Masked AutoEncoder via Mixture of Cluster-conditional Experts"
            (arXiv 2402.05382). Not the language model of arXiv 2509.10513 that shares the abbreviation.
Equation  : p(x) = softmax((W_g C_c(x) + n) / tau),  n ~ N(0, 1/E^2) in training;
            MoCE(h_i) = w_e(x) E_e(h_i) for all tokens h_i of image x,  e = argmax p(x);
            L = L_mae + aux_loss_coef mean_l CV^2(load_l) + entropy_coef mean_l H(p_l)
                + distill_coef (1 - cos(z, z_base)),  z = mean of the visible tokens.
Shapes    : K clusters with centroids (K, d), E experts, L routed layers, B images.
Differs   : w = p / stopgrad(p) by default: a warm start keeps its function, and the gate still gets a gradient.
            The gate starts at balanced groups of centroids and its load is balanced as it falls (hard); with
            assignment "fixed" the groups are the experts. Scopes beyond the FFN are ours: where sources conflict,
            experts need a decoder of their own to gain what separate models gain.
Check     : E = 1 is the dense model, extraction is routing (tests/specialize/test_moce.py).
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from anabranch.mixture.context import Context, route
from anabranch.mixture.experts import ExpertBank, ModuleBank
from anabranch.mixture.layer import Mixture, mixtures, routings
from anabranch.mixture.losses import entropy, hard_load_importance, importance_loss
from anabranch.mixture.routing import FixedTable, GateNoise, Router, TableScore, prob, renormalised, straight_through
from anabranch.models.vit_mae import masked_loss, normalise
from anabranch.specialize.mae import step_generator

GATE_SCALES = {"straight_through": straight_through, "prob": prob, "renormalised": renormalised}


@dataclass(frozen=True, kw_only=True)
class Config:
    num_experts: int = 8
    assignment: Literal["gate", "fixed"] = "gate"
    expert_scope: Literal["ffn", "blocks", "encoder", "autoencoder"] = "ffn"
    """What every expert is a copy of; "autoencoder" is the encoder and the decoder that is thrown away later."""
    expert_layers: tuple[int, ...] | None = None
    """Blocks that get experts; None takes all of a model up to 4 deep, else the last two odd ones."""
    gate_scale: Literal["straight_through", "prob", "renormalised"] = "straight_through"
    temperature: float = 1.0
    noise_std: float | None = None
    """None: 1 / num_experts."""
    init_noise: float = 1e-2
    """Experts start as copies plus noise of this share of each weight's standard deviation."""
    aux_loss_coef: float = 0.01
    balance: Literal["hard", "soft"] = "hard"
    entropy_coef: float = 0.0
    distill_coef: float = 0.0
    cluster_embedding: Literal["centroid", "learned"] = "centroid"

    def __post_init__(self):
        if self.num_experts < 1:
            raise ValueError(f"num_experts: expected at least 1, received {self.num_experts}")
        if self.gate_scale not in GATE_SCALES:
            raise ValueError(f"gate_scale: expected one of {', '.join(GATE_SCALES)}, received {self.gate_scale}")
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected above 0, received {self.temperature}")


def check_layers(config: Config, depth: int) -> None:
    if wrong := [i for i in config.expert_layers or () if not 0 <= i < depth]:
        raise ValueError(f"expert_layers: expected blocks 0..{depth - 1}, received {wrong[0]}")


def expert_modules(model: nn.Module, config: Config) -> list[str]:
    """Names of the modules that become mixtures, in the order in which the forward meets them."""
    depth = len(model.vit.layers)
    layers = config.expert_layers
    if layers is None:
        layers = tuple(range(depth)) if depth <= 4 else tuple(range(depth))[1::2][-2:]
    check_layers(config, depth)
    if config.expert_scope == "ffn":
        return [f"vit.layers.{i}.mlp" for i in layers]
    if config.expert_scope == "blocks":
        return [f"vit.layers.{i}" for i in layers]
    encoder = ["vit.embeddings.patch_embeddings", *(f"vit.layers.{i}" for i in range(depth)), "vit.layernorm"]
    return encoder if config.expert_scope == "encoder" else [*encoder, *decoder_modules(model)]


def decoder_modules(model: nn.Module) -> list[str]:
    """What the decoder computes with, but for its mask token, which all experts share."""
    layers = (f"decoder.decoder_layers.{i}" for i in range(len(model.decoder.decoder_layers)))
    return ["decoder.decoder_embed", *layers, "decoder.decoder_norm", "decoder.decoder_pred"]


def cluster_router(centroids: Tensor, groups: Tensor, config: Config, generator: torch.Generator) -> Router:
    """A gate that sees the centroid of the image's cluster, or the fixed groups themselves."""
    if config.assignment == "fixed":
        return Router(FixedTable(groups, config.num_experts))
    score = TableScore(centroids, config.num_experts, generator=generator, cluster_embedding=config.cluster_embedding)
    with torch.no_grad():  # rows of W_g point at balanced groups of clusters, so that no expert starts without images
        members = nn.functional.one_hot(groups, config.num_experts).T.float()
        score.gate.weight.copy_(nn.functional.normalize(members @ centroids.float(), dim=1))
    noise = GateNoise(config.noise_std)
    return Router(score, adjust=[noise], weigh=GATE_SCALES[config.gate_scale], temperature=config.temperature)


def insert(
    model: nn.Module, centroids: Tensor, groups: Tensor, config: Config, generator: torch.Generator
) -> nn.Module:
    """Turn modules of a masked autoencoder into mixtures, in place; every expert starts as a copy of what was there.

    Args:
        centroids: (K, d) of the clusters. groups: (K,) a balanced group of each, 0 to num_experts - 1.
    """
    for name in expert_modules(model, config):
        module = model.get_submodule(name)
        bank_type = ExpertBank if config.expert_scope == "ffn" else ModuleBank
        bank = bank_type.from_template(module, config.num_experts, noise=config.init_noise, generator=generator)
        mixture = Mixture(cluster_router(centroids, groups, config, generator), bank)
        model.set_submodule(name, mixture.train(module.training))
    return model


def routes(model: nn.Module) -> Tensor:
    """R (L, K): the expert of every cluster in every routed layer, without noise."""
    return torch.stack([layer.router.table() for layer in mixtures(model).values()])


class ClusterConditional(nn.Module):
    """Objective: batch with `cluster` ids -> loss and its parts. `batch_size` is that of the global batch."""

    def __init__(self, model: nn.Module, config: Config, *, seed: int, batch_size: int, base: nn.Module | None = None):
        super().__init__()
        if config.distill_coef and base is None:
            raise ValueError("base: expected the frozen base model for distill_coef > 0, received None")
        self.model, self.config, self.seed, self.batch_size = model, config, seed, batch_size
        self._base = (copy.deepcopy(base).requires_grad_(False).eval(),) if config.distill_coef else ()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        config, pixel_values = self.config, normalise(batch["pixels"])
        context = Context(
            ids={"cluster": batch["cluster"]},
            generator=step_generator(self.seed, int(batch["step"][0])),
            rows=batch["row"],
            batch=self.batch_size,
        )
        with route(self.model, context):
            masked = masked_loss(self.model, pixel_values, batch["noise"])
        terms = {"masked": masked.loss, **routing_terms(self.model, config)}
        if config.distill_coef:
            base = masked_loss(self._base[0].to(pixel_values.device), pixel_values, batch["noise"])
            terms["distill"] = config.distill_coef * distillation(masked.tokens, base.tokens)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}


def routing_terms(model: nn.Module, config: Config) -> dict[str, Tensor]:
    """aux_loss_coef mean_l CV^2(load_l) and entropy_coef mean_l H(p_l), as they enter the loss."""
    decided = list(routings(model).values())
    if config.assignment == "fixed" or config.num_experts == 1:
        return {}
    imbalance = hard_load_importance if config.balance == "hard" else importance_loss
    terms = {"balance": config.aux_loss_coef * torch.stack([imbalance(r, scope="global") for r in decided]).mean()}
    if config.entropy_coef:
        terms["entropy"] = config.entropy_coef * torch.stack([entropy(r) for r in decided]).mean()
    return terms


def distillation(tokens: Tensor, base_tokens: Tensor) -> Tensor:
    """1 - cos(z, z_base), mean over images; z = mean of the visible tokens."""
    return 1 - nn.functional.cosine_similarity(tokens[:, 1:].mean(1), base_tokens[:, 1:].mean(1)).mean()
