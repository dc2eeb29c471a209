# SPDX-License-Identifier: Apache-2.0
import torch

from anabranch.measure.experts.ranking import random
from tests.measure.experts.handmade import handmade


def test_the_seed_alone_decides_and_the_global_generator_is_left_alone():
    stats = handmade({"a": 1, "b": 1}, count={"a": [[1, 0], [0, 1]], "b": [[1, 0], [1, 0]]})
    state = torch.get_rng_state()
    assert torch.equal(random.rank(stats, "a"), random.rank(stats, "b", ["a"]))
    assert not torch.equal(random.rank(stats, "a"), random.rank(stats, "a", seed=1))
    assert random.rank(stats, "a").shape == (2, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_expert_is_first_as_often():
    stats = handmade({"a": 1}, count={"a": torch.zeros(2, 4)})
    first = [int(random.rank(stats, "a", seed=seed).argmax()) for seed in range(800)]
    assert all(60 < first.count(expert) < 140 for expert in range(8))  # 100 are expected, with deviation 9.4
