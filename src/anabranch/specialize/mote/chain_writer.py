# SPDX-License-Identifier: Apache-2.0
"""The model side of building chains: prompts in batches through transformers' `generate`, words, and the check.

Shapes    : B prompts of up to T tokens, padded to the left; V words of the vocabulary.

Every text has a random stream of its own, named by seed, step, draw and question: one uniform number a token decides
which word of the nucleus it becomes. So neither the batch nor an interruption has a part in what is written.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.data.streams import derived_seed
from anabranch.errors import AnabranchError, UsageError
from anabranch.specialize.mote.chain_building import ANSWER, Draft, Verdict, Written
from anabranch.specialize.mote.chain_prompts import Prompts, fill
from anabranch.specialize.mote.collate import question_ids
from anabranch.specialize.mote.generate import left_padded
from anabranch.specialize.mote.steps import Steps


class ChainWriter:
    """`chain_building.Writer` on a causal language model.

    budget   tokens by step
    poll     called before every token; what it raises ends the work
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Prompts,
        *,
        budget: Mapping[str, int],
        temperature: float = 0.7,
        top_p: float = 0.95,
        seed: int = 0,
        poll: Callable[[], None] = lambda: None,
    ):
        self.model, self.tokenizer, self.prompts, self.budget = model, tokenizer, prompts, budget
        self.temperature, self.top_p, self.seed, self.poll = temperature, top_p, seed, poll
        self.yes, self.no = check_words(tokenizer, prompts)
        self.ends = end_ids(model, tokenizer)
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def write(self, step: str, draw: str, drafts: Sequence[Draft]) -> list[Written]:
        budget = self.budget[step]
        prompts = [self.prompt(template_of(step, draft), draft) for draft in drafts]
        fitting = [i for i, prompt in enumerate(prompts) if self.fits(len(prompt) + budget)]
        texts = [Written("", 0, False)] * len(drafts)
        if fitting:
            seeds = [derived_seed("chain", self.seed, step, draw, json.dumps(drafts[i].id)) for i in fitting]
            rows = self.generate([prompts[i] for i in fitting], budget, seeds)
            for i, row in zip(fitting, rows, strict=True):
                texts[i] = self.read(row)
        return texts

    def check(self, drafts: Sequence[Draft]) -> list[Verdict]:
        """P(yes) / (P(yes) + P(no)) of the next word."""
        prompts = [self.prompt("check", draft) for draft in drafts]
        fitting = [i for i, prompt in enumerate(prompts) if self.fits(len(prompt) + 1)]
        verdicts = [Verdict(0.0, 0.0)] * len(drafts)
        if fitting:
            logs_BV = self.next_logits([prompts[i] for i in fitting]).float().log_softmax(-1).cpu()
            yes_B, no_B = logs_BV[:, self.yes].logsumexp(-1), logs_BV[:, self.no].logsumexp(-1)
            probabilities, masses = (yes_B - no_B).sigmoid().tolist(), (yes_B.exp() + no_B.exp()).tolist()
            for i, probability, mass in zip(fitting, probabilities, masses, strict=True):
                if not 0 <= probability <= 1:
                    raise AnabranchError(
                        "the model's probabilities are no numbers",
                        expected="finite logits",
                        received=probability,
                        hint="look for NaN or infinity in its weights",
                    )
                verdicts[i] = Verdict(round(probability, 6), round(mass, 6))
        return verdicts

    def longest(self, draft: Draft) -> int:
        """Tokens that the context has to have room for, if every step uses its budget up."""
        blank = Draft(draft.id, draft.question, dict.fromkeys(Steps().names, ""))
        read = {
            "direct": (ANSWER,),
            "analysis": ("analysis",),
            "guidance": ("analysis", "guidance"),
            "answer_after_analysis": ("analysis", ANSWER),
            "answer_after_guidance": ("analysis", "guidance", ANSWER),
            "check": (ANSWER,),
        }
        return 1 + max(
            len(self.prompt(name, blank)) + sum(self.budget[step] for step in steps) for name, steps in read.items()
        )

    def fits(self, length: int) -> bool:
        return self.context is None or length <= self.context

    def prompt(self, template: str, draft: Draft) -> list[int]:
        turns = draft.question
        turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else list(turns)
        values = {"question": str(turns[-1]["content"]), **draft.texts}
        turns[-1] = {**turns[-1], "content": fill(getattr(self.prompts, template), values)}
        return question_ids(self.tokenizer, turns)

    def read(self, tokens: Sequence[int]) -> Written:
        length = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        text = without_step_tokens(self.tokenizer.decode(tokens[:length], skip_special_tokens=True))
        return Written(text.strip(), length, length == len(tokens))

    def generate(self, prompts: Sequence[Sequence[int]], budget: int, seeds: Sequence[int]) -> list[list[int]]:
        length = max(map(len, prompts))
        uniform_BT = torch.stack([torch.rand(budget, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

        def choose(input_ids: Tensor, scores_BV: Tensor) -> Tensor:
            self.poll()
            if not self.temperature:
                return scores_BV
            draws_B = uniform_BT[:, input_ids.shape[1] - length].to(scores_BV.device)
            chosen_B = nucleus_choice(scores_BV, draws_B, self.temperature, self.top_p)
            return torch.full_like(scores_BV, -torch.inf).scatter(1, chosen_B[:, None], 0.0)

        rows: list[list[int]] = self.run(prompts, budget, logits_processor=[choose])[:, length:].tolist()
        return rows

    def next_logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(B, V)."""
        self.poll()
        logits: Tensor = self.run(prompts, 1, return_dict_in_generate=True, output_logits=True).logits[0]
        return logits

    @torch.no_grad()
    def run(self, prompts: Sequence[Sequence[int]], budget: int, **options: Any) -> Any:
        from transformers import GenerationConfig

        pad = 0 if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        ids, valid = left_padded(prompts, pad)
        device = self.model.device
        own = self.model.generation_config
        # what a checkpoint says about sampling would be mixed into ours, penalties and forced words included
        self.model.generation_config = GenerationConfig(eos_token_id=sorted(self.ends) or None, pad_token_id=pad)
        try:
            return self.model.generate(
                input_ids=ids.to(device), attention_mask=valid.to(device), max_new_tokens=budget,
                do_sample=False, use_cache=True, **options,
            )  # fmt: skip
        finally:
            self.model.generation_config = own


def nucleus_choice(scores_BV: Tensor, draws_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """(B,): the word at which the cumulated probability of the nucleus, likeliest first, exceeds draw * its total."""
    probs_BV, order_BV = (scores_BV.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    sums_BV = probs_BV.cumsum(-1)
    size_B1 = (sums_BV - probs_BV < top_p).sum(-1, keepdim=True)
    total_B1 = sums_BV.gather(1, size_B1 - 1)
    place_B1 = torch.searchsorted(sums_BV, draws_B[:, None] * total_B1, right=True)
    return order_BV.gather(1, torch.minimum(place_B1, size_B1 - 1))[:, 0]


def template_of(step: str, draft: Draft) -> str:
    if step != ANSWER:
        return step
    return next((f"answer_after_{note}" for note in ("guidance", "analysis") if note in draft.texts), "direct")


def check_words(tokenizer: Any, prompts: Prompts) -> tuple[list[int], list[int]]:
    """Ids that an answer of the check begins with, of yes and of no.

    Raises:
        UsageError: the tokenizer does not know one of the words, or both begin with the same token.
    """
    yes, no = (first_ids(tokenizer, word.strip()) for word in (prompts.yes, prompts.no))
    if not yes - no or not no - yes:
        raise UsageError(
            "this tokenizer cannot tell the words of the check apart by their first token",
            expected="two words that it knows and that begin differently",
            received=f"{prompts.yes!r} and {prompts.no!r}",
            hint='--prompts-file with other words, such as {"yes": "safe", "no": "harmful"}',
        )
    return sorted(yes - no), sorted(no - yes)


def first_ids(tokenizer: Any, word: str) -> set[int]:
    """Of spellings that are one token; of all spellings where none is."""
    spellings = [space + spelt for spelt in (word, word.capitalize()) for space in ("", " ")]
    found = [tokenizer(spelling, add_special_tokens=False).input_ids for spelling in spellings]
    known = [ids for ids in found if ids and tokenizer.unk_token_id not in ids]
    return {ids[0] for ids in known if len(ids) == 1} or {ids[0] for ids in known}


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    told = model.generation_config.eos_token_id
    ids = told if isinstance(told, list) else [told]
    return {token for token in (*ids, tokenizer.eos_token_id) if token is not None}


def without_step_tokens(text: str) -> str:
    """They would be read as the borders of steps in training."""
    while found := [token for token in Steps().tokens if token in text]:
        text = text.replace(found[0], "")
    return text
