# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anabranch.errors import UsageError
from anabranch.mixture import ExpertBank, ModuleBank
from anabranch.mixture.grouped import adjacent, neighbours
from anabranch.testing import check_bank


@pytest.fixture
def rows(small):
    return torch.randn(9, 2, small.width, generator=small.seeded(1))


def packed(bank):
    pairs = zip(bank.experts, bank.experts[1:], strict=False)
    return all(neighbours(a.fc1.weight, b.fc1.weight) and neighbours(a.fc2.weight, b.fc2.weight) for a, b in pairs)


@pytest.mark.parametrize("kind", ["separate", "stacked", "modules"])
@pytest.mark.parametrize("seed", range(3))
def test_contract(small, rows, kind, seed):
    def make():
        bank = small.bank(seed=seed)
        if kind == "modules":
            return ModuleBank(nn.Sequential(nn.LayerNorm(small.width), expert) for expert in bank.experts)
        return bank.stacked() if kind == "stacked" else bank

    check_bank(make, rows, seed=seed)


def test_copies_without_noise_are_the_template_and_noise_is_relative_to_each_weight(small):
    template = small.feed_forward()
    with torch.no_grad():
        template.fc2.bias.zero_()
    exact = ExpertBank.from_template(template, 3)
    for expert in range(3):
        assert all(torch.equal(exact.tensors(expert)[k], v) for k, v in template.named_parameters())
    big = nn.Sequential()
    big.fc1, big.activation_fn, big.fc2 = nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 300)
    noisy = ExpertBank.from_template(big, 2, noise=1e-2, generator=small.seeded())
    difference = noisy[0].fc1.weight - big.fc1.weight
    assert difference.std().item() == pytest.approx(1e-2 * big.fc1.weight.std().item(), rel=0.02)
    assert not torch.equal(noisy[0].fc1.weight, noisy[1].fc1.weight)
    assert torch.equal(
        ExpertBank.from_template(template, 1, noise=1, generator=small.seeded())[0].fc2.bias, torch.zeros(6)
    )


def test_storages_convert_bit_by_bit(small, rows):
    separate = small.bank()
    stacked = separate.stacked()
    back = stacked.separate(small.feed_forward())
    assert stacked.fc1_weight.shape == (4, 10, 6)
    for expert in range(4):
        for name, tensor in separate.tensors(expert).items():
            assert torch.equal(tensor, stacked.tensors(expert)[name])
            assert torch.equal(tensor, back.tensors(expert)[name])
        assert torch.equal(separate.run(expert, rows), stacked.run(expert, rows))


def test_views_write_through(small, rows):
    for bank in (small.bank(), small.bank().stacked()):
        before = bank.run(2, rows)
        with torch.no_grad():
            bank.tensors(2)["fc2.bias"].add_(1.0)
        assert torch.allclose(bank.run(2, rows), before + 1)
        assert torch.equal(bank.run(1, rows), small.bank().run(1, rows))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 100))
def test_taking_experts_copies_them_in_order(experts, seed):
    generator = torch.Generator().manual_seed(seed)
    expert = nn.Sequential()
    expert.fc1, expert.activation_fn, expert.fc2 = nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3)
    bank = ExpertBank.from_template(expert, 4, noise=1.0, generator=generator)
    taken = bank.take(experts)
    for new, old in enumerate(experts):
        assert torch.equal(taken[new].fc1.weight, bank[old].fc1.weight)
        assert taken[new].fc1.weight.data_ptr() != bank[old].fc1.weight.data_ptr()


def test_drop_keeps_the_rest_and_merge_is_the_weighted_sum(small):
    bank = small.bank()
    assert torch.equal(bank.drop([0, 2])[1].fc1.weight, bank[3].fc1.weight)
    weights = torch.tensor([[0.25, 0.75, 0, 0], [0, 0, -1.0, 2.0]])
    merged = bank.merge(weights)
    assert merged.num_experts == 2
    alone = bank.take([1])
    assert torch.allclose(alone.merge(torch.tensor([[0.5]]))[0].fc1.weight, 0.5 * bank[1].fc1.weight)
    assert torch.allclose(merged[0].fc1.weight, 0.25 * bank[0].fc1.weight + 0.75 * bank[1].fc1.weight)
    assert torch.allclose(merged[1].fc2.bias, 2 * bank[3].fc2.bias - bank[2].fc2.bias)
    with pytest.raises(UsageError, match=r"expected: \(M, 4\)(.|\n)*received: \(2, 3\)"):
        bank.merge(torch.ones(2, 3))
    with pytest.raises(UsageError, match=r"(?s)not a permutation.*expected: 0\.\.3"):
        bank.permute([0, 0, 1, 2])


def test_an_extracted_expert_is_a_module_of_its_own_and_folds_a_constant_gate(small, rows):
    bank = small.bank()
    dense = bank.extract(2)
    assert torch.equal(dense(rows), bank.run(2, rows))
    assert list(dense.state_dict()) == list(small.feed_forward().state_dict())
    assert dense.fc1.weight.untyped_storage().nbytes() == dense.fc1.weight.nbytes
    assert torch.allclose(bank.extract(2, scale=0.3)(rows), 0.3 * bank.run(2, rows), atol=1e-6)
    with torch.no_grad():
        dense.fc1.weight.zero_()
    assert bank[2].fc1.weight.abs().sum() > 0


def test_neighbours_in_memory_survive_moving_copying_and_loading(small, tmp_path):
    bank = small.bank()
    assert packed(bank)
    assert torch.equal(adjacent([e.fc1.weight for e in bank.experts])[2], bank[2].fc1.weight)
    assert packed(copy.deepcopy(bank))
    assert packed(bank.take([3, 1]))
    parameters = list(bank.parameters())
    assert packed(bank.double())
    assert all(a is b for a, b in zip(parameters, bank.parameters(), strict=True)), "an optimiser would lose them"
    bank.load_state_dict(small.bank(seed=5).state_dict())
    assert packed(bank)


def test_neighbours_are_saved_one_by_one(small, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    bank = small.bank()
    safetensors.save_file(bank.state_dict(), tmp_path / "bank.safetensors")
    loaded = safetensors.load_file(tmp_path / "bank.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in bank.state_dict().items())


def test_an_adapter_or_hook_inside_an_expert_is_respected(small, rows):
    def sorted_run(bank):
        return bank.run_sorted(rows, [0, 1], [4, 5])

    plain = sorted_run(small.bank())
    hooked = small.bank()
    hooked[1].fc2.register_forward_hook(lambda module, inputs, output: output + 1)
    assert torch.allclose(sorted_run(hooked)[4:], plain[4:] + 1)
    adapted = small.bank()
    adapted[0].fc1 = nn.Sequential(adapted[0].fc1, nn.Identity())
    adapted[0].fc1.append(nn.Dropout(1.0))
    assert not torch.allclose(sorted_run(adapted)[:4], plain[:4])
    assert torch.allclose(sorted_run(adapted)[4:], plain[4:])
    with torch.autocast("cpu", torch.bfloat16):
        assert sorted_run(small.bank()).dtype == torch.bfloat16


def test_freezing_is_by_expert(small):
    bank = small.bank()
    bank.freeze([1, 3])
    assert bank.frozen() == [1, 3]


def test_other_modules_are_refused_with_the_bank_that_takes_them(small):
    with pytest.raises(UsageError, match=r"fc1, activation_fn, fc2(.|\n)*ModuleBank"):
        ExpertBank([nn.Sequential(nn.Linear(2, 2))])
    with pytest.raises(ValueError, match="generator: expected one with noise > 0"):
        ModuleBank.from_template(nn.Linear(2, 2), 2, noise=0.1)
    with pytest.raises(ValueError, match="experts: expected at least one"):
        ModuleBank([])
    with pytest.raises(UsageError, match="nothing but hidden states"):
        small.bank().stacked().run(0, torch.ones(1, 6), head_mask=1)


def test_experts_of_different_widths_are_each_what_they_are_alone(small):
    """They cannot be neighbours in memory; a bank that packed them all the same would mix their weights up."""
    wide = small.feed_forward(1)
    wide.fc1, wide.fc2 = nn.Linear(small.width, 24), nn.Linear(24, small.width)
    experts = [small.feed_forward(0), wide]
    bank, x = ExpertBank(copy.deepcopy(experts)), torch.randn(7, small.width)
    expected = torch.cat([experts[1](x[:3]), experts[0](x[3:])])
    torch.testing.assert_close(bank.run_sorted(x, [1, 0], [3, 4]), expected)
    torch.testing.assert_close(
        bank.double().run_sorted(x.double(), [1, 0], [3, 4]), expected.double(), atol=1e-6, rtol=1e-5
    )


def test_noise_is_relative_and_leaves_single_numbers_alone(small):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.weight = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.randn(500) * 7)

    bank = ModuleBank.from_template(Scaled(), 2, noise=0.1, generator=small.seeded(3))
    for expert in bank.experts:
        assert expert.scale.item() == 2.0
    first, second = (expert.weight.detach() for expert in bank.experts)
    assert float((first - second).std()) == pytest.approx(0.1 * 7 * 2**0.5, rel=0.15)
