# SPDX-License-Identifier: Apache-2.0
"""A mixture of step experts behind transformers' own interface: for harnesses that ask for a causal language model.

generate    walks the steps and returns the prompt with the answer after it; the model's notes are left out
forward     (B, T) ids to logits: a token's step is that of the last start token in its row, before any the question's

The object is the base model itself, of a class that knows about steps; nothing that calls it has to.
"""

from collections.abc import Mapping
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.mixture.context import Context, route
from anabranch.specialize.mote.generate import ANSWER_BUDGET, BUDGET, LegalSteps, pad_of
from anabranch.specialize.mote.mote import MoTE
from anabranch.specialize.mote.steps import Budget, chain_of, ids_of_tokens

NOT_TOLD = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "streamer")
"""Of every token that is generated, while the answer's alone are handed out."""


def as_model(mote: MoTE, *, mode: str = "adaptive", budget: Mapping[str, int] | None = None) -> Any:
    """The mixture's language model, to be used in the mixture's place.

    mode      which steps are walked, see `generate`
    budget    tokens of the steps before the answer; the answer's is what a call asks for
    """
    steps, base = mote.settings.steps, mote.model.get_base_model()
    chain_of(mode, steps)
    limits = {name: BUDGET.get(name, ANSWER_BUDGET) for name in steps.names} | dict(budget or {})
    for name in limits:
        steps.index(name)
    Budget(of=limits)
    if "walk" not in vars(base):  # else in another mode than before
        base.__class__ = stepping(type(base))
    vars(base)["walk"] = Walk(mote.eval(), mode, limits)
    return base


class Walk:
    """What the model has to know of its steps. No module: the mixture holds the model, not the other way round."""

    def __init__(self, mote: MoTE, mode: str, limits: Mapping[str, int]):
        self.mote, self.chain, self.limits = mote, chain_of(mode, mote.settings.steps), dict(limits)
        self.prompt_length = 0
        """While it generates: what stands in the prompt is question, whatever it looks like."""

    def steps(self, input_ids: Tensor) -> Tensor:
        return ids_of_tokens(input_ids, self.mote.tokens, self.prompt_length)

    def answers(self, rows: Tensor, length: int) -> Tensor:
        """The prompts, each with what was said as the answer; padded on the right."""
        known, pad = self.mote.tokens, pad_of(self.mote.tokenizer)
        found = []
        for row in rows[:, length:].tolist():
            start = row.index(known.starts[-1]) + 1 if known.starts[-1] in row else len(row)
            said = row[start:]
            found.append(said[: said.index(known.ends[-1])] if known.ends[-1] in said else said)
        longest = max(map(len, found))
        end = self.mote.tokenizer.eos_token_id
        tail = rows.new_full((len(rows), longest + 1), pad)
        for number, said in enumerate(found):
            tail[number, : len(said)] = rows.new_tensor(said)
            tail[number, len(said)] = pad if end is None else end
        return torch.cat([rows[:, :length], tail], dim=1)


class OnAnswers:
    """Stopping criteria that see the answer alone: a stop word in the notes is none."""

    def __init__(self, criteria: Any, walk: Walk):
        self.criteria, self.walk = criteria, walk

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        known = self.walk.mote.tokens
        answering = self.walk.steps(input_ids) == len(known.steps) - 1
        told: Tensor = self.criteria(torch.where(answering, input_ids, known.starts[-1]), scores, **options)
        return told


class Stepping:
    walk: Walk

    def forward(
        self, input_ids: Tensor | None = None, *args: Any, step_ids: Tensor | None = None, **options: Any
    ) -> Any:
        if input_ids is None:
            raise UsageError("steps are known by their tokens", expected="input_ids", received="none")
        cached = options.get("past_key_values")
        if step_ids is None and cached is not None and cached.get_seq_length():
            raise UsageError(
                "the steps of these tokens are not known: what was before them is in a cache",
                expected="whole rows, or generate",
            )  # fmt: skip
        mote = self.walk.mote
        known = mote.context_ids(input_ids, self.walk.steps(input_ids) if step_ids is None else step_ids)
        with route(mote.model, Context(ids=known)):
            return super().forward(input_ids, *args, **options)  # type: ignore[misc]

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        return inputs | {"step_ids": self.walk.steps(input_ids)[:, -inputs["input_ids"].shape[1] :]}

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, logits_processor: Any = (),
        stopping_criteria: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        """As transformers', the chain walked before the answer; max_new_tokens or max_length are of the answer."""
        ids = options.pop("input_ids", None) if inputs is None else inputs
        if ids is None:
            raise UsageError("nothing is asked", expected="input_ids", received="none")
        if wrong := [name for name in NOT_TOLD if options.get(name)]:
            raise UsageError(f"{wrong[0]} is of the whole chain", expected="the answer alone, without it")
        walk, length = self.walk, ids.shape[1]
        limits = walk.limits | {walk.mote.settings.steps.answer: answer_budget(generation_config, options, length)}
        end = walk.mote.tokenizer.eos_token_id
        ends = [walk.mote.tokens.ends[-1], *([] if end is None else [end])]
        rule = LegalSteps(walk.mote.tokens, length, walk.chain, Budget(of=limits), ends[-1])
        walked = walk.mote.settings.steps.names if walk.chain is None else walk.chain
        walk.prompt_length = length
        try:
            out = super().generate(  # type: ignore[misc]
                input_ids=ids, generation_config=generation_config, logits_processor=[*(logits_processor or ()), rule],
                stopping_criteria=[OnAnswers(one, walk) for one in stopping_criteria or ()],
                max_new_tokens=sum(limits[name] + 2 for name in walked), eos_token_id=ends,
                **({"pad_token_id": pad_of(walk.mote.tokenizer)} | options),
            )  # fmt: skip
        finally:
            walk.prompt_length = 0
        if isinstance(out, Tensor):
            return walk.answers(out, length)
        return type(out)(sequences=walk.answers(out.sequences, length))

    def tie_weights(self, *args: Any, **options: Any) -> None:
        """Embedding and head are tied as the mixture has them, the rows of the steps' tokens beside them."""

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        raise UsageError(
            "this model is a mixture of steps, which no single checkpoint holds",
            hint="MoTE.save_pretrained, or anabranch align export",
        )


@cache
def stepping(kind: Any) -> Any:
    """One class for all models of a kind; its forward shows the arguments of the kind's own."""

    @wraps(kind.forward)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        return Stepping.forward(self, *args, **options)

    return type(f"Stepping{kind.__name__}", (Stepping, kind), {"forward": forward, "__module__": __name__})


def answer_budget(generation_config: Any, options: dict[str, Any], length: int) -> int:
    """Tokens that a call has for the answer; taken out of its options."""
    new, whole = options.pop("max_new_tokens", None), options.pop("max_length", None)
    options.pop("eos_token_id", None)  # the end of the answer, and of the text, are the tokenizer's
    if new is None and whole is None and generation_config is not None:
        new, whole = generation_config.max_new_tokens, generation_config.max_length
    if new is not None:
        return int(new)
    return ANSWER_BUDGET if whole is None else max(1, int(whole) - length)
