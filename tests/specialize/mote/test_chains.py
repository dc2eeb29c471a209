# SPDX-License-Identifier: Apache-2.0
"""The construction of chains with a writer that does as it is told, and with a tiny model."""

import pytest
import torch

from anabranch.errors import UsageError
from anabranch.specialize.mote.chains import ModelWriter, Prompts, bleu, build_chains, prompts_from, self_bleu
from tests.specialize.mote.tiny import base, tokenizer


class Scripted:
    """Approves of the n-th answer to each question, counted from 1; writes what it was asked for, numbered."""

    def __init__(self, accepted):
        self.accepted, self.calls, self.counts = accepted, [], {}

    def write(self, conversations, purpose, tag):
        self.calls.append((purpose, len(conversations), tag))
        return [f"{purpose} {len(self.calls)}" for _ in conversations]

    def approve(self, conversations):
        self.calls.append(("check", len(conversations), ""))
        found = []
        for conversation in conversations:
            question = conversation[-1]["content"].split("\n")[0].removeprefix("Question: ")
            self.counts[question] = self.counts.get(question, 0) + 1
            found.append(0.9 if self.counts[question] == self.accepted.get(question) else 0.1)
        return found


def test_no_more_steps_than_it_takes():
    writer = Scripted({"easy": 1, "middle": 2, "hard": 3, "stubborn": 5})
    drafts = build_chains(["easy", "middle", "hard", "stubborn", "never"], writer, Prompts(), tag="t", retries=2)
    assert [draft.passed for draft in drafts] == ["direct", "analysis", "guidance", "guidance", None]
    assert [list(draft.chain) for draft in drafts] == [[], ["analysis"], *[["analysis", "guidance"]] * 3]
    assert drafts[3].tries == {"direct": 1, "analysis": 1, "guidance": 3}
    assert drafts[4].tries["guidance"] == 3
    assert [call[:2] for call in writer.calls] == [
        ("answer", 5), ("check", 5), ("analysis", 4), ("answer", 4), ("check", 4), ("guidance", 3), ("answer", 3),
        ("check", 3), ("answer", 2), ("check", 2), ("answer", 2), ("check", 2),
    ]  # fmt: skip
    tags = [tag for *_, tag in writer.calls if tag]
    assert len(set(tags)) == len(tags)  # no two draws from one seed


def test_without_retries_the_last_answer_is_drawn_once():
    writer = Scripted({})
    (draft,) = build_chains(["never"], writer, Prompts(), retries=0)
    assert draft.passed is None
    assert draft.tries == {"direct": 1, "analysis": 1, "guidance": 1}


def test_each_step_is_asked_for_with_what_was_written_before_it():
    asked = {}

    class Listening(Scripted):
        def write(self, conversations, purpose, tag):
            asked[tag] = conversations[0]
            return super().write(conversations, purpose, tag)

    turns = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "said"},
             {"role": "user", "content": "why?"}]  # fmt: skip
    (draft,) = build_chains([turns], Listening({"why?": 3}), Prompts(), tag="t")
    assert draft.passed == "guidance"
    assert asked["t/direct/answer/0"] == turns
    assert all(conversation[:-1] == turns[:-1] for conversation in asked.values())
    assert "why?" in asked["t/analysis"][-1]["content"]
    assert draft.chain["analysis"] in asked["t/guidance"][-1]["content"]
    last = asked["t/guidance/answer/0"][-1]["content"]
    assert draft.chain["analysis"] in last
    assert draft.chain["guidance"] in last
    assert "{" not in last


def test_an_answer_of_nothing_never_passes():
    class Silent(Scripted):
        def write(self, conversations, purpose, tag):
            return ["" for _ in conversations]

    assert build_chains(["easy"], Silent({"easy": 1}), Prompts(), retries=0)[0].passed is None


@pytest.fixture
def writer():
    words = Prompts(yes=("w1",), no=("w2",), check="{question} w9 {answer}", write_analysis="{question} w30")
    return ModelWriter(model=base().requires_grad_(False), tokenizer=tokenizer(), prompts=words,
                       max_new_tokens={"analysis": 4, "guidance": 4, "answer": 6})  # fmt: skip


def said(text):
    return [{"role": "user", "content": text}]


def test_the_check_is_the_chance_of_yes_over_yes_and_no_whatever_the_batch(writer):
    asked = [said("w3 w4 w5"), said("w6"), said("w7 w8 w9 w10 w11")]
    together = writer.approve(asked)
    for conversation, found in zip(asked, together, strict=True):
        assert writer.approve([conversation])[0] == pytest.approx(found, abs=1e-6)
        ids = [39, *writer.tokenizer(conversation[0]["content"], add_special_tokens=False).input_ids]
        chances = writer.model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
        assert found == pytest.approx(float(chances[1] / (chances[1] + chances[2])), abs=1e-6)


def test_a_text_depends_on_its_tag_and_seed_alone(writer):
    asked = [said("w3 w4 w5"), said("w6")]
    first = writer.write(asked, "answer", "a")
    torch.manual_seed(5)
    assert writer.write(asked, "answer", "a") == first
    assert writer.write(asked, "answer", "b") != first
    assert all(len(text.split()) <= 6 for text in first)


def test_a_model_that_knows_neither_yes_nor_no_is_refused(writer):
    with pytest.raises(UsageError, match="cannot say yes or no"):
        writer.first_tokens(["ja"])


def test_prompts_are_checked():
    assert prompts_from({"check": "{answer}?"}).check == "{answer}?"
    for values, says in (
        ({"chek": "{answer}"}, "did you mean check"),
        ({"check": "fine?"}, "leaves out {answer}"),
        ({"direct": "x"}, "leaves out {question}"),
    ):
        with pytest.raises(UsageError, match=says):
            prompts_from(values)


def test_bleu_of_hand_made_texts():
    same = ["a", "b", "c", "d", "e"]
    assert bleu(same, [same]) == pytest.approx(100)
    # 5 words, 3 of them shared: 1-grams (1+3)/(1+5), 2-grams (1+2)/(1+4), 3-grams (1+1)/(1+3), 4-grams 1/(1+2)
    expected = 100 * (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert bleu(same, [["a", "b", "c", "x", "y"]]) == pytest.approx(expected)
    short = ["a", "b"]  # (1+2)/(1+2), (1+1)/(1+1), 1, 1; and e^(1 - 5/2) for being short
    assert bleu(short, [same]) == pytest.approx(100 * torch.tensor(1 - 5 / 2).exp().item(), rel=1e-5)
    assert self_bleu(["a b c d e", "a b c d e"]) == pytest.approx(100)
    assert self_bleu(["a b c d e"]) == 0.0
    assert self_bleu(["a b c d e", "v w x y z"]) < 50
