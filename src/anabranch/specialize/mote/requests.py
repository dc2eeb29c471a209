# SPDX-License-Identifier: Apache-2.0
"""A chain walked request by request: what an engine makes of it that knows one adapter a request.

Equation  : step s is generated with the experts of s on every token before it, the question and earlier steps included
Differs   : from `generate`, where keys and values of earlier steps stay those of their own experts. Exact for a mixture
            of one step and for separate adapters; otherwise an approximation, whose gap is to be measured.
Check     : the loop over whole forwards; one adapter for all steps is `generate` in full mode
            (tests/specialize/mote/test_requests.py).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.mixture.context import Context, route
from anabranch.specialize.mote.generate import ANSWER_BUDGET, BUDGET, Chain, left_padded, pad_of, read_chain, sampling
from anabranch.specialize.mote.mote import MoTE
from anabranch.specialize.mote.steps import Budget, StepTokens, chain_of


class OwnEnd:
    """Logits processor: within a step, of all tokens of steps only its own end may come."""

    def __init__(self, known: StepTokens, step: int, end_id: int | None):
        own = known.ends[step]
        self.others = [token for token in (*known.ids, end_id) if token not in (own, None)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.others] = -torch.inf
        return scores


@torch.no_grad()
def by_requests(
    motes: Mapping[str, MoTE],
    prompts: Sequence[Sequence[int]],
    *,
    mode: str = "full",
    budget: Mapping[str, int] | None = None,
) -> list[Chain]:
    """Greedy chains, each step by its own model in `motes`: the same mixture for every step, or separate ones.

    Raises:
        UsageError: mode adaptive (who would choose?), or a step without a model.
    """
    first = next(iter(motes.values()))
    known, tokenizer = first.tokens, first.tokenizer
    chain = chain_of(mode, known.steps)
    if chain is None:
        raise UsageError("a request is for one step, so the chain has to be said", expected="direct, short, full, ...")
    if missing := [name for name in chain if name not in motes]:
        raise UsageError(f"nobody answers for the step {missing[0]!r}", expected=", ".join(chain))
    limits = Budget(of={name: BUDGET.get(name, ANSWER_BUDGET) for name in known.steps.names} | dict(budget or {})).of
    written: list[list[int]] = [[] for _ in prompts]
    for name in chain:
        number = known.steps.index(name)
        so_far = [[*prompt, *row, known.starts[number]] for prompt, row in zip(prompts, written, strict=True)]
        for row, text in zip(written, step_of(motes[name], so_far, number, limits[name]), strict=True):
            row += [known.starts[number], *text, known.ends[number]]
    return [read_chain(row, known, tokenizer, limits) for row in written]


def step_of(mote: MoTE, prompts: Sequence[Sequence[int]], step: int, budget: int) -> list[list[int]]:
    """What follows each prompt up to the end of the step, the end left out."""
    known, pad = mote.tokens, pad_of(mote.tokenizer)
    ids, valid = left_padded(prompts, pad)
    device = next(mote.parameters()).device
    expert = torch.full((len(prompts),), step if mote.settings.assign == "step" else 0, device=device)
    with route(mote.model, Context(ids={"step": expert})):
        out = mote.model.get_base_model().generate(
            input_ids=ids.to(device), attention_mask=valid.to(device), max_new_tokens=budget, pad_token_id=pad,
            eos_token_id=[known.ends[step]], **sampling(0.0, 1.0),
            logits_processor=[OwnEnd(known, step, mote.tokenizer.eos_token_id)],
        )  # fmt: skip
    rows = out[:, ids.shape[1] :].tolist()
    return [row[: row.index(known.ends[step])] if known.ends[step] in row else row for row in rows]
