# SPDX-License-Identifier: Apache-2.0
"""Upcycling: a dense language model becomes a mixture whose experts all start as its feed-forward network.

Paper     : Sparse Upcycling (arXiv 2212.05055).
Equation  : E_e = MLP for every e;  y = sum_e g_e E_e(x), sum_e g_e = 1, so y = MLP(x) before any training
Shapes    : N experts of the dense width, K chosen per token; the router (N, D) is drawn anew.
Differs   : every layer becomes a mixture, and weights are normalised over the chosen experts, so that nothing is
            dropped and the mixture is the dense model at the start. Noise on the experts is an option, off by default.
Check     : the same logits as the dense model, saved and loaded again (tests/specialize/test_upcycling.py).
Exempt    : off (with one expert it is the dense model but for rounding: gate and up are one product in a mixture)
"""

from dataclasses import dataclass
from typing import Any

import torch

from anabranch.errors import UsageError
from anabranch.models.mixtures.bank import ExpertBank
from anabranch.models.mixtures.layers import open_layers
from anabranch.train.seeding import seeded

FAMILIES = {"llama": ("MixtralConfig", "MixtralForCausalLM")}
"""Dense model type to the mixture of the same attention."""
KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "pad_token_id",
    "bos_token_id", "eos_token_id", "rope_parameters", "attention_dropout",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    num_experts: int = 8
    top_k: int = 2
    noise: float = 0.0
    """Of the experts' weights, relative to their own spread: what lets them part sooner."""
    router_std: float = 0.02

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k: expected 1..num_experts ({self.num_experts}), received {self.top_k}")
        if not self.noise >= 0:
            raise ValueError(f"noise: expected at least 0, received {self.noise}")
        if not self.router_std >= 0:
            raise ValueError(f"router_std: expected at least 0, received {self.router_std}")


@torch.no_grad()
def upcycle(dense: Any, config: Config, generator: torch.Generator) -> Any:
    """A mixture of transformers in evaluation mode; the dense model is left as it is.

    Raises:
        UsageError: a family that has no mixture of the same attention, or weights that would be lost.
    """
    import transformers

    kind = str(dense.config.model_type)
    if kind not in FAMILIES:
        raise UsageError(
            f"a {kind} model can't be upcycled", expected=" or ".join(sorted(FAMILIES)), received=kind,
            hint="a mixture with the same attention is needed",
        )  # fmt: skip
    if any(getattr(dense.config, name, False) for name in ("attention_bias", "mlp_bias")):
        raise UsageError("biases would be lost: the mixture has none", expected="a model without biases", received=kind)
    values = {name: getattr(dense.config, name) for name in KEPT if getattr(dense.config, name, None) is not None}
    config_class, model_class = (getattr(transformers, name) for name in FAMILIES[kind])
    shape = config_class(**values, num_local_experts=config.num_experts, num_experts_per_tok=config.top_k)
    with seeded(0, torch.device("cpu")):  # transformers draws every tensor, all of which are written over
        mixture = model_class(shape).to(dense.dtype)
    own = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    lost = mixture.load_state_dict(own, strict=False).unexpected_keys
    assert not lost, f"tensors that the mixture has no place for: {lost}"
    for layer in open_layers(mixture):
        mlp = dense.get_submodule(layer.name)
        torch.nn.init.normal_(layer.router.weight, std=config.router_std, generator=generator)  # type: ignore[arg-type]
        for expert in ExpertBank(layer):
            for name, value in (("gate", mlp.gate_proj), ("up", mlp.up_proj), ("down", mlp.down_proj)):
                drawn = torch.randn(value.weight.shape, generator=generator).to(value.weight)
                getattr(expert, name).copy_(value.weight + config.noise * value.weight.std() * drawn)
    mixture.generation_config = dense.generation_config
    return mixture.eval()
