"""Words before a prompt that are found with the text encoder alone."""

import pytest
import torch

from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.attacks.adversarial import plain_words
from anabranch.suppress.attacks.prompt_search import Config, child, search
from tests.diffusion_pipelines import FAMILIES, tiny

PROMPTS = ["a dress", "a bag", "a dress"]


@pytest.mark.parametrize("name", FAMILIES)
def test_one_word_is_the_nearest_of_all_words(name):
    pipe, eta = tiny(name), 2.0
    texts = ["a dress", "a bag"]
    plain = encode_prompts(pipe, texts).embeds
    concept = (encode_prompts(pipe, [f"{text} mark" for text in texts]).embeds - plain).mean(0)
    distances = {}
    for word in plain_words(pipe)[0]:
        there = encode_prompts(pipe, [f"{word} {text}" for text in texts]).embeds
        distances[word] = float(((there - plain - eta * concept) ** 2).sum())
    config = Config(num_words=1, population=40, generations=12, mutation=0.8, eta=eta)
    found = search(pipe, PROMPTS, "mark", config)[-1]
    assert found.text == min(distances, key=distances.get)
    assert found.loss == pytest.approx(min(distances.values()), rel=1e-5)


def test_the_best_never_gets_worse_and_the_seed_decides():
    pipe = tiny("stable_diffusion")
    found = search(pipe, PROMPTS, "mark", Config(num_words=3, population=8, generations=10))
    losses = [step.loss for step in found]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert search(pipe, PROMPTS, "mark", Config(num_words=3, population=8, generations=10)) == found


def test_a_child_has_the_words_of_its_parents_where_none_is_changed():
    parents = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])]
    for seed in range(10):
        mixed = child(parents, 6, 0.0, torch.Generator().manual_seed(seed))
        assert all(mixed[i] in (i, i + 3) for i in range(3))


def test_without_a_word_there_is_nothing_to_search_for():
    with pytest.raises(ValueError, match="expected both"):
        search(tiny("stable_diffusion"), PROMPTS, " ", Config())
