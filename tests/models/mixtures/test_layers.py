# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from anabranch.errors import UsageError
from anabranch.models.mixtures.families import FAMILIES, tiny
from anabranch.models.mixtures.layers import OFF, mixture_layers, open_layers
from anabranch.testing.mixture_contract import contract

OPERATIONS = {"found", "read", "outputs", "off", "refill", "force", "slice", "permute", "save"}
SHARED = {"Qwen2-MoE", "Qwen3-Next", "DeepSeek-V2", "DeepSeek-V3", "GLM-4-MoE"}
FIRST_LAYER_DENSE = {"Qwen3-MoE", "DeepSeek-V2", "DeepSeek-V3", "GLM-4-MoE"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_operation_works_on_every_family_and_leaves_the_model_alone(family):
    model = tiny(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    outcomes = contract(model)
    assert set(outcomes) == OPERATIONS
    assert all(outcomes.values()), {name: outcome for name, outcome in outcomes.items() if not outcome}
    exact = OPERATIONS - {"outputs", "refill", "permute"}
    assert all(outcomes[name].difference == 0 for name in exact)
    assert all(outcome.difference <= 2.4e-6 for outcome in outcomes.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_by_structure(family):
    model = tiny(family)
    layers = open_layers(model)
    first = 1 if family in FIRST_LAYER_DENSE else 0
    assert [layer.name.split(".")[2] for layer in layers] == [
        str(i) for i in range(first, model.config.num_hidden_layers)
    ]
    for layer in layers:
        shape = (layer.num_experts, layer.top_k, layer.hidden_size, layer.expert_hidden_size)
        assert shape == (8, 2, 32, 16)
        assert (layer.shared_name is not None) == (family in SHARED)
        assert layer.num_groups == (2 if family in {"DeepSeek-V2", "DeepSeek-V3", "GLM-4-MoE"} else 1)
        assert model.get_submodule(layer.name) is layer.block


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_passes_and_is_scored_as_it_is(family, dtype):
    model = tiny(family, seed=1).to(dtype)
    h_TD = torch.randn(300, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    for layer in open_layers(model):
        with torch.no_grad():
            logits, weights, selected = layer.router(h_TD)
            again = layer.rescore(logits)
            off = torch.arange(8) == 3
            without = layer.rescore(logits, off)
        assert torch.equal(again.selected_experts, selected)
        assert torch.equal(again.routing_weights, weights)
        assert again.routing_weights.dtype == weights.dtype == without.routing_weights.dtype
        assert without.routing_weights.isfinite().all()
        assert (without.routing_weights[without.selected_experts == 3] == 0).all()


def test_scoring_in_the_precision_of_the_weights_would_lose_choices():
    """A router that scores in float32 inside a bfloat16 model: its logits don't survive the rounding."""
    layer = open_layers(tiny("DeepSeek-V3", seed=1).bfloat16())[0]
    h_TD = torch.randn(300, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        logits, weights, _ = layer.router(h_TD)
        rounded = layer.rescore(logits.bfloat16().float())
    assert not torch.equal(rounded.routing_weights, weights)


def test_scoring_follows_what_is_changed_later():
    model = tiny("Qwen3-MoE")
    layer = open_layers(model)[0]
    h_TD = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    layer.router.top_k = 3
    model.double()
    with torch.no_grad():
        logits, weights, selected = layer.router(h_TD.double())
        again = layer.rescore(logits)
    assert torch.equal(again.selected_experts, selected)
    assert torch.equal(again.routing_weights, weights)


def test_scoring_takes_no_hook_and_no_gradient_of_the_router():
    layer = open_layers(tiny("Mixtral"))[0]
    fired = []
    layer.router.register_forward_hook(lambda *a: fired.append(1))
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layer.rescore(logits).routing_weights[:, 0].sum().backward()
    assert not fired
    assert logits.grad.abs().sum() > 0
    assert layer.router.weight.grad is None


@pytest.mark.parametrize("family", ["Mixtral", "PhiMoE", "DeepSeek-V3", "GraniteMoe", "GptOss"])
def test_switched_off_weighs_nothing_even_where_too_few_are_left(family):
    layer = open_layers(tiny(family))[0]
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    for left in (0, 1):
        off = torch.arange(8) >= left
        triple = layer.rescore(logits, off)
        assert triple.routing_weights.isfinite().all()
        assert (triple.routing_weights[off[triple.selected_experts]] == 0).all()
        if left:
            assert (triple.routing_weights[triple.selected_experts == 0] > 0).all()
            assert (triple.selected_experts == 0).any(-1).all()
        assert (triple.router_logits[:, off] == OFF).all()


def test_training_mode_is_restored():
    model = tiny("PhiMoE").train()
    open_layers(model)
    assert model.training
    layer = open_layers(model)[0]
    state = torch.get_rng_state()
    layer.rescore(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())


# refusals


COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llama4():
    config = Llama4TextConfig(
        **COMMON, num_key_value_heads=2, num_local_experts=4, intermediate_size_mlp=16, head_dim=8, pad_token_id=0
    )
    return Llama4ForCausalLM(config)


def dbrx():
    ffn = {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16}
    config = DbrxConfig(
        d_model=16, n_heads=2, n_layers=2, max_seq_len=32, vocab_size=64, ffn_config=ffn,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
    )  # fmt: skip
    return DbrxForCausalLM(config)


def switch():
    config = SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_sparse_encoder_layers=1, num_decoder_layers=2,
        num_sparse_decoder_layers=1, num_heads=2, num_experts=4, expert_capacity=8,
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (llama4, r"feed_forward is outside the contract[\s\S]*a router that returns 2 values"),
        (dbrx, r"ffn is outside the contract[\s\S]*received: gate_up_proj missing"),
        (switch, r"mlp is outside the contract[\s\S]*received: 4 experts as modules of their own"),
        (
            lambda: LlamaForCausalLM(LlamaConfig(**COMMON, num_key_value_heads=2)),
            r"LlamaForCausalLM is no mixture of experts[\s\S]*none of its modules has experts",
        ),
    ],
    ids=["Llama4", "DBRX", "Switch", "dense"],
)
def test_what_is_outside_the_contract_is_refused_by_name(make, message):
    with pytest.raises(UsageError, match=message):
        open_layers(make().eval())


def with_router(change):
    """A model whose routers' answers moved, as a later transformers may do."""
    model = tiny("Mixtral")
    for layer in mixture_layers(model):
        former = type(layer.router)
        moved = type("MovedRouter", (former,), {"forward": lambda self, h, former=former: change(former, self, h)})
        layer.router.__class__ = moved
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda former, self, h: former.forward(self, h)[0], "a router that returns Tensor"),
        (lambda former, self, h: former.forward(self, h)[:2], "a router that returns 2 values"),
        (lambda former, self, h: former.forward(self, h)[::-1], "expected: .*\n *received: a router that returns"),
        (lambda former, self, h: tuple(former.forward(self, h)[i] for i in (1, 0, 2)), "a router that returns"),
        (lambda former, self, h: tuple(former.forward(self, h)[i] for i in (0, 2, 1)), "float32"),
    ],
    ids=["logits alone", "two", "reversed", "weights first", "indices before weights"],
)
def test_a_router_whose_answer_moved_is_refused(change, message):
    model = with_router(change)
    with pytest.raises(UsageError, match=message):
        open_layers(model)
    outcome = contract(model)["found"]
    assert not outcome
    assert "outside the contract" in outcome.why


def test_a_router_that_scores_something_else_than_its_logits_is_refused():
    def noisy(former, self, h):
        logits, weights, index = former.forward(self, h)
        return logits, weights * h.norm(dim=-1, keepdim=True), index

    with pytest.raises(UsageError, match="the scoring of its own logits differs"):
        open_layers(with_router(noisy))


def swap_storage(experts):
    """gate_up_proj as (up, gate), with an activation that knows."""

    def apply(self, gate_up):
        up, gate = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    experts.__class__ = type("Swapped", (type(experts),), {"_apply_gate": apply})


def swap_forward(experts):
    """The class's own sum takes the halves the other way round than its activation says."""

    def forward(self, hidden_states, index, weights):
        out = torch.zeros_like(hidden_states)
        for t in range(len(hidden_states)):
            for w, e in zip(weights[t], index[t], strict=True):
                up, gate = (self.gate_up_proj[e] @ hidden_states[t]).chunk(2)
                out[t] += w * (self.down_proj[e] @ (self.act_fn(gate) * up))
        return out

    experts.__class__ = type("Swapped", (type(experts),), {"forward": forward})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("swap", "message"), [(swap_storage, "as a factor of up"), (swap_forward, "the sum of its weighted experts")]
)
def test_experts_with_swapped_halves_are_refused(swap, message, dtype):
    model = tiny("Mixtral").to(dtype)
    for layer in mixture_layers(model):
        swap(layer.experts)
    with pytest.raises(UsageError, match=message):
        open_layers(model)


def test_a_block_that_hands_its_experts_something_else_is_refused():
    model = tiny("Mixtral")
    block = mixture_layers(model)[0].block
    forward = type(block).forward
    block.__class__ = type("Halved", (type(block),), {"forward": lambda self, h: forward(self, h / 2)})
    with pytest.raises(UsageError, match="what its block hands to the experts differs"):
        open_layers(model)


def test_experts_as_a_list_of_modules_are_refused():
    model = tiny("OLMoE")
    mixture_layers(model)[1].block.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))
    with pytest.raises(UsageError, match=r"layers.1.mlp is outside[\s\S]*8 experts as modules of their own"):
        open_layers(model)


def test_two_routers_are_not_guessed_at():
    model = tiny("OLMoE")
    mixture_layers(model)[0].block.router = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="one router, as gate or router"):
        open_layers(model)


def test_the_contract_names_the_operation_that_fails():
    """Experts that ignore their weights: switching off with weight 0 does nothing, and the sums are wrong."""
    model = tiny("Mixtral")
    for layer in mixture_layers(model):
        former = type(layer.experts).forward
        layer.experts.__class__ = type(
            "Weightless", (type(layer.experts),),
            {"forward": lambda self, h, i, w, former=former: former(self, h, i, torch.ones_like(w))},
        )  # fmt: skip
    outcomes = contract(model)
    assert not outcomes["found"]
    assert "the sum of its weighted experts differs" in outcomes["found"].why


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2-MoE", "DeepSeek-V3", "PhiMoE"])
def test_checkpoints_of_one_file_an_expert_load_and_pass(family, tmp_path):
    """The key layout of transformers 4: every expert's matrices under keys of their own."""
    from safetensors.torch import load_file, save_file

    model = tiny(family)
    named = ("w1", "w3", "w2") if family in {"Mixtral", "PhiMoE"} else ("gate_proj", "up_proj", "down_proj")
    block = "block_sparse_moe" if family in {"Mixtral", "PhiMoE"} else "mlp"
    tensors = {name: value for name, value in model.state_dict().items() if ".experts." not in name}
    for layer in mixture_layers(model):
        prefix = layer.name.replace(".mlp", f".{block}")
        for e in range(8):
            gate, up = layer.experts.gate_up_proj[e].detach().chunk(2)
            for key, value in zip(named, (gate, up, layer.experts.down_proj[e].detach()), strict=True):
                tensors[f"{prefix}.experts.{e}.{key}.weight"] = value.clone()
    tensors = {
        name.replace(".mlp.", f".{block}.").replace(".router.weight", ".gate.weight"): value.contiguous()
        for name, value in tensors.items()
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    open_layers(again)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(tensors)


def test_the_contract_names_a_later_operation_alone(monkeypatch):
    """A model that is saved in lower precision: all works but what goes through a file."""
    model = tiny("Mixtral")
    save = type(model).save_pretrained

    def coarse(self, folder):
        rounded = copy.deepcopy(self)
        for parameter in rounded.parameters():
            parameter.data.copy_(parameter.data.bfloat16())
        save(rounded, folder)

    monkeypatch.setattr(type(model), "save_pretrained", coarse)
    outcomes = contract(model)
    assert {name for name, outcome in outcomes.items() if not outcome} == {"slice", "save"}
    assert outcomes["save"].difference > 1
    assert "at most 0" in outcomes["save"].why
