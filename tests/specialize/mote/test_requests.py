# SPDX-License-Identifier: Apache-2.0
"""A chain walked request by request: the definition as a loop, where it is exact, and what is refused."""

import pytest
import torch

from anabranch.errors import UsageError
from anabranch.specialize.mote.generate import generate
from anabranch.specialize.mote.requests import by_requests
from tests.specialize.mote.test_generate import prompts
from tests.specialize.mote.tiny import tiny

SMALL = {"analysis": 6, "guidance": 4, "answer": 7}


@torch.no_grad()
def slow(motes, prompt, chain):
    """Whole forwards, every token of a request with the expert of its step."""
    tokens = list(prompt)
    for name in chain:
        mote, number = motes[name], motes[name].tokens.steps.index(name)
        known = mote.tokens
        tokens.append(known.starts[number])
        for _ in range(SMALL[name]):
            ids = torch.tensor([tokens])
            scores = mote(ids, torch.full_like(ids, number)).logits[0, -1]
            scores[[token for token in (*known.ids, 38) if token != known.ends[number]]] = -torch.inf
            if int(scores.argmax()) == known.ends[number]:
                break
            tokens.append(int(scores.argmax()))
        tokens.append(known.ends[number])
    return tokens[len(prompt) :]


@pytest.mark.parametrize("mode", ["full", "direct", "guidance,answer"])
def test_every_request_reads_what_is_before_it_with_its_own_expert(mode):
    mote = tiny()
    motes = dict.fromkeys(("analysis", "guidance", "answer"), mote)
    chain = {"full": tuple(motes), "direct": ("answer",)}.get(mode, ("guidance", "answer"))
    found = by_requests(motes, prompts(mote), mode=mode, budget=SMALL)
    for prompt, row in zip(prompts(mote), found, strict=True):
        assert row.tokens == slow(motes, prompt, chain)
        assert tuple(row.texts) == chain


def test_it_is_exact_where_one_adapter_serves_all_steps_and_not_where_each_has_its_own():
    one = tiny(assign="one", shared=False)
    own = tiny()
    same, other = (
        [
            [chain.tokens for chain in told]
            for told in (
                by_requests(dict.fromkeys(("analysis", "guidance", "answer"), mote), prompts(mote), budget=SMALL),
                generate(mote, prompts(mote), mode="full", budget=SMALL),
            )
        ]
        for mote in (one, own)
    )
    assert same[0] == same[1]
    assert other[0] != other[1]


def test_what_cannot_be_asked_for_is_refused():
    mote = tiny()
    with pytest.raises(UsageError, match="chain has to be said"):
        by_requests({"answer": mote}, prompts(mote), mode="adaptive")
    with pytest.raises(UsageError, match="nobody answers for the step 'analysis'"):
        by_requests({"answer": mote}, prompts(mote), mode="full")
