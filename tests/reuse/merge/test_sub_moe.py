# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.models.mixtures.bank import ExpertBank
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import mixture_layers
from anabranch.reuse.merge.sub_moe import budgets, clusters, input_moments, left_basis, merge, merged, similarity
from anabranch.reuse.merge.tie import members, weighted_mean

MODEL = tiny("Mixtral")
LAYER = mixture_layers(MODEL)[0]
BATCHES = [{"input_ids": torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(1))}]
X = torch.randn(30, 32, generator=torch.Generator().manual_seed(2))
GROUP, USAGE = [1, 4, 6], torch.tensor([5.0, 2.0, 1.0])


def split(right_block_NI, num_rows, n):
    """(O, n I) to (n, O, I): columns of each expert together."""
    return right_block_NI.view(num_rows, n, -1).permute(1, 0, 2)


def scrambled(right_block_NI, num_rows, n):
    """The bug: read in the order of memory as if the experts came first."""
    return right_block_NI.reshape(n, num_rows, -1)


def by_the_paper(matrices, usage, rank, cut):
    """SVD of the concatenation, the right factors averaged by usage, the product; word for word."""
    shares = usage.double() / usage.sum()
    left, values, right = torch.linalg.svd(torch.cat([w.double() for w in matrices], 1), full_matrices=False)
    blocks = cut(right, len(right), len(matrices))
    mean = (shares[:, None, None] * blocks).sum(0)
    return left[:, :rank] @ (values[:rank, None] * mean[:rank])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), rank=st.integers(1, 5), n=st.integers(1, 4))
def test_the_projection_of_the_mean_is_the_paper_s_way_and_without_truncation_it_is_the_mean(seed, rank, n):
    g = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(5, 7, generator=g).double() for _ in range(n)]
    usage = torch.rand(n, generator=g) + 0.1
    mean = sum(f * w for f, w in zip((usage.double() / usage.sum()).tolist(), matrices, strict=True))
    basis = left_basis(matrices, rank)
    projected = basis @ basis.T @ mean
    torch.testing.assert_close(projected, by_the_paper(matrices, usage, rank, split), atol=1e-6, rtol=0)
    torch.testing.assert_close(basis @ basis.T @ projected, projected, atol=1e-10, rtol=0)
    torch.testing.assert_close(by_the_paper(matrices, usage, 5, split), mean, atol=1e-10, rtol=0)


def test_blocks_reshaped_without_permuting_are_another_thing():
    bank = ExpertBank(LAYER)
    matrices = [bank[e].down for e in GROUP]
    ours = merged(bank, GROUP, USAGE, 16)["down"]
    torch.testing.assert_close(ours, by_the_paper(matrices, USAGE, 16, split), atol=1e-8, rtol=0)
    assert float((ours - by_the_paper(matrices, USAGE, 16, scrambled)).abs().max()) > 1e-2


def test_full_rank_is_the_weighted_mean():
    bank = ExpertBank(LAYER)
    mean = weighted_mean(bank, GROUP, USAGE)
    for name, value in merged(bank, GROUP, USAGE, 32).items():
        assert torch.equal(value, mean[name])
    assert not torch.equal(merged(bank, GROUP, USAGE, 3)["gate"], mean["gate"])


def test_whitening_keeps_what_the_inputs_reach():
    """Inputs in one direction only: at rank 1 the whitened mean of like experts still answers it, the plain one not."""
    bank = ExpertBank(mixture_layers(tiny("Mixtral"))[0])
    direction = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
    for e in (0, 1):
        bank[e].gate.copy_(bank[0].gate)
    hidden = torch.linspace(-2, 2, 9)[:, None] * direction
    before = hidden @ bank[0].gate.T
    errors = [float((hidden @ merged(bank, [0, 1], torch.ones(2), 1, h)["gate"].T.float() - before).norm())
              for h in (hidden, None)]  # fmt: skip
    assert errors[0] < 1e-4 * float(before.norm())
    assert errors[1] > 0.1 * float(before.norm())


def test_similarity_is_the_mean_cosine_of_all_pairs():
    bank, cos = ExpertBank(LAYER), torch.nn.functional.cosine_similarity
    found = similarity(LAYER, X)
    for i in range(8):
        for j in range(8):
            by_loop = sum(float(cos(bank.run(i, x[None]), bank.run(j, x[None]))) for x in X) / len(X)
            assert float(found[i, j]) == pytest.approx(by_loop, abs=1e-5)


def test_distances_of_the_root_are_those_of_the_outputs():
    bank, s = ExpertBank(LAYER), similarity(LAYER, X)
    units = torch.stack([torch.nn.functional.normalize(bank.run(e, X), dim=-1).flatten() for e in range(8)])
    torch.testing.assert_close(torch.cdist(units, units).square() / len(X), (2 * (1 - s)).float(), atol=1e-4, rtol=0)
    labels, spread = clusters(s, 3)
    means = {label: units[group].mean(0) for label, group in members(labels).items()}
    by_hand = sum(float((units[e] - means[label]).square().sum()) for e, label in enumerate(labels)) / len(X)
    assert spread == pytest.approx(by_hand, rel=1e-3)


def planted(noise):
    """Experts 0 to 3 are near copies, 4 to 7 as well."""
    model, g = tiny("Mixtral"), torch.Generator().manual_seed(3)
    for layer in mixture_layers(model):
        bank = ExpertBank(layer)
        for e in range(8):
            for name, value in bank[e].tensors().items():
                source = bank[e - e % 4].tensors()[name].clone()
                value.copy_(source + noise * torch.randn(value.shape, generator=g))
    return model


def logits_of(model):
    with torch.no_grad():
        return model(**BATCHES[0], use_cache=False).logits


def test_planted_clusters_are_found_and_cost_little_and_the_checkpoint_is_a_stock_one(tmp_path):
    from transformers import AutoModelForCausalLM

    model, control = planted(0.002), tiny("Mixtral")
    loss = []
    for one in (model, control):
        before = logits_of(one)
        found = merge(one, BATCHES, 2)
        loss.append(float((logits_of(one) - before).abs().mean()))
        assert one is control or all(
            set(map(tuple, members(own).values())) == {(0, 1, 2, 3), (4, 5, 6, 7)} for own in found.labels.values()
        )
    assert loss[0] < 0.1 * loss[1]
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(reloaded), logits_of(model), atol=1e-6, rtol=0)


def test_as_many_clusters_as_experts_change_nothing():
    model = tiny("GptOss")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merge(model, BATCHES, 8, rank=2, whiten=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_protected_experts_stay_on_their_own():
    model = planted(0.002)
    name = mixture_layers(model)[1].name
    before = {n: value.clone() for n, value in ExpertBank(mixture_layers(model)[1])[2].tensors().items()}
    found = merge(model, BATCHES, 3, protect=[(name, 2)], rank=4, whiten=True)
    assert [2] in members(found.labels[name]).values()
    assert all(torch.equal(v, before[n]) for n, v in ExpertBank(mixture_layers(model)[1])[2].tensors().items())


def test_neighbours_share_their_budget_where_it_helps():
    pairs = torch.block_diag(*[torch.full((2, 2), 0.999)] * 4).double() + 0.001 * torch.eye(8)  # 4 clusters
    alike = torch.full((8, 8), 0.9999).double() + 0.0001 * torch.eye(8)  # 1 cluster
    # by hand, a pair costs 1 where it is merged with another and 0.001 on its own; 0.003 + 0.0007 is the least
    assert budgets([pairs, alike, pairs], [3, 3, 3]) == [5, 1, 3]
    assert budgets([alike, alike], [8, 8]) == [8, 8]


def test_moments_are_those_of_what_each_matrix_takes_in():
    bank = ExpertBank(LAYER)
    own, moments = bank[3], input_moments(bank, 3, X)
    inner = torch.nn.functional.silu(X @ own.gate.T) * (X @ own.up.T)
    torch.testing.assert_close(moments["up"].float(), sum(torch.outer(x, x) for x in X), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moments["down"].float(), sum(torch.outer(x, x) for x in inner), atol=1e-4, rtol=1e-4)


def test_wrong_uses_say_what_was_expected():
    with pytest.raises(UsageError, match="1 to 8"):
        merge(MODEL, BATCHES, 9)
    with pytest.raises(UsageError, match="rank >= 1"):
        merge(MODEL, BATCHES, 4, rank=0)
