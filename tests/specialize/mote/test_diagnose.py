# SPDX-License-Identifier: Apache-2.0
"""Diagnoses of a mixture: by the definition, on experts that are alike, on notes that count and notes that do not."""

import copy

import pytest
import torch

from anabranch.specialize.mote.collate import StepSpanCollator, chain_row
from anabranch.specialize.mote.diagnose import (
    by_step,
    exchanged,
    losses,
    notes_count,
    questions_of,
    reader_matters,
    right_and_wrong,
)
from tests.specialize.mote.tiny import tiny

CHAINS = [
    ("w1 w2", {"analysis": "w3 w4 w5", "guidance": "w6", "answer": "w7 w8"}),
    ("w9", {"answer": "w10 w11 w12"}),
    ("w13 w14", {"analysis": "w15", "answer": "w16 w17"}),
]


def rows_of(mote):
    return [chain_row(mote.tokenizer, mote.tokens, question, chain) for question, chain in CHAINS]


def batch_of(mote):
    return StepSpanCollator(mote.tokens, mote.tokenizer.pad_token_id, question=None)(rows_of(mote))


def test_losses_are_those_of_each_row_alone():
    mote = tiny()
    batch, rows = batch_of(mote), rows_of(mote)
    told = losses(mote, batch)
    sums = {name: [] for name in mote.settings.steps.names}
    for number, row in enumerate(rows):
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            logs = mote(ids, batch["step_ids"][number : number + 1, : len(row.input_ids)]).logits[0].log_softmax(-1)
        for span in row.step_spans:
            for place in range(span.start, span.stop):
                value = -float(logs[place - 1, row.input_ids[place]])
                assert float(told[number, place - 1]) == pytest.approx(value, abs=1e-4)
                if place > span.start:  # a start token is foreseen by whoever comes before it
                    sums[span.step].append(value)
    means = by_step(mote, batch, told)
    for name, values in sums.items():
        assert means[name] == pytest.approx(sum(values) / len(values), abs=1e-4)


def test_experts_that_are_alike_are_never_wrong_and_others_are():
    alike, apart = tiny(), tiny()
    state = alike.trained()
    with torch.no_grad():
        for name, parameter in state.items():
            for step in ("guidance", "answer"):
                if f".{step}." in name and "lora_" in name:
                    parameter.copy_(state[name.replace(f".{step}.", ".analysis.")])
    found = right_and_wrong(alike, batch_of(alike))
    for step in ("analysis", "guidance", "answer"):
        assert found["next"][step] == pytest.approx(found["own"][step], abs=1e-5)
        assert found["drawn"][step] == pytest.approx(found["own"][step], abs=1e-5)
    assert float(reader_matters(alike, questions_of(rows_of(alike))).max()) < 1e-6
    found = right_and_wrong(apart, batch_of(apart))
    assert all(abs(found["next"][step] - found["own"][step]) > 1e-3 for step in found["own"])
    assert float(reader_matters(apart, questions_of(rows_of(apart))).min()) > 1e-3


def test_notes_are_exchanged_and_the_answer_stays():
    mote = tiny()
    first, _, third = rows_of(mote)
    mixed = exchanged(first, third)
    told = {
        span.step: mote.tokenizer.decode(mixed.input_ids[span.start + 1 : span.stop - 1]) for span in mixed.step_spans
    }
    assert told["analysis"] == "w15"
    assert "guidance" not in told
    assert told["answer"].startswith("w7 w8")
    assert questions_of([mixed]) == questions_of([first])


def test_notes_count_where_the_answer_reads_them_and_not_where_it_cannot():
    mote = tiny()
    rows, pad = rows_of(mote), mote.tokenizer.pad_token_id
    assert len(notes_count(mote, rows, pad)) == 0  # no two rows of one shape: nothing is exchanged
    rows = [chain_row(mote.tokenizer, mote.tokens, f"w{i}", {"analysis": f"w{i} w{i + 1}", "answer": "w20 w21"})
            for i in range(5)]  # fmt: skip
    whole = notes_count(mote, rows, pad)
    assert len(whole) == 5
    assert float(whole.abs().max()) > 1e-4
    torch.testing.assert_close(notes_count(mote, rows, pad, batch_size=2), whole)
    blind = copy.deepcopy(mote)  # values of nothing: attention hands nothing on
    with torch.no_grad():
        for name, parameter in blind.named_parameters():
            if "v_proj" in name:
                parameter.zero_()
    assert float(notes_count(blind, rows, pad).abs().max()) < 1e-5
    assert len(notes_count(mote, rows[:1], pad)) == 0
