# SPDX-License-Identifier: Apache-2.0
"""Skipping steps in training: later steps are kept from reading earlier ones, so that they work without them.

Paper     : MoTE (ACL 2025, arXiv 2405.00557): masks in attention in place of extra data sets; rate and granularity of
            the masks are not given.
Equation  : pairwise    m(t, s) ~ Bernoulli(rate) for every pair s before t: no token of t attends to a token of s
            transitive  with chance `rate` a row hides a set of steps, drawn evenly among those before its last one,
                        from all later steps: the same as leaving their tokens out
Shapes    : B rows of T tokens; step ids (B, T) with QUESTION; mask (B, 1, T, T) bool, True where attention may go.
Differs   : pairwise leaks: what t may not read in s it still reads in a step between them that did. Hence transitive is
            the default. One draw a row, the same in all layers and heads.
Check     : a hidden step is a deleted one (tests/specialize/mote/test_skip.py)
Exempt    : samples (what a row hides is drawn by its place)
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anabranch.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Skip:
    mode: Literal["none", "pairwise", "transitive"] = "transitive"
    rate: float = 0.5
    reposition: bool = True
    """Positions as if the hidden steps were not there; in transitive mode alone, where every later step agrees."""

    def __post_init__(self):
        if self.mode not in ("none", "pairwise", "transitive"):
            raise UsageError(f"skip mode {self.mode!r}", expected="none, pairwise or transitive")
        if not 0 <= self.rate <= 1:
            raise UsageError("a rate is a chance", expected="a number from 0 to 1", received=self.rate)


def draw_blocks(step_ids: Tensor, num_steps: int, skip: Skip, generator: torch.Generator) -> Tensor:
    """(B, S, S) bool: whether step t (rows) may not read step s (columns)."""
    blocks = torch.zeros(len(step_ids), num_steps, num_steps, dtype=torch.bool)
    below = torch.ones(num_steps, num_steps, dtype=torch.bool).tril(-1)
    if skip.mode == "pairwise":
        return (torch.rand(blocks.shape, generator=generator) < skip.rate) & below
    if skip.mode == "transitive":
        for row, ids in enumerate(step_ids):
            present = ids.unique()
            earlier = present[present >= 0][:-1]
            hides = torch.rand((), generator=generator) < skip.rate
            if len(earlier) and hides:
                which = int(torch.randint(1, 2 ** len(earlier), (), generator=generator))
                hidden = [int(step) for place, step in enumerate(earlier) if which >> place & 1]
                blocks[row][:, hidden] = True
        blocks &= below
    return blocks


def attention(step_ids: Tensor, valid: Tensor, blocks: Tensor) -> Tensor:
    """(B, 1, T, T) bool: causal, nothing in padding, no blocked step; a token always sees itself."""
    length = step_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    known = step_ids.clamp(min=0)
    inside = (step_ids[:, :, None] >= 0) & (step_ids[:, None, :] >= 0)
    rows = torch.arange(len(step_ids))[:, None, None]
    blocked = blocks[rows, known[:, :, None], known[:, None, :]] & inside
    mask = causal & valid[:, None, :].bool() & ~blocked
    mask |= torch.eye(length, dtype=torch.bool)
    return mask[:, None]


def positions(mask: Tensor, valid: Tensor) -> Tensor:
    """(B, T): how many tokens each one sees before itself: its place where what it does not see is left out."""
    seen = (mask[:, 0] & valid[:, None, :].bool()).sum(-1) - 1
    return seen.clamp(min=0) * valid.long()


def check_attention(name: str | None) -> None:
    """
    Raises:
        UsageError: an attention that cannot take a mask of its own for every row.
    """
    if name not in ("sdpa", "eager"):
        raise UsageError(
            "this attention cannot keep one step from reading another",
            expected="sdpa or eager",
            received=name,
            hint="attn_implementation='sdpa', or skip mode none",
        )
