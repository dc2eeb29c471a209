# SPDX-License-Identifier: Apache-2.0
"""TokenMoE: experts chosen token by token, the control that MoCE is compared with.

Paper     : Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts" (arXiv 2106.05974), in a masked
            autoencoder as in Liu et al. 2023 (arXiv 2402.05382).
Equation  : p(h) = softmax(W_g h + n),  n ~ N(0, 1/E^2) in training;  MoE(h) = w_e E_e(h),  e = argmax p(h);
            L = L_mae + aux_loss_coef mean_l CV^2(importance_l),  importance = sum over tokens of p.
Shapes    : B images of N tokens, E experts, L routed layers.
Differs   : w = p / stopgrad(p) by default, as in MoCE, so that both start at the trained model's function.
Check     : routes tokens, not images; E = 1 is the dense model (tests/specialize/test_token_moe.py).
"""

import torch
from torch import Tensor, nn

from anabranch.mixture.context import Context, route
from anabranch.mixture.experts import ExpertBank
from anabranch.mixture.layer import Mixture
from anabranch.mixture.routing import GateNoise, LinearScore, Router
from anabranch.models.vit_mae import masked_loss, normalise
from anabranch.specialize.mae import step_generator
from anabranch.specialize.moce import GATE_SCALES, Config, expert_modules, routing_terms


def insert(model: nn.Module, config: Config, generator: torch.Generator) -> nn.Module:
    """Turn feed-forward networks of a masked autoencoder into token-routed mixtures, in place."""
    if config.expert_scope != "ffn":
        raise ValueError(f"expert_scope: expected ffn (tokens share their blocks), received {config.expert_scope}")
    for name in expert_modules(model, config):
        module = model.get_submodule(name)
        bank = ExpertBank.from_template(module, config.num_experts, noise=config.init_noise, generator=generator)
        score = LinearScore(module.fc1.in_features, config.num_experts, generator=generator)
        weigh = GATE_SCALES[config.gate_scale]
        router = Router(score, adjust=[GateNoise(config.noise_std)], weigh=weigh, temperature=config.temperature)
        model.set_submodule(name, Mixture(router, bank).train(module.training))
    return model


class TokenRouted(nn.Module):
    """Objective: batch of `MaskedImages` -> loss and its parts. `batch_size` is that of the global batch."""

    def __init__(self, model: nn.Module, config: Config, *, seed: int, batch_size: int):
        super().__init__()
        self.model, self.config, self.seed, self.batch_size = model, config, seed, batch_size

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        generator = step_generator(self.seed, int(batch["step"][0]))
        with route(self.model, Context(generator=generator, rows=batch["row"], batch=self.batch_size)):
            masked = masked_loss(self.model, normalise(batch["pixels"]), batch["noise"])
        terms = {"masked": masked.loss, **routing_terms(self.model, self.config)}
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}
