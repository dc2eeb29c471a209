# SPDX-License-Identifier: Apache-2.0
"""Trained rows of an embedding: the same as PEFT's in values and gradients."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from anabranch.mixture.token_rows import light_token_rows

TOKENS = torch.tensor([[36, 1, 2, 38], [5, 36, 36, 7]])


def adapted(tied, bias=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    rows = [36, 38] if tied else {"embed_tokens": [36, 38], "lm_head": [38, 36]}
    base = LlamaForCausalLM(config)
    if bias:
        base.lm_head = torch.nn.Linear(16, 40)
    model = get_peft_model(base, LoraConfig(r=2, trainable_token_indices=rows))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tokens_delta" in name or "lora_B" in name:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


def values(model):
    model.zero_grad()
    loss = model(TOKENS, labels=TOKENS)
    loss.loss.backward()
    return loss.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
def test_values_and_gradients_are_those_of_peft(tied):
    model = adapted(tied)
    expected, gradients = values(copy.deepcopy(model))
    names = light_token_rows(model)
    assert len(names) == 2
    assert light_token_rows(model) == names
    received, ours = values(model)
    torch.testing.assert_close(received, expected)
    assert ours.keys() == gradients.keys()
    torch.testing.assert_close(ours, gradients)
    assert any("tokens_delta" in name for name in ours)


@pytest.mark.parametrize("tied", [True, False])
def test_switched_off_and_merged_it_is_peft_s_own(tied):
    model = adapted(tied)
    with model.disable_adapter():
        plain = model(TOKENS).logits
    light_token_rows(model)
    on = model(TOKENS).logits
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, plain)
    assert not torch.allclose(on, plain)
    torch.testing.assert_close(model(TOKENS).logits, on)
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, on, atol=1e-5, rtol=1e-5)


def test_peft_s_forward_with_its_copy_of_the_table_is_not_run(monkeypatch):
    model = adapted(tied=False)
    expected = model(TOKENS).logits
    light_token_rows(model)
    kinds = {module.kind for module in model.modules() if hasattr(module, "trainable_tokens_delta")}
    for kind in kinds:
        monkeypatch.setattr(kind, "forward_adapters", None)
    assert kinds
    torch.testing.assert_close(model(TOKENS).logits, expected)


def test_a_head_with_a_bias_is_left_to_peft():
    model = adapted(tied=False, bias=True)
    expected, gradients = values(copy.deepcopy(model))
    light_token_rows(model)
    received, ours = values(model)
    torch.testing.assert_close(received, expected)
    torch.testing.assert_close(ours, gradients)


def test_a_model_without_trained_rows_is_left_alone():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    assert light_token_rows(model) == []
