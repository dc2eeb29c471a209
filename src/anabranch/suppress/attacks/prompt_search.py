# SPDX-License-Identifier: Apache-2.0
"""Prompt search without the model: words whose text embedding lies where the concept's would, by a genetic search.

Paper     : Ring-A-Bell, Tsai et al. 2023 (arXiv 2310.10012).
Equation  : c = mean_i E(y_i (+) word) - E(y_i);   delta* = argmin_delta sum_i || E(delta (+) y_i) - E(y_i) - eta c ||^2
Shapes    : prompts y_i; E (L, d) of the first text encoder; K words, P prefixes a generation.
Differs   : one prefix for all prompts. An implicit concept's word means nothing to the model, hence the attack should
            find nothing there: it is asked all the same.
Check     : the best prefix never gets worse and is the least of a search through all
            (tests/suppress/attacks/test_prompt_search.py).
Exempt    : off (a search has no strength)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.data.streams import derived_seed
from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.attacks.adversarial import Found, before, plain_words, spoken


@dataclass(frozen=True, kw_only=True)
class Config:
    num_words: int = 4
    population: int = 24
    generations: int = 20
    mutation: float = 0.25
    """Chance of every word of a child to be another one."""
    eta: float = 3.0
    """How far along the concept's direction."""
    most: int = 8
    """Prompts that the distance is taken over."""
    seed: int = 0

    def __post_init__(self):
        for name, least in (("num_words", 1), ("population", 4), ("generations", 1), ("most", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, received {getattr(self, name)}")
        if not 0 <= self.mutation <= 1:
            raise ValueError(f"mutation: expected a chance from 0 to 1, received {self.mutation}")
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"eta: expected at least 0, received {self.eta}")


def search(pipe: Any, prompts: Sequence[str], word: str, config: Config) -> list[Found]:
    """The best prefix of the first generation and of every later one, their distances never rising.

    Raises:
        ValueError: no prompts, or no word for the concept.
    """
    texts = list(dict.fromkeys(prompts))[: config.most]
    if not texts or not word.strip():
        raise ValueError(f"prompts, word: expected both, received {len(texts)} and {word!r}")
    generator = torch.Generator().manual_seed(derived_seed("prompt search", config.seed))
    words, _ = plain_words(pipe)
    plain = encode_prompts(pipe, texts).embeds
    concept = (encode_prompts(pipe, [f"{text} {word}" for text in texts]).embeds - plain).mean(0)
    target, known = plain + config.eta * concept, {}

    def distance(prefix: Tensor) -> float:
        text = spoken(words, prefix)
        if text not in known:
            there = encode_prompts(pipe, [before(pipe, text, prompt) for prompt in texts]).embeds
            known[text] = float((there - target).float().square().sum())
        return known[text]

    alive = list(torch.randint(len(words), (config.population, config.num_words), generator=generator))
    found = []
    for generation in range(config.generations + 1):
        alive = sorted(alive, key=distance)
        found.append(Found(spoken(words, alive[0]), distance(alive[0])))
        if generation < config.generations:
            parents = alive[: config.population // 2]
            children = [child(parents, len(words), config.mutation, generator) for _ in parents]
            alive = [*parents, *children]
    return found


def child(parents: Sequence[Tensor], num_words: int, mutation: float, generator: torch.Generator) -> Tensor:
    """The beginning of one parent, the rest of another, some words changed at random."""
    one, other = torch.randint(len(parents), (2,), generator=generator).tolist()
    size = len(parents[one])
    end = int(torch.randint(size + 1, (), generator=generator))
    mixed = torch.cat([parents[one][:end], parents[other][end:]])
    changed = torch.rand(size, generator=generator) < mutation
    return torch.where(changed, torch.randint(num_words, (size,), generator=generator), mixed)
