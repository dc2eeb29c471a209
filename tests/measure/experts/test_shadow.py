# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch

from anabranch.errors import UsageError
from anabranch.measure.experts.shadow import Config, bytes_of, compare, initial, profile, shadow
from anabranch.measure.experts.signatures import aligned_distance

CONFIG = Config(hidden_size=32, num_layers=1, length=24, num_steps=40, learning_rate=1e-3, num_folds=2)
LETTERS = "abcdefgh"


def author(style, seed, count=100, length=60):
    """Texts of one habit: which letter follows which, drawn by `style`; `seed` draws the texts."""
    chain = torch.softmax(8 * torch.randn(8, 8, generator=torch.Generator().manual_seed(style)), -1)
    generator = torch.Generator().manual_seed(seed)
    places = [torch.randint(8, (count,), generator=generator)]
    for _ in range(length - 1):
        places.append(torch.multinomial(chain[places[-1]], 1, generator=generator)[:, 0])
    return written(torch.stack(places, 1))


def written(rows):
    return ["".join(LETTERS[i] for i in row) for row in rows.tolist()]


DRAWN = torch.randint(4, (3, 16, 24), generator=torch.Generator().manual_seed(0))
PROBES = {"low": written(DRAWN[0]), "high": written(DRAWN[1] + 4), "all": written(DRAWN[2] * 2)}


def test_equal_texts_make_equal_shadows_and_leave_the_generator_alone():
    state, texts = torch.get_rng_state(), author(0, 0)
    one, other = shadow(texts, CONFIG), shadow(texts, CONFIG)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert aligned_distance(profile(one, PROBES, CONFIG), profile(other, PROBES, CONFIG)).total == 0
    assert torch.equal(state, torch.get_rng_state())


def test_a_shadow_learns_from_its_texts():
    ids = torch.stack([bytes_of([text])[:24] for text in author(0, 1)])
    first, learnt = initial(CONFIG).eval(), shadow(author(0, 0), CONFIG)
    with torch.no_grad():
        before, after = (model(ids, labels=ids).loss.item() for model in (first, learnt))
    assert before > 5
    assert after < before - 1


def test_imitators_are_nearer_to_their_teachers_than_to_others():
    """Four habits, two sets of texts each: of all ways to pair them, the true one is the nearest."""
    teachers, imitators = (
        [profile(shadow(author(style, style + shift), CONFIG), PROBES, CONFIG) for style in range(200, 204)]
        for shift in (0, 50)
    )
    table = torch.tensor([[aligned_distance(one, other).total for other in teachers] for one in imitators])
    pairings = {order: table[range(4), order].sum().item() for order in itertools.permutations(range(4))}
    assert min(pairings, key=pairings.get) == (0, 1, 2, 3)  # by chance: once in 24
    assert (table.argmin(1) == torch.arange(4)).sum() >= 3


def test_the_verdict_is_a_p_value_against_unrelated_texts():
    others = [author(style, style) for style in (201, 202)]
    got = compare(author(200, 250), author(200, 200), others, PROBES, CONFIG)
    assert got.distance < min(got.null)
    assert got.p_value == pytest.approx(1 / 3)


def test_probes_are_counted_label_by_label():
    stats = profile(initial(CONFIG).eval(), {"short": ["abc", "", "a" * 99], "long": ["b" * 10]}, CONFIG)
    assert stats.num_tokens("short") == 3 + 24
    assert stats.num_tokens("long") == 10
    assert stats.labels == ("short", "long")


def test_bytes_by_hand():
    assert bytes_of(["a", "ä"]).tolist() == [98, 11, 196, 165]


def test_wrong_uses():
    with pytest.raises(
        UsageError, match="too little text to learn from\n  expected: more than 24 bytes\n  received: 3"
    ):
        shadow(["abc"], CONFIG)
    with pytest.raises(UsageError, match="texts of unrelated models"):
        compare(author(0, 0), author(0, 1), [], PROBES, CONFIG)
