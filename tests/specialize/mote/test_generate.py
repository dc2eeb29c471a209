# SPDX-License-Identifier: Apache-2.0
"""Chains as they are generated: invariants 6 and 12."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.specialize.mote.collate import question_ids
from anabranch.specialize.mote.generate import generate
from anabranch.specialize.mote.steps import QUESTION, Budget, allowed, for_experts, ids_of_tokens
from tests.specialize.mote.tiny import tiny

QUESTIONS = ["w20 w21", "w22 w23 w24 w25 w26", "w27", "w1 w2 w3"]
BUDGET = {"analysis": 40, "guidance": 40, "answer": 40}


def prompts(mote):
    return [question_ids(mote.tokenizer, question) for question in QUESTIONS]


@torch.no_grad()
def without_cache(mote, prompt, mode, budget):
    """Greedy decoding of one question by whole forwards, with the rules written out once more."""
    tokens, known = list(prompt), mote.tokens
    chain = {"adaptive": None, "full": ("analysis", "guidance", "answer"), "direct": ("answer",)}[mode]
    while known.ends[-1] not in tokens[len(prompt) :]:
        ids = torch.tensor([tokens])
        scores = mote(ids, ids_of_tokens(ids, known, len(prompt))).logits[0, -1]
        legal = allowed(tokens[len(prompt) :], known, chain, Budget(of=budget))
        if legal is None:
            started = next(t for t in reversed(tokens) if t in known.starts)
            own = known.ends[known.starts.index(started)]
            legal = [i for i in range(len(scores)) if i == own or (i not in known.ids and i != 38)]
        tokens.append(max(legal, key=lambda i: float(scores[i])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen"])
@pytest.mark.parametrize("mode", ["adaptive", "full", "direct"])
def test_06_cached_decoding_of_a_left_padded_batch_is_the_full_forward_row_by_row(family, mode):
    mote = tiny(family)
    budget = {"analysis": 10, "guidance": 5, "answer": 9}
    found = generate(mote, prompts(mote), mode=mode, budget=budget)
    for prompt, chain in zip(prompts(mote), found, strict=True):
        assert chain.tokens == without_cache(mote, prompt, mode, budget)


def test_06_sixty_four_tokens_and_more():
    mote = tiny()
    found = generate(mote, prompts(mote), mode="full", budget=BUDGET)
    assert max(len(chain.tokens) for chain in found) >= 64
    for prompt, chain in zip(prompts(mote), found, strict=True):
        assert chain.tokens == without_cache(mote, prompt, "full", BUDGET)


@torch.no_grad()
def test_beams_that_leave_nothing_out_find_the_best_of_all_answers():
    """Two words at most: with a beam for every word the search is exhaustive, and beams are reordered at each step."""
    mote = tiny()
    prompt, known, budget = prompts(mote)[1], mote.tokens, {"answer": 2}
    (found,) = generate(mote, [prompt], mode="direct", budget=budget, num_beams=46)
    start, end = known.starts[-1], known.ends[-1]
    words = [i for i in range(46) if i not in known.ids and i != mote.tokenizer.eos_token_id]
    scores = {}
    for tokens in [
        (start, end),
        *((start, a, end) for a in words),
        *((start, a, b, end) for a in words for b in words),
    ]:
        scores[tokens] = total(mote, prompt, tokens) / len(tokens)
    assert tuple(found.tokens) == max(scores, key=scores.get)


def total(mote, prompt, tokens):
    ids = torch.tensor([[*prompt, *tokens]])
    log_p = mote(ids, ids_of_tokens(ids, mote.tokens, len(prompt))).logits[0].log_softmax(-1)
    return sum(float(log_p[len(prompt) + place - 1, token]) for place, token in enumerate(tokens))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 45), max_size=40), st.sampled_from([None, ("answer",), ("analysis", "answer")]))
def test_12_any_walk_along_legal_tokens_ends_with_an_answer_within_its_budget(choices, chain):
    known, budget = KNOWN, Budget(of={"analysis": 3, "guidance": 2, "answer": 4})
    row, picks = [], iter(choices)
    for _ in range(3 + 2 + 4 + 2 * 3):
        legal = allowed(row, known, chain, budget)
        if legal == []:
            break
        started = next((t for t in reversed(row) if t in known.starts), None)
        options = legal if legal is not None else [*range(40), known.ends[known.starts.index(started)]]
        row.append(options[next(picks, 0) % len(options)])
        if row[-1] == known.ends[-1]:
            break
    assert row[-1] == known.ends[-1]
    steps = [known.starts.index(token) for token in row if token in known.starts]
    assert steps == sorted(set(steps))
    assert steps[-1] == 2
    if chain is not None:
        assert [known.steps.names[step] for step in steps] == list(chain)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 45), min_size=1, max_size=30), st.integers(0, 10))
def test_a_token_belongs_to_the_last_step_that_began_and_the_prompt_to_none(row, prompt_length):
    expected, current = [], QUESTION
    for place, token in enumerate(row):
        if place >= prompt_length and token in KNOWN.starts:
            current = KNOWN.starts.index(token)
        expected.append(current)
    assert ids_of_tokens(torch.tensor([row]), KNOWN, prompt_length)[0].tolist() == expected


def test_sampling_is_by_seed_and_a_forced_end_is_told():
    mote = tiny()
    one, two = (generate(mote, prompts(mote), temperature=1.0, seed=seed, budget=BUDGET) for seed in (1, 1))
    assert [chain.tokens for chain in one] == [chain.tokens for chain in two]
    assert [c.tokens for c in generate(mote, prompts(mote), temperature=1.0, seed=2, budget=BUDGET)] != [
        c.tokens for c in one
    ]
    (short,) = generate(mote, prompts(mote)[:1], mode="full", budget=dict.fromkeys(BUDGET, 1))
    assert short.forced == tuple(name for name, text in short.texts.items() if text) != ()
    assert sum(short.spent.values()) == len(short.tokens) <= 9


def test_the_model_is_left_as_it_was():
    mote = tiny().train()
    prepare = mote.model.get_base_model().prepare_inputs_for_generation
    with pytest.raises(UsageError, match="there is no step"):
        generate(mote, prompts(mote), mode="analysis,anwser")
    with pytest.raises(UsageError, match="goes forward"):
        generate(mote, prompts(mote), mode="answer,analysis")
    with pytest.raises(UsageError, match="nothing is asked"):
        generate(mote, [])
    with pytest.raises(UsageError, match="there is no step"):
        generate(mote, prompts(mote), budget={"anser": 3})
    generate(mote, prompts(mote), budget=dict.fromkeys(BUDGET, 2))
    assert mote.training
    assert mote.model.get_base_model().prepare_inputs_for_generation == prepare
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert mote(ids, for_experts(torch.full((1, 3), QUESTION), "first", 3)).logits.shape == (1, 3, 46)


KNOWN = tiny(moved=False).tokens
