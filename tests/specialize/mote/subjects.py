# SPDX-License-Identifier: Apache-2.0
"""How language models that reason in steps are exercised."""

import torch

from anabranch.specialize.mote import chain_building, generate, interference, mote, skip
from anabranch.specialize.mote.chain_building import Draft, Verdict, Written
from anabranch.specialize.mote.collate import IGNORED, StepSpanCollator, chain_row, question_ids
from anabranch.testing import Reordering, Subject, along
from tests.specialize.mote.tiny import tiny

CHAIN = {"analysis": "w1 w2 w3", "guidance": "w4 w5", "answer": "w6 w7 w8"}
ROWS = 3


def mixture(g, **settings):
    """With experts that were moved away from zero, and an attention that hands NaN on."""
    made = tiny(moved=False, dropout=0.0, **settings)
    made.model.set_attn_implementation("eager")
    with torch.no_grad():
        for value in made.trained().values():
            value += 0.2 * torch.randn(value.shape, generator=g)
    return made


def batch(g, known):
    rows = []
    for _ in range(ROWS):
        words = iter(torch.randint(30, (20,), generator=g).tolist())
        told = {step: " ".join(f"w{next(words)}" for _ in text.split()) for step, text in CHAIN.items()}
        rows.append(chain_row(known.tokenizer, known.tokens, "w20 w21", told))
    return dict(StepSpanCollator(known.tokens, 37, question="first")(rows))


def longer(value):
    """Two masked tokens at the end of every row."""
    more = {"input_ids": 5, "attention_mask": 0, "step_ids": -1, "labels": IGNORED}
    return {name: torch.cat([of, torch.full((len(of), 2), more[name])], 1) for name, of in value.items()}


def subject_mote() -> Subject:
    def inputs(g):
        made = mixture(g)
        return {"objective": mote.ChainLoss(made), "batch": batch(g, made)}

    def strength_0(given):
        made = tiny(moved=False)
        ids = torch.arange(36).view(3, 12)  # words of the language model: it has no rows for the steps' tokens
        with torch.no_grad(), made.model.disable_adapter():
            plain = made.model.get_base_model()(input_ids=ids).logits
        with torch.no_grad():  # as it is built, what the experts add is 0
            return made(ids, torch.zeros_like(ids)).logits[..., :40], plain[..., :40]  # nor columns

    return Subject(
        inputs=inputs,
        call=lambda objective, batch: objective(batch),
        touches=lambda given, output: ["objective.*"],
        pad=lambda given: {**given, "batch": longer(given["batch"])},
        samples=along(ROWS, {"batch.*": 0}),
        off=strength_0,
    )


def subject_interference() -> Subject:
    def inputs(g):
        made = mixture(g, r=1, targets=("q_proj", "down_proj"))
        return {"mixture": made, "first": batch(g, made), "second": batch(g, made)}

    def call(mixture, first, second):
        conflict = interference.step_conflict(mixture, [first, second])
        return {"conflict": conflict, "transfer": interference.step_transfer(mixture, first, second)}

    return Subject(
        inputs=inputs,
        call=call,
        pad=lambda given: {**given, "first": longer(given["first"]), "second": longer(given["second"])},
        samples=along(ROWS, {"first.*": 0, "second.*": 0}),
        tolerance=1e-4,
        scale=1.0,
    )


def subject_generate() -> Subject:
    def inputs(g):
        made = mixture(g)
        return {"mote": made, "prompts": [question_ids(made.tokenizer, f"w{i} w{i + 1}") for i in range(ROWS)]}

    def reordered(result, order):
        return [result[i] for i in order]

    return Subject(
        inputs=inputs,
        call=lambda mote, prompts: generate.generate(mote, prompts, budget={"analysis": 4, "guidance": 4, "answer": 4}),
        samples=Reordering(size=ROWS, inputs=along(ROWS, {"prompts": 0}).inputs, output=reordered),
    )


def subject_skip() -> Subject:
    steps = torch.tensor([[-1, 0, 0, 1, 1, 2], [-1, -1, 0, 1, 2, 2], [-1, 0, 1, 2, 2, 2]])

    def call(step_ids, mask, settings, generator):
        blocks = skip.draw_blocks(step_ids, 3, settings, generator)
        seen = skip.attention(step_ids, mask, blocks)
        return {"attention": seen, "positions": skip.positions(seen, mask)}

    def padded(given):
        ids, mask = given["step_ids"], given["mask"]
        more = torch.full((len(ids), 2), -1), torch.zeros(len(ids), 2, dtype=mask.dtype)
        return {**given, "step_ids": torch.cat([ids, more[0]], 1), "mask": torch.cat([mask, more[1]], 1)}

    return Subject(
        inputs=lambda g: {
            "step_ids": steps, "mask": torch.ones(3, 6, dtype=torch.long), "settings": skip.Skip(rate=0.7),
            "generator": g,
        },
        call=call,
        pad=padded,
        unpad=lambda output: {
            "attention": output["attention"][:, :, :6, :6], "positions": output["positions"][:, :6],
        },
    )  # fmt: skip


class Scripted:
    """A writer whose judge is a table: the answer of a question at each of its tries."""

    def __init__(self, verdicts):
        self.verdicts, self.tries = verdicts, {}

    def write(self, step, draw, drafts):
        return [Written(f"{step} of {draft.id}, {draw}", 3, False) for draft in drafts]

    def check(self, drafts):
        for draft in drafts:
            self.tries[draft.id] = self.tries.get(draft.id, -1) + 1
        return [Verdict(self.verdicts[draft.id][self.tries[draft.id]], 1.0) for draft in drafts]


def subject_chain_building() -> Subject:
    def call(names, verdicts, threshold):
        drafts = [Draft(name, f"question {name}") for name in names]
        chain_building.build_chains(drafts, Scripted(verdicts), threshold=threshold)
        return [vars(draft) for draft in drafts]

    return Subject(
        inputs=lambda g: {
            "names": ["a", "b", "c"], "threshold": 0.5,
            "verdicts": {name: torch.rand(6, generator=g).tolist() for name in "abc"},
        },
        call=call,
        samples=along(3, {"names": 0}, {"": 0}),
    )  # fmt: skip
