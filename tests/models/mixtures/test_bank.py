# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch

from anabranch.errors import UsageError
from anabranch.models.mixtures.bank import ExpertBank, run_slots
from anabranch.models.mixtures.families import FAMILIES, tiny
from anabranch.models.mixtures.layers import mixture_layers


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_biases(model):
    """Biases are zero when drawn, and a bias of zero hides who it is added to."""
    for name, value in model.named_parameters():
        if name.endswith("_bias"):
            value.data.copy_(drawn(*value.shape, seed=len(name)))
    return model


def slow_expert(family, experts, e, x_D):
    """E_e(x) by the family's formula, from the storage itself, one number of the middle at a time."""
    M = 16
    middle = torch.zeros(M)
    for m in range(M):
        if family == "GptOss":
            gate = x_D @ experts.gate_up_proj[e, :, 2 * m] + experts.gate_up_proj_bias[e, 2 * m]
            up = x_D @ experts.gate_up_proj[e, :, 2 * m + 1] + experts.gate_up_proj_bias[e, 2 * m + 1]
            gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
            middle[m] = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
        else:
            gate, up = x_D @ experts.gate_up_proj[e, m], x_D @ experts.gate_up_proj[e, M + m]
            middle[m] = up * gate * torch.sigmoid(gate)
    if family == "GptOss":
        return middle @ experts.down_proj[e] + experts.down_proj_bias[e]
    return experts.down_proj[e] @ middle


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_computes_the_familys_formula(family):
    layer = mixture_layers(with_biases(tiny(family)))[0]
    bank, x_TD = ExpertBank(layer), drawn(3, 32)
    with torch.no_grad():
        for e in (0, 5):
            slow = torch.stack([slow_expert(family, layer.experts, e, x) for x in x_TD])
            assert torch.allclose(bank.run(e, x_TD), slow, atol=1e-5)
            assert torch.allclose(run_slots(layer, x_TD, torch.full((3, 1), e))[:, 0], slow, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_views_go_round_bit_by_bit_and_write_through(family):
    model = with_biases(tiny(family))
    layer, other = mixture_layers(model)[0], mixture_layers(copy.deepcopy(model))[0]
    bank, target = ExpertBank(layer), ExpertBank(other)
    shapes = {"gate": (16, 32), "up": (16, 32), "down": (32, 16)}
    biases = {"gate_bias": (16,), "up_bias": (16,), "down_bias": (32,)} if family == "GptOss" else {}
    for parameter in other.experts.parameters():
        parameter.data.fill_(float("nan"))
    for e in range(len(bank)):
        tensors = bank[e].tensors()
        assert {name: tuple(value.shape) for name, value in tensors.items()} == shapes | biases
        for name, value in tensors.items():
            target[e].tensors()[name].copy_(value)
    written = dict(other.experts.named_parameters())
    assert all(torch.equal(value, written[name]) for name, value in layer.experts.named_parameters())


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_writing_into_one_expert_touches_no_other(family):
    layer = mixture_layers(with_biases(tiny(family)))[0]
    bank = ExpertBank(layer)
    before = [{name: value.clone() for name, value in expert.tensors().items()} for expert in bank]
    bank[3].up.mul_(2)
    for e, tensors in enumerate(before):
        for name, value in tensors.items():
            expected = value * 2 if (e, name) == (3, "up") else value
            assert torch.equal(bank[e].tensors()[name], expected)


def test_one_can_go_through_a_bank():
    bank = ExpertBank(mixture_layers(tiny("Mixtral"))[0])
    assert len(list(bank)) == len(bank) == 8


def test_slots_come_in_the_order_of_the_selection():
    layer = mixture_layers(tiny("Qwen3-MoE"))[0]
    bank, x_TD = ExpertBank(layer), drawn(4, 32)
    selected_TK = torch.tensor([[0, 7], [7, 0], [3, 2], [2, 3]])
    slots_TKD = run_slots(layer, x_TD, selected_TK)
    for t in range(4):
        for k in range(2):
            alone = bank.run(int(selected_TK[t, k]), x_TD[t : t + 1])[0]
            assert torch.allclose(slots_TKD[t, k], alone, atol=1e-6)


@pytest.mark.parametrize("expert", [-1, 8])
def test_an_expert_that_there_is_not(expert):
    bank = ExpertBank(mixture_layers(tiny("Mixtral"))[0])
    message = rf"model.layers.0.mlp has no expert {expert}\n  expected: 0 to 7\n  received: {expert}"
    with pytest.raises(UsageError, match=message):
        bank[expert]
    with pytest.raises(UsageError, match=message):
        bank.run(expert, drawn(1, 32))
