# SPDX-License-Identifier: Apache-2.0
"""Self-BLEU: how much texts that one model wrote repeat each other; lower is more diverse.

Paper     : Zhu et al. 2018, Texygen (arXiv 1802.01886); BLEU of Papineni et al. 2002; smoothing of Lin and Och 2004.
Equation  : 100 / N * sum_i BLEU(text i, the other texts),  BLEU = min(1, exp(1 - r / c)) * (p_1 p_2 p_3 p_4)^(1/4);
            p_n = (n-grams found in another text + 1) / (n-grams + 1), without the ones at n = 1
Shapes    : N texts; c words of a text, r those of the other text whose length is nearest to it (the shorter of two).
Differs   : at most 200 texts, spread evenly over those given; words and marks are tokens, letter case is ignored.
Check     : a case worked out by hand, and slow loops over the definition (tests/measure/test_self_bleu.py).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

MOST_TEXTS = 200
LONGEST = 4
"""Words of an n-gram."""
WORD = re.compile(r"\w+|[^\w\s]")


def self_bleu(texts: Sequence[str]) -> float | None:
    """0 (nothing shared) to 100 (all the same); None for fewer than two texts with words in them."""
    words = [found for text in few(texts) if (found := WORD.findall(text.lower()))]
    if len(words) < 2:
        return None
    grams = [[ngrams(text, n) for text in words] for n in range(1, LONGEST + 1)]
    best = [most_elsewhere(counts) for counts in grams]
    lengths = [len(text) for text in words]
    scores = [
        brevity(lengths, i) * math.prod(precision(grams[n][i], best[n], n + 1) for n in range(LONGEST)) ** (1 / LONGEST)
        for i in range(len(words))
    ]
    return 100 * sum(scores) / len(scores)


def few(texts: Sequence[str]) -> list[str]:
    count = min(len(texts), MOST_TEXTS)
    return [texts[i * len(texts) // count] for i in range(count)]


def ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def most_elsewhere(counts: Sequence[Counter[tuple[str, ...]]]) -> dict[tuple[str, ...], tuple[int, int]]:
    """By n-gram its two largest counts in one text; the second is the most elsewhere for the text with the first."""
    best: dict[tuple[str, ...], tuple[int, int]] = {}
    for count in counts:
        for gram, times in count.items():
            first, second = best.get(gram, (0, 0))
            best[gram] = (times, first) if times > first else (first, max(second, times))
    return best


def precision(grams: Counter[tuple[str, ...]], best: dict[tuple[str, ...], tuple[int, int]], n: int) -> float:
    """p_n = (sum over n-grams of min(here, most in another text) + 1) / (n-grams here + 1); plain at n = 1."""
    found = 0
    for gram, times in grams.items():
        first, second = best[gram]
        found += min(times, second if times == first else first)
    ones = int(n > 1)
    return (found + ones) / (sum(grams.values()) + ones)


def brevity(lengths: Sequence[int], i: int) -> float:
    """min(1, exp(1 - r / c))."""
    own = lengths[i]
    nearest = min((abs(other - own), other) for j, other in enumerate(lengths) if j != i)[1]
    return min(1.0, math.exp(1 - nearest / own))
