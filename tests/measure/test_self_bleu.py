# SPDX-License-Identifier: Apache-2.0
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.measure.self_bleu import MOST_TEXTS, few, self_bleu


def slow_bleu(text, others):
    """From the definition, one text against the others."""
    product = 1.0
    for n in (1, 2, 3, 4):
        here = Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
        found = 0
        for gram, times in here.items():
            most = max(sum(tuple(o[i : i + n]) == gram for i in range(len(o) - n + 1)) for o in others)
            found += min(times, most)
        ones = 0 if n == 1 else 1
        product *= (found + ones) / (sum(here.values()) + ones)
    nearest = min((abs(len(other) - len(text)), len(other)) for other in others)[1]
    return min(1.0, math.exp(1 - nearest / len(text))) * product**0.25


def test_a_case_worked_out_by_hand():
    """Shares of n-grams found in the other text, add-one smoothed from n = 2; the shorter text pays e^(1 - 4/3)."""
    first = (1 / 2 * 1 / 2 * 1 / 3 * 1 / 2) ** 0.25
    second = (2 / 3 * 2 / 3 * 1 / 2 * 1) ** 0.25 * math.exp(-1 / 3)
    assert self_bleu(["a b c d", "A b x"]) == pytest.approx(100 * (first + second) / 2)


def test_the_same_is_100_and_nothing_shared_is_0():
    assert self_bleu(["one two three four five"] * 3) == pytest.approx(100)
    assert self_bleu(["one two three four", "five six seven eight"]) == 0
    assert self_bleu(["one"]) is self_bleu([]) is self_bleu(["one", " "]) is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), min_size=2, max_size=6))
def test_it_is_the_slow_loop(texts):
    slow = [slow_bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    assert self_bleu([" ".join(text) for text in texts]) == pytest.approx(100 * sum(slow) / len(slow))


def test_many_texts_are_thinned_evenly():
    chosen = few([str(i) for i in range(1000)])
    assert len(chosen) == MOST_TEXTS
    assert chosen[:3] == ["0", "5", "10"]
