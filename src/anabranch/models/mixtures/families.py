# SPDX-License-Identifier: Apache-2.0
"""A tiny model of every family that the bridge is tested on, with drawn weights: what a contract is tried out on."""

from typing import Any

import torch

from anabranch.errors import UsageError, did_you_mean

COMMON = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
LATENT = {
    "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 16,
    "intermediate_size": 48, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
GROUPS = {"n_group": 2, "topk_group": 1}
QWEN = {"num_experts": 8, "moe_intermediate_size": 16, "intermediate_size": 48, "decoder_sparse_step": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("Mixtral", {"num_local_experts": 8, "intermediate_size": 16}),
    "Qwen2-MoE": ("Qwen2Moe", QWEN | {"shared_expert_intermediate_size": 24}),
    "Qwen3-MoE": ("Qwen3Moe", QWEN | {"head_dim": 8, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "Qwen3-Next": ("Qwen3Next", QWEN | {
        "head_dim": 8, "shared_expert_intermediate_size": 24, "num_hidden_layers": 4, "norm_topk_prob": True,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }),
    "OLMoE": ("Olmoe", {"num_experts": 8, "intermediate_size": 16}),
    "FlexOlmo": ("FlexOlmo", {"num_experts": 8, "intermediate_size": 16}),
    "DeepSeek-V2": ("DeepseekV2", LATENT | GROUPS | {"topk_method": "group_limited_greedy"}),
    "DeepSeek-V3": ("DeepseekV3", LATENT | GROUPS | {"norm_topk_prob": True}),
    "GLM-4-MoE": ("Glm4Moe", {
        "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 16, "intermediate_size": 48,
        "first_k_dense_replace": 1, "head_dim": 8, "n_group": 2, "topk_group": 1, "norm_topk_prob": True,
    }),
    "GptOss": ("GptOss", {"num_local_experts": 8, "intermediate_size": 16, "head_dim": 8}),
    "PhiMoE": ("Phimoe", {"num_local_experts": 8, "intermediate_size": 16}),
    "GraniteMoe": ("GraniteMoe", {"num_local_experts": 8, "intermediate_size": 16}),
}  # fmt: skip
"""Name to the prefix of transformers' classes and what its configuration says besides."""


def tiny(family: str, seed: int = 0, **changes: Any) -> Any:
    """A causal language model of the family in evaluation mode: 3 or 4 layers, 8 experts, 2 of them a token."""
    import transformers

    if family not in FAMILIES:
        raise UsageError(f"there is no family {family!r}", hint=did_you_mean(family, FAMILIES))
    prefix, values = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**(COMMON | values | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        for name, value in model.named_parameters():
            if value.ndim > 1:
                torch.nn.init.normal_(value, std=0.5 / value.shape[-1] ** 0.5 if "embed" not in name else 1.0)
        for name, value in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(value, std=0.05)
    return model.eval()
