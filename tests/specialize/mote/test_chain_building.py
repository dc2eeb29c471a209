# SPDX-License-Identifier: Apache-2.0
"""The construction of chains with a scripted writer, and the model's side of it on a tiny model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import AnabranchError, UsageError
from anabranch.specialize.mote.chain_building import Draft, Verdict, Written, build_chains
from anabranch.specialize.mote.chain_prompts import Prompts, fill
from anabranch.specialize.mote.chain_writer import ChainWriter, nucleus_choice, without_step_tokens
from tests.specialize.mote.tiny import base, tokenizer


class Scripted:
    """Texts and verdicts from a list by question and step; a text of its own for what is not said."""

    def __init__(self, verdicts=None, texts=None):
        self.verdicts = {name: list(values) for name, values in (verdicts or {}).items()}
        self.texts = {name: list(values) for name, values in (texts or {}).items()}
        self.calls, self.draws, self.seen = [], [], []

    def write(self, step, draw, drafts):
        self.calls.append((step, [draft.id for draft in drafts]))
        self.draws.append((step, draw))
        self.seen += [(draft.id, step, dict(draft.texts)) for draft in drafts]
        texts = [self.texts[d.id, step].pop(0) if self.texts.get((d.id, step)) else f"{step} of {d.id}" for d in drafts]
        return [Written(text, len(text.split()), False) for text in texts]

    def check(self, drafts):
        self.calls.append(("check", [draft.id for draft in drafts]))
        return [Verdict(self.verdicts[draft.id].pop(0), 1.0) for draft in drafts]


def built(writer, names, **options):
    drafts = [Draft(name, f"question {name}") for name in names]
    build_chains(drafts, writer, **options)
    return {draft.id: draft for draft in drafts}


def test_every_path_and_the_order_of_the_calls():
    writer = Scripted({"easy": [0.9], "middle": [0.1, 0.6], "hard": [0.1, 0.2, 0.7], "retried": [0, 0, 0, 0.5],
                       "never": [0.4] * 5})  # fmt: skip
    found = built(writer, ["easy", "middle", "hard", "retried", "never"])
    rest = ["hard", "retried", "never"]
    assert writer.calls == [
        ("answer", ["easy", "middle", *rest]), ("check", ["easy", "middle", *rest]),
        ("analysis", ["middle", *rest]), ("answer", ["middle", *rest]), ("check", ["middle", *rest]),
        ("guidance", rest), ("answer", rest), ("check", rest),
        ("answer", rest[1:]), ("check", rest[1:]), ("answer", rest[2:]), ("check", rest[2:]),
    ]  # fmt: skip
    assert {name: len(draft.verdicts) for name, draft in found.items()} == {
        "easy": 1, "middle": 2, "hard": 3, "retried": 4, "never": 5,
    }  # fmt: skip
    assert {name: set(draft.texts) - {"answer"} for name, draft in found.items()} == {
        "easy": set(), "middle": {"analysis"}, **{name: {"analysis", "guidance"} for name in rest},
    }  # fmt: skip
    assert [draft.passed for draft in found.values()] == [True, True, True, True, False]
    assert [draft.dropped for draft in found.values()] == ["", "", "", "", "check"]
    assert len(set(writer.draws)) == len(writer.draws)  # no two texts of a question come from one throw
    assert [stage for stage, _ in found["never"].verdicts] == ["direct", "analysis", "guidance", "retry 1", "retry 2"]


def test_the_threshold_itself_passes_and_no_retries_are_none():
    assert built(Scripted({"a": [0.5]}), ["a"])["a"].passed
    writer = Scripted({"a": [0.49] * 3})
    assert built(writer, ["a"], retries=0)["a"].dropped == "check"
    assert [step for step, _ in writer.calls].count("answer") == 3


def test_guidance_is_written_from_the_analysis_and_never_without():
    writer = Scripted({"a": [0, 0, 1]})
    built(writer, ["a"])
    assert [(step, set(seen)) for _, step, seen in writer.seen] == [
        ("answer", set()), ("analysis", {"answer"}), ("answer", {"answer", "analysis"}),
        ("guidance", {"answer", "analysis"}), ("answer", {"answer", "analysis", "guidance"}),
    ]  # fmt: skip
    silent = Scripted({"a": [0], "b": [0, 1]}, {("a", "analysis"): [""] * 3, ("b", "analysis"): ["", "found"]})
    found = built(silent, ["a", "b"])
    assert (found["a"].dropped, found["a"].passed) == ("empty", False)
    assert (found["b"].texts["analysis"], found["b"].passed) == ("found", True)
    assert not any(step == "guidance" for step, _ in silent.calls)


def test_a_draft_that_takes_all_steps_is_asked_for_no_answer_before_its_last_note():
    writer = Scripted({"whole": [0.2, 0.9], "easy": [0.9]})
    drafts = [Draft("whole", "question", all_steps=True), Draft("easy", "question")]
    build_chains(drafts, writer)
    assert writer.calls == [
        ("answer", ["easy"]), ("check", ["easy"]), ("analysis", ["whole"]), ("guidance", ["whole"]),
        ("answer", ["whole"]), ("check", ["whole"]), ("answer", ["whole"]), ("check", ["whole"]),
    ]  # fmt: skip
    assert [draft.passed for draft in drafts] == [True, True]
    assert [stage for stage, _ in drafts[0].verdicts] == ["guidance", "retry 1"]
    assert set(drafts[0].texts) == {"analysis", "guidance", "answer"}


def test_an_empty_answer_fails_unasked_and_what_was_dropped_before_is_left_alone():
    writer = Scripted({"a": [1.0]}, {("a", "answer"): [""]})
    draft = Draft("b", "too long", dropped="too_long")
    drafts = [Draft("a", "question"), draft]
    build_chains(drafts, writer)
    assert drafts[0].verdicts == [("direct", None), ("analysis", Verdict(1.0, 1.0))]
    assert draft == Draft("b", "too long", dropped="too_long")
    assert all("b" not in names for _, names in writer.calls)
    mute = Scripted(texts={("a", "answer"): [""] * 5})
    assert built(mute, ["a"])["a"].dropped == "empty"
    assert not any(step == "check" for step, _ in mute.calls)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=1, max_size=5), st.integers(0, 2))
def test_a_question_ends_with_its_first_passing_answer_whoever_is_beside_it(verdicts, retries):
    together = built(Scripted(dict(enumerate(verdicts))), range(len(verdicts)), retries=retries)
    for name, values in enumerate(verdicts):
        tried = values[: 3 + retries]
        first = next((i for i, value in enumerate(tried) if value >= 0.5), None)
        assert together[name].passed == (first is not None)
        assert len(together[name].verdicts) == (len(tried) if first is None else first + 1)
        assert built(Scripted({name: values}), [name], retries=retries)[name] == together[name]


# the prompts


def test_what_is_filled_in_is_text():
    values = {"question": "{answer} {x}", "answer": "{question}"}
    assert fill("{question}|{answer}|{other}", values) == "{answer} {x}|{question}|{other}"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"analysis": "think"}, "the prompt 'analysis' has the wrong places"),
        ({"check": "{question} {answer} {analysis}"}, "the prompt 'check' has the wrong places"),
        ({"guidance": "{question}"}, "the prompt 'guidance' has the wrong places"),
        ({"no": "Yes "}, "needs two words"),
    ],
)
def test_wrong_prompts(given, says):
    with pytest.raises(UsageError, match=says):
        Prompts(**given)


# the model's side


WORDS = Prompts(
    analysis="{question} w30", answer_after_analysis="{question} {analysis}", guidance="{question} {analysis} w31",
    answer_after_guidance="{question} {analysis} {guidance}", check="{question} w9 {answer}", yes="w1", no="w2",
)  # fmt: skip
BUDGET = {"analysis": 4, "guidance": 4, "answer": 6}
DRAFTS = [Draft(i, " ".join(f"w{3 + j}" for j in range(1 + 3 * i)), {"answer": f"w{20 + i}"}) for i in range(4)]


def writer(model=None, **options):
    return ChainWriter(base() if model is None else model, tokenizer(), WORDS, **({"budget": BUDGET} | options))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_check_is_yes_over_yes_and_no_whatever_the_batch(family):
    told = writer(base(family))
    together = told.check(DRAFTS)
    for draft, verdict in zip(DRAFTS, together, strict=True):
        alone = told.check([draft])[0]
        assert alone.probability == pytest.approx(verdict.probability, abs=2e-6)
        ids = [39, *told.tokenizer(f"{draft.question} w9 {draft.texts['answer']}", add_special_tokens=False).input_ids]
        words = told.model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[1:3].tolist()
        assert verdict.probability == pytest.approx(words[0] / sum(words), abs=2e-6)
        assert verdict.mass == pytest.approx(sum(words), abs=2e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_text_is_a_function_of_its_own_draw_whatever_the_batch_and_the_global_generator(family):
    told = writer(base(family))
    drafts = [Draft(draft.id, draft.question) for draft in DRAFTS]
    together = told.write("answer", "direct", drafts)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    assert [told.write("answer", "direct", [draft])[0] for draft in drafts] == together
    assert torch.equal(torch.get_rng_state(), state)
    assert told.write("answer", "retry 1", drafts) != together
    assert writer(base(family), seed=1).write("answer", "direct", drafts) != together
    assert all(written.num_tokens <= 6 for written in together)


def test_a_checkpoints_own_sampling_settings_have_no_part_and_stay():
    plain = writer().write("answer", "direct", DRAFTS)
    model = base()
    model.generation_config.update(repetition_penalty=5.0, top_k=1, do_sample=True, min_new_tokens=2)
    own = model.generation_config
    assert writer(model).write("answer", "direct", DRAFTS) == plain
    assert model.generation_config is own


def test_words_are_drawn_as_often_as_the_nucleus_says():
    scores = torch.tensor([0.4, 0.1, 0.3, 0.2]).log().repeat(4000, 1)
    draws = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    found = torch.bincount(nucleus_choice(scores, draws, 1.0, 1.0), minlength=4) / 4000
    torch.testing.assert_close(found, torch.tensor([0.4, 0.1, 0.3, 0.2]), atol=0.03, rtol=0)
    found = torch.bincount(nucleus_choice(scores, draws, 1.0, 0.7), minlength=4) / 4000  # .4 + .3 are enough
    torch.testing.assert_close(found, torch.tensor([4 / 7, 0, 3 / 7, 0]), atol=0.03, rtol=0)
    assert set(nucleus_choice(scores, draws, 1.0, 1e-6).tolist()) == {0}
    assert set(nucleus_choice(scores, draws, 0.01, 1.0).tolist()) == {0}
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert nucleus_choice(scores[:2], ends, 1.0, 1.0).tolist() == [0, 1]


def test_temperature_0_is_greedy():
    told = writer(temperature=0.0)
    ids = torch.tensor([[39, 3]])
    for _ in range(6):
        ids = torch.cat([ids, told.model(ids).logits[:, -1:].argmax(-1)], 1)
    expected = told.tokenizer.decode(ids[0, 2:], skip_special_tokens=True).strip()
    assert told.write("answer", "direct", [Draft(0, "w3")])[0].text == expected


def test_earlier_turns_stay_and_the_chat_template_is_used():
    turns = [
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4"},
        {"role": "user", "content": "w5"},
    ]
    told = writer()
    told.tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}w35"
    draft = Draft(0, turns, {"analysis": "w6", "guidance": "w7", "answer": "w8"})
    assert told.tokenizer.decode(told.prompt("check", draft)) == "[UNK] w3 [UNK] w4 [UNK] w5 w9 w8 w35"
    assert told.tokenizer.decode(told.prompt("answer_after_guidance", draft)) == "[UNK] w3 [UNK] w4 [UNK] w5 w6 w7 w35"
    assert turns[-1]["content"] == "w5"


def test_what_does_not_fit_is_not_fed():
    told = writer()
    long = Draft(9, " ".join(["w3"] * 80), {"answer": "w4"})
    assert told.write("answer", "direct", [long])[0] == Written("", 0, False)
    assert told.check([long, DRAFTS[0]])[0] == Verdict(0.0, 0.0)
    assert told.check([long, DRAFTS[0]])[1] == told.check(DRAFTS[:1])[0]
    # bos, question and w31, all of analysis and guidance, or the answer in its place
    assert told.longest(Draft(0, "w3 w4")) == 1 + 1 + 2 + sum(BUDGET.values())


def test_tokens_of_steps_are_taken_out_of_what_is_written():
    assert without_step_tokens("a <|analysis|>b<|ana<|guidance|>lysis|>") == "a b"


def test_an_end_in_the_text_ends_it_and_a_full_budget_is_told():
    told = writer()
    end = told.tokenizer.eos_token_id
    assert told.read([3, 4, end, end]) == Written("w3 w4", 2, False)
    assert told.read([3, 4]) == Written("w3 w4", 2, True)
    assert told.read([end]) == Written("", 0, False)


@pytest.mark.parametrize(("yes", "no"), [("ja", "w2"), ("w1", "nein")])
def test_words_that_the_tokenizer_does_not_know(yes, no):
    with pytest.raises(UsageError, match="cannot tell the words of the check apart"):
        ChainWriter(base(), tokenizer(), Prompts(yes=yes, no=no), budget=BUDGET)


def test_a_broken_model_is_an_error_and_no_verdict():
    model = base()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(AnabranchError, match="no numbers"):
        writer(model).check(DRAFTS)


def test_whoever_polls_can_end_the_work_between_two_tokens():
    calls = []

    def poll():
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError):
        writer(poll=poll).write("answer", "direct", DRAFTS)
