# SPDX-License-Identifier: Apache-2.0
"""A mixture behind transformers' own interface gives the answers and the logits that the mixture gives."""

import pytest
import torch

from anabranch.errors import UsageError
from anabranch.specialize.mote.collate import question_ids
from anabranch.specialize.mote.generate import generate, left_padded
from anabranch.specialize.mote.plain import as_model
from anabranch.specialize.mote.steps import QUESTION, ids_of_spans, ids_of_tokens
from tests.specialize.mote.tiny import tiny

QUESTIONS = ["w20 w21", "w22 w23 w24 w25 w26", "w27"]
LIMITS = {"analysis": 10, "guidance": 5}


def asked(mote):
    return left_padded([question_ids(mote.tokenizer, question) for question in QUESTIONS], 37)


def answered(model, tokenizer, ids, valid, **options):
    out = model.generate(input_ids=ids, attention_mask=valid, do_sample=False, **options)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in out[:, ids.shape[1] :]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen"])
@pytest.mark.parametrize("mode", ["adaptive", "full", "direct"])
def test_its_answers_are_those_of_the_mixture(family, mode):
    mote = tiny(family)
    ids, valid = asked(mote)
    prompts = [row[kept.bool()].tolist() for row, kept in zip(ids, valid, strict=True)]
    expected = [c.answer for c in generate(mote, prompts, mode=mode, budget=LIMITS | {"answer": 9})]
    model = as_model(mote, mode=mode, budget=LIMITS)
    assert answered(model, mote.tokenizer, ids, valid, max_new_tokens=9) == expected
    assert answered(model, mote.tokenizer, ids, valid, max_length=ids.shape[1] + 9) == expected
    assert any(expected), "an answer of no words would agree with anything"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_forward_knows_steps_by_their_start_tokens(family):
    mote = tiny(family)
    start, end = mote.tokens.starts[-1], mote.tokens.ends[0]
    row = [39, 5, 6, mote.tokens.starts[0], 7, end, start, 8, 9]
    ids, steps = torch.tensor([row]), torch.tensor([[QUESTION] * 3 + [0] * 3 + [2] * 3])
    expected, question = mote(ids, steps).logits, mote(ids[:, :3], steps[:, :3]).logits
    assert torch.equal(steps[0], ids_of_spans([("analysis", 3, 6), ("answer", 6, 9)], 9, mote.settings.steps))
    as_question = mote(ids, torch.full_like(steps, QUESTION)).logits
    model = as_model(mote)
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(input_ids=ids[:, :3]).logits, question)
    assert not torch.allclose(model(ids).logits, as_question), "the steps would not have mattered"


def test_the_same_mixture_walks_other_steps_when_it_is_asked_again():
    mote = tiny("llama")
    ids, valid = asked(mote)
    fresh = answered(as_model(tiny("llama"), mode="direct"), mote.tokenizer, ids, valid, max_new_tokens=9)
    as_model(mote, mode="full", budget=LIMITS)
    assert answered(as_model(mote, mode="direct"), mote.tokenizer, ids, valid, max_new_tokens=9) == fresh


def test_words_that_stop_count_in_the_answer_alone():
    mote = tiny()
    ids, valid = asked(mote)
    prompts = [row[kept.bool()].tolist() for row, kept in zip(ids, valid, strict=True)]
    chains = generate(mote, prompts, mode="full", budget=LIMITS | {"answer": 9})
    model = as_model(mote, mode="full", budget=LIMITS)
    noted = {i: set(chain.texts["analysis"].split()) - set(chain.answer.split()) for i, chain in enumerate(chains)}
    row, word = next((i, sorted(words)[0]) for i, words in noted.items() if words and chains[i].answer)

    def stopped_at(text):
        word = mote.tokenizer.convert_tokens_to_ids(text)
        stop = [lambda tokens, scores, **options: (tokens == word).any(1)]
        return answered(model, mote.tokenizer, ids[[row]], valid[[row]], max_new_tokens=9, stopping_criteria=stop)[0]

    assert stopped_at(word) == chains[row].answer
    said = chains[row].answer.split()
    assert stopped_at(said[0]).split() == said[:1] != said


def test_what_stands_in_a_prompt_is_a_question_whatever_it_looks_like():
    mote = tiny()
    model = as_model(mote, mode="direct")
    ids = torch.tensor([[39, 5, mote.tokens.starts[-1], 6]])
    steps, context_ids = [], mote.context_ids
    mote.context_ids = lambda given, known: steps.append(known.clone()) or context_ids(given, known)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert (steps[0] == QUESTION).all()
    assert torch.equal(model.walk.steps(ids), ids_of_tokens(ids, mote.tokens, 0)), "outside of generate it is a step"


def test_what_it_cannot_do_is_said():
    model = as_model(tiny())
    ids = torch.tensor([[39, 5, 6]])
    with pytest.raises(UsageError, match="of the whole chain"):
        model.generate(ids, output_scores=True, return_dict_in_generate=True)
    with pytest.raises(UsageError, match="streamer is of the whole chain"):
        model.generate(ids, streamer=print)  # it would show the notes
    with pytest.raises(UsageError, match="align export"):
        model.save_pretrained("anywhere")
    with pytest.raises(UsageError, match="known by their tokens"):
        model(inputs_embeds=torch.zeros(1, 3, 16))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(UsageError, match="in a cache"):
        model(ids, past_key_values=cache)
    with pytest.raises(UsageError, match="no step"):
        as_model(tiny(), budget={"thinking": 4})
