# SPDX-License-Identifier: Apache-2.0
"""An upcycled model is the dense one until it is trained, and a stock checkpoint."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from anabranch.errors import UsageError
from anabranch.models.mixtures.bank import ExpertBank
from anabranch.models.mixtures.layers import open_layers
from anabranch.specialize.upcycling import Config, upcycle

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))


def dense(**changes):
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, rope_theta=5000.0, rms_norm_eps=1e-5,
        **changes,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for value in model.parameters():
            if value.ndim > 1:
                torch.nn.init.normal_(value, std=0.1)
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_mixture_is_the_dense_model_and_transformers_opens_it(tmp_path, generator, tied):
    model = dense(tie_word_embeddings=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mixture = upcycle(model, Config(num_experts=4, top_k=2), generator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(mixture(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    mixture.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, mixture(IDS).logits)
    routed = [layer.router(torch.randn(50, 32, generator=generator))[2] for layer in open_layers(mixture)]
    assert all(len(chosen.unique()) == 4 for chosen in routed), "every expert should be reached"


@torch.no_grad()
def test_noise_parts_the_experts_by_the_share_that_was_asked_for(generator):
    model = dense()
    mixture = upcycle(model, Config(num_experts=4, noise=0.1), generator)
    layer = open_layers(mixture)[0]
    weight = model.model.layers[0].mlp.up_proj.weight
    for expert in ExpertBank(layer):
        assert float((expert.up - weight).std() / weight.std()) == pytest.approx(0.1, rel=0.15)
    assert not torch.equal(mixture(IDS).logits, model(IDS).logits)


def test_what_has_no_mixture_of_its_kind_is_refused(generator):
    other = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UsageError, match="a gpt2 model can't be upcycled"):
        upcycle(other, Config(), generator)
    with pytest.raises(UsageError, match="biases would be lost"):
        upcycle(dense(mlp_bias=True), Config(), generator)
    with pytest.raises(ValueError, match=r"top_k: expected 1..num_experts \(2\), received 3"):
        Config(num_experts=2, top_k=3)
