# SPDX-License-Identifier: Apache-2.0
"""SCMoE: the next token from the contrast of the model's own routing with a weaker one of experts that it passes over.

Paper     : SCMoE (arXiv 2405.14507).
Equation  : out = (1 + beta) s - beta w;  tokens with s < log(alpha) + max s are barred
            s logits with the model's routing, w with only the experts of given ranks in the router's order
Shapes    : T tokens, N experts, R highest rank, B rows, V vocabulary.
Differs   : The weights of the weak routing keep the ratio that the family gives them and the sum that the token has in
            the strong one: sum 1 where the family normalises, and the same volume where it does not.
Check     : three tokens by hand; beta 0 and a weak routing of ranks 1 to K are greedy decoding; ranks equal a slow
            loop that respects groups and bias (tests/reuse/steer/test_scmoe.py).
Exempt    : off (without contrast it is the model's own generate: tests/reuse/steer/test_scmoe.py)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import AnabranchError, UsageError
from anabranch.models.mixtures.layers import MixtureLayer, Triple, open_layers
from anabranch.models.mixtures.routing import Change, changed


@dataclass(frozen=True, kw_only=True)
class Config:
    ranks: tuple[int, ...] = (2,)
    """Of the weak routing; 1 is the router's first choice."""
    alpha: float = 0.1
    """A token less likely than alpha times the likeliest is never emitted."""
    beta: float = 0.5
    temperature: float = 0.0
    """0 is greedy."""

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1 or len(set(self.ranks)) != len(self.ranks):
            raise ValueError(f"ranks: expected different ranks from 1 on, received {self.ranks}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected at least 0, received {self.temperature}")
        check_contrast(self.alpha, self.beta)


def check_contrast(alpha: float, beta: float) -> None:
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha: expected above 0 and at most 1, received {alpha}")
    if not beta >= 0:
        raise ValueError(f"beta: expected at least 0, received {beta}")


def contrast(strong_logits: Tensor, weak_logits: Tensor, alpha: float = 0.1, beta: float = 0.5) -> Tensor:
    """(1 + beta) s - beta w, minus infinity where s < log(alpha) + max s: (..., V), float32."""
    check_contrast(alpha, beta)
    s, w = strong_logits.float(), weak_logits.float()
    barred = s < math.log(alpha) + s.amax(-1, keepdim=True)
    return (s + beta * (s - w)).masked_fill(barred, -torch.inf)  # in this form w = s gives s to the last bit


# the weak routing


def first_choices(layer: MixtureLayer, router_logits: Tensor, num: int) -> Triple:
    """What the router would do if it sent every token to `num` experts: groups, bias and weights are the family's."""
    scorer = layer.scorer(router_logits.dtype)
    scorer.top_k = num  # type: ignore[assignment]
    return Triple(*scorer(router_logits))


def by_rank(layer: MixtureLayer, router_logits: Tensor, num: int) -> Tensor:
    """The experts of ranks 1 to `num`: (T, N) to (T, R).

    A router does not say in which order it chose, so rank r is what r choices hold and r - 1 do not.
    """
    ranks, before_TN = [], torch.zeros_like(router_logits, dtype=torch.bool)
    for r in range(1, num + 1):
        chosen_TN = torch.zeros_like(before_TN).scatter(
            1, first_choices(layer, router_logits, r).selected_experts, True
        )
        ranks.append((chosen_TN & ~before_TN).int().argmax(-1))
        before_TN = chosen_TN
    return torch.stack(ranks, 1)


def weak_routing(ranks: Sequence[int]) -> Change:
    """Only the experts of these ranks, with the token's own sum of weights."""
    columns, num = torch.tensor(sorted(ranks)) - 1, max(ranks)

    def change(layer: MixtureLayer, triple: Triple) -> Triple:
        _, weights_TR, chosen_TR = first_choices(layer, triple.router_logits, num)
        weights_TN = torch.zeros_like(triple.router_logits, dtype=torch.float32).scatter(
            1, chosen_TR, weights_TR.float()
        )
        selected_TK = by_rank(layer, triple.router_logits, num)[:, columns.to(chosen_TR.device)]
        weights_TK = weights_TN.gather(1, selected_TK)
        sum_T1 = weights_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        weights_TK = weights_TK / sum_T1 * triple.routing_weights.float().sum(-1, keepdim=True)
        return Triple(triple.router_logits, weights_TK.to(triple.routing_weights.dtype), selected_TK)

    return change


def check_ranks(layers: Sequence[MixtureLayer], ranks: Sequence[int]) -> None:
    for layer in layers:
        groups, size = layer.num_groups, layer.num_experts // layer.num_groups
        most = layer.num_experts if groups == 1 else size * int(layer.router.topk_group)  # type: ignore[arg-type]
        if max(ranks) > most:
            raise UsageError(
                f"{layer.name} has no expert of rank {max(ranks)}", expected=f"at most {most}", received=max(ranks)
            )
        weight: Tensor = layer.router.weight  # type: ignore[assignment]
        logits_1N = weight.new_zeros(1, layer.num_experts)
        if any(first_choices(layer, logits_1N, r).selected_experts.shape[1] != r for r in {1, max(ranks)}):
            raise UsageError(
                f"{layer.name}: its router chooses {layer.top_k} experts and no other number",
                expected="a family whose experts can be ranked", received=type(layer.router).__name__,
            )  # fmt: skip


# decoding


@torch.no_grad()
def generate(
    model: Any, input_ids: Tensor, config: Config, *, max_new_tokens: int, attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """(B, S) to (B, S + new); a row that has ended goes on with the padding token.

    attention_mask      (B, S), 0 for padding, which has to come first
    generator           for a temperature above 0

    Raises:
        UsageError: padding behind the prompt, ranks that the routers do not have, or sampling without a generator.
    """
    layers = open_layers(model)
    check_ranks(layers, config.ranks)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
    if not bool((mask[:, -1] == 1).all()):
        raise UsageError("padding stands behind the prompt", expected="padding before the prompt", hint="padding left")
    if config.temperature > 0 and generator is None:
        raise UsageError("sampling needs a generator", expected="torch.Generator", hint="or temperature 0")
    ends, pad = end_tokens(model)
    ends_E = torch.tensor(ends, dtype=torch.int64, device=input_ids.device)
    strong, weak, new = Pass(model), Pass(model), input_ids
    done_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for _ in range(max_new_tokens):
        strong_BV = strong.step(new, mask)
        with changed(layers, weak_routing(config.ranks)):
            weak_BV = weak.step(new, mask)
        next_B = draw(contrast(strong_BV, weak_BV, config.alpha, config.beta), config.temperature, generator)
        new = next_B.masked_fill(done_B, pad)[:, None]
        done_B = done_B | torch.isin(new[:, 0], ends_E)
        input_ids, mask = torch.cat((input_ids, new), 1), torch.cat((mask, torch.ones_like(new)), 1)
        if bool(done_B.all()):
            break
    return input_ids


class Pass:
    """One routing's forward passes and its own cache: keys and values of the weak one are of its hidden states."""

    def __init__(self, model: Any):
        self.model, self.cache = model, None

    def step(self, new: Tensor, mask: Tensor) -> Tensor:
        """Logits after the last token: (B, V)."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        out = self.model(
            input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        self.cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if bool((logits.isnan() | logits.isposinf()).any()):  # the highest of them would be a word all the same
        raise AnabranchError("the model's scores are no numbers", expected="finite weights", hint="a wider precision")
    if temperature == 0:
        return logits.argmax(-1)
    probs_BV = (logits / temperature).softmax(-1)
    return torch.multinomial(probs_BV, 1, generator=generator)[:, 0]


def end_tokens(model: Any) -> tuple[list[int], int]:
    """The ids that end a text, and what is put after them."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    pad = model.generation_config.pad_token_id
    return ends, pad if pad is not None else (ends[0] if ends else 0)
