"""Words before a prompt that are found by the model's own loss."""

import pytest
import torch

from anabranch.data.streams import derived_seed
from anabranch.errors import UsageError
from anabranch.models.diffusion.family import encoders
from anabranch.models.diffusion.tokens import attach, detach, tables
from anabranch.suppress.attacks.adversarial import Config, Target, before, plain_words, search, swaps
from anabranch.suppress.geom_erasing.adapter import hashes
from tests.diffusion_pipelines import FAMILIES, tiny
from tests.suppress.baselines.trained import latents_of

CAPTIONS = ["a dress", "a bag", "a coat", "a photo of dress", "a photo of bag", "coat"]


def target_of(pipe):
    return Target(pipe, latents_of(pipe), CAPTIONS, 1, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FAMILIES)
def test_one_word_is_the_best_of_all_and_the_model_stays_as_it_was(name):
    pipe = tiny(name)
    before_it = hashes(pipe)
    generator = torch.Generator().manual_seed(derived_seed("adversarial", 0))
    target = Target(pipe, latents_of(pipe), CAPTIONS, 1, generator)
    losses = {word: target.loss(word) for word in plain_words(pipe)[0]}
    first, last = search(pipe, latents_of(pipe), CAPTIONS, Config(num_words=1, steps=1, tried=50, draws=1))
    assert last.text == min(losses, key=losses.get)
    assert last.loss == pytest.approx(min(losses.values()))
    assert first.loss == pytest.approx(losses[first.text])
    assert hashes(pipe) == before_it


def test_the_loss_never_rises_and_ends_below_a_random_prefix():
    pipe = tiny("stable_diffusion_3")
    found = search(pipe, latents_of(pipe), CAPTIONS, Config(num_words=3, steps=6, tried=12, draws=1, seed=1))
    losses = [step.loss for step in found]
    assert len(found) == 7
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_is_that_of_the_words_in_the_table(name):
    """Every word of the prefix stands nowhere else, so the table's own gradient is the sum over its rows."""
    pipe = tiny(name)
    found = target_of(pipe).gradient("mark ring", 2)
    table = encoders(pipe)[0][2].get_input_embeddings().weight.requires_grad_()
    target_of(pipe).graph("mark ring").backward()
    ids = pipe.tokenizer("mark ring", add_special_tokens=False).input_ids
    torch.testing.assert_close(found, table.grad[ids].float())
    assert found.abs().max() > 0


def test_a_swap_is_expected_to_change_what_a_small_step_to_the_other_word_changes():
    pipe = tiny("stable_diffusion")
    target, table = target_of(pipe), tables(pipe)["text_encoder"].detach()
    words, ids = plain_words(pipe)
    here, there = ids[words.index("mark")], ids[words.index("top")]
    slope = float(target.gradient("mark", 1)[0] @ (table[there] - table[here]))
    start, step = target.loss("mark"), 1e-2
    with torch.no_grad():
        weight = pipe.text_encoder.get_input_embeddings().weight
        weight[here] += step * (weight[there] - weight[here])
    assert (target.loss("mark") - start) / step == pytest.approx(slope, rel=0.1)


def test_swaps_change_one_word_and_are_among_those_that_promise_most():
    expected = torch.arange(12.0).view(3, 4)
    made = swaps(torch.tensor([0, 0, 0]), expected, 1, torch.Generator().manual_seed(0))
    (only,) = made
    place = [i for i in range(3) if only[i] != 0] or [0]
    assert len(place) == 1
    assert int(expected[place[0], only[place[0]]]) < 8


def test_words_of_an_adapter_are_not_among_those_that_are_tried():
    pipe = tiny("stable_diffusion")
    words, _ = plain_words(pipe)
    assert {"dress", "mark"} <= set(words)
    rows = {"text_encoder": torch.zeros(1, tables(pipe)["text_encoder"].shape[1])}
    attached = attach(pipe, ["handle"], rows)
    assert plain_words(pipe)[0] == words
    detach(pipe, attached)


def test_a_prompt_gives_way_to_the_words_and_too_many_are_refused():
    pipe = tiny("stable_diffusion")
    long = "a " * 40
    assert before(pipe, "mark ring", long).startswith("mark ring a a")
    assert len(pipe.tokenizer(before(pipe, "mark ring", long)).input_ids) == pipe.tokenizer.model_max_length
    with pytest.raises(UsageError, match="do not fit"):
        before(pipe, "mark " * 40, "a dress")
    with pytest.raises(ValueError, match="captions: expected one for each of 6 pictures, received 1"):
        search(pipe, latents_of(pipe), ["a dress"], Config())
