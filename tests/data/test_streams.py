# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.data.streams import ShuffledIndices, StratifiedIndices, epoch_order


@settings(deadline=None, max_examples=200)
@given(n=st.integers(1, 40), batch=st.integers(1, 100), seed=st.integers(0, 2**40), steps=st.integers(1, 12))
def test_batches_are_the_epochs_laid_end_to_end(n, batch, seed, steps):
    sampler = ShuffledIndices(n, batch, seed)
    epochs = [epoch_order(n, seed, e).tolist() for e in range(steps * batch // n + 1)]
    assert all(sorted(order) == list(range(n)) for order in epochs)
    endless = [item for order in epochs for item in order]
    assert [i for s in range(steps) for i in sampler.at(s).tolist()] == endless[: steps * batch]


def test_a_step_depends_on_seed_and_step_alone():
    forward = ShuffledIndices(1000, 64, seed=5)
    wanted = [forward.at(step) for step in range(40)]
    for step in (39, 0, 17, 3):
        assert torch.equal(ShuffledIndices(1000, 64, seed=5).at(step), wanted[step])
        assert torch.equal(forward.at(step), wanted[step])
    assert not torch.equal(ShuffledIndices(1000, 64, seed=6).at(0), wanted[0])
    assert not torch.equal(epoch_order(1000, 5, 0), epoch_order(1000, 5, 1))


def test_neither_the_caller_nor_the_global_generator_can_disturb_it():
    sampler = ShuffledIndices(10, 10, seed=0)
    wanted = sampler.at(0).clone()
    sampler.at(0).zero_()
    assert torch.equal(sampler.at(0), wanted)
    before = torch.random.get_rng_state()
    sampler.at(7)
    assert torch.equal(before, torch.random.get_rng_state())


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    each=st.integers(1, 6),
    steps=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_every_group_gives_its_share_in_order_and_all_its_items_in_turn(sizes, each, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.cat([torch.full((size,), g) for g, size in enumerate(sizes)])
    groups = groups[torch.randperm(len(groups), generator=generator)]
    sampler = StratifiedIndices(groups, each * len(sizes), seed)
    batches = torch.stack([sampler.at(step) for step in range(steps)])
    assert (groups[batches] == torch.arange(len(sizes)).repeat_interleave(each)).all()
    for group in range(len(sizes)):
        drawn = batches[:, group * each : (group + 1) * each].flatten()
        counts = torch.bincount(drawn, minlength=len(groups))[groups == group]
        assert counts.max() - counts.min() <= 1
        assert sampler.epochs(steps)[group] == pytest.approx(counts.double().mean().item())
    assert torch.equal(StratifiedIndices(groups, each * len(sizes), seed).at(steps - 1), batches[-1])


def test_groups_are_shuffled_independently():
    sampler = StratifiedIndices(torch.arange(2).repeat_interleave(50), 100, seed=0)
    first, second = sampler.at(0).split(50)
    assert not torch.equal(first, second - 50)


def test_epochs_counts_passes():
    assert ShuffledIndices(100, 25, 0).epochs(8) == 2.0


def test_wrong_sizes_say_what_was_expected():
    with pytest.raises(ValueError, match="expected a multiple of 3 groups, received 8"):
        StratifiedIndices(torch.tensor([0, 1, 2]), 8, 0)
    with pytest.raises(ValueError, match=r"every group 0\.\.2 to have items"):
        StratifiedIndices(torch.tensor([0, 2]), 2, 0)
    with pytest.raises(ValueError, match="at least 1"):
        ShuffledIndices(0, 4, 0)
