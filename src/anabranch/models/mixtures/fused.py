# SPDX-License-Identifier: Apache-2.0
"""The experts of transformers in one node of autograd, for processors: "anabranch" as experts implementation.

Equation  : y_t = sum_k W_down,e (w_tk act(W_gate_up,e x_t + b_gate_up,e)) + w_tk b_down,e, e the k-th choice of token t
Shapes    : T tokens, D width, N experts, K chosen per token, M width of an expert, G = 2 M gate and up together,
            S = T K choices sorted by expert, B rows of a block.

Tokens are sorted by expert once. Experts run one after another in blocks that stay in the cache: gather, product,
activation, product, sum into the tokens, all in the same two buffers, so that nothing of (S, D) is ever made. The
weight of a choice multiplies the narrow activation, and its gradient is taken there. Forward keeps (S, G) before the
activation and nothing else; backward gathers again. Gradients of stacked weights are written once, in place.

Elsewhere than on a processor, under autocast or torch.compile, and for experts without a gate, with a norm after them,
with parameters of their own or spread over machines, transformers' grouped_mm runs instead: `why_not` says why.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from anabranch.errors import UsageError

NAME = "anabranch"
WEIGHTS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
BLOCK_BYTES = 2 << 20
"""Of a block's gathered tokens: such a buffer and an expert's weights stay in the cache, or nearly."""
STEP = 32
"""Blocks of this many rows or more are filled up to a multiple of it; see `product`."""
Activation = Callable[[Tensor], Tensor]
"""(B, G) to (B, M), each row for itself."""


def experts_forward(experts: Any, hidden_states: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
    """(T, D), (T, K) int64 and (T, K) to (T, D): the signature by which transformers calls an experts implementation.

    Raises:
        UsageError: an expert is chosen that there is not.
    """
    if why_not(experts, hidden_states):
        from transformers.integrations.moe import grouped_mm_experts_forward

        return cast(Tensor, grouped_mm_experts_forward(experts, hidden_states, selected, weights))
    tensors = [getattr(experts, name) for name in WEIGHTS[: 4 if experts.has_bias else 2]]
    given = (hidden_states.contiguous(), weights, *tensors)
    held = Held(plan_of(selected, len(tensors[0]), block_rows(hidden_states)), gate_of(experts), experts.is_transposed)
    if torch.is_grad_enabled() and any(value.requires_grad for value in given):
        return cast(Callable[..., Tensor], FusedExperts.apply)(held, *given)
    with torch.no_grad():
        return run_blocks(held, given)


def why_not(experts: Any, hidden_states: Tensor) -> str | None:
    """Why transformers' grouped_mm runs in place of ours; None where ours runs."""
    if torch.compiler.is_compiling():
        return "torch.compile can't look into a loop whose length depends on the data"
    if not experts.has_gate:
        return "the experts have no gate"
    if experts.has_post_expert_norm:
        return "a norm follows every expert"
    if experts._is_expert_parallel:
        return "the experts are spread over machines"
    own = [
        name for name, _ in experts.named_parameters() if name.partition(".")[0] not in (*WEIGHTS, "parametrizations")
    ]
    if own:
        return f"the experts have parameters of their own: {', '.join(own)}"
    if hidden_states.device.type != "cpu":
        return f"the tokens are on {hidden_states.device.type}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the precision of every product"
    if hidden_states.dtype != experts.gate_up_proj.dtype:
        return f"the tokens are {hidden_states.dtype}, the experts {experts.gate_up_proj.dtype}"
    return None


# who goes where


class Block(NamedTuple):
    expert: int
    start: int
    stop: int
    """Rows of S."""
    first: bool
    """Whether it is the first of its expert."""

    @property
    def rows(self) -> int:
        """With those that fill it up."""
        return filled(self.stop - self.start)


@dataclass(frozen=True, eq=False)
class Plan:
    """The choices of a forward pass, sorted by expert; experts without tokens have no block."""

    order_S: Tensor
    """Choices, counted row by row of (T, K)."""
    tokens_S: Tensor
    blocks: tuple[Block, ...]
    longest: int
    """Rows of the largest block."""

    def sorted_weights(self, weights_TK: Tensor) -> Tensor:
        """(S + STEP, 1): the weight of every choice, and zeros, so that the last block can be filled up too."""
        return pad(weights_TK.reshape(-1)[self.order_S], (0, STEP))[:, None]

    def gather(self, from_TD: Tensor, into_BD: Tensor, block: Block) -> Tensor:
        """(B, D): the block's tokens, filled up with zeros."""
        count = block.stop - block.start
        torch.index_select(from_TD, 0, self.tokens_S[block.start : block.stop], out=into_BD[:count])
        into_BD[count : block.rows].zero_()
        return into_BD[: block.rows]

    def add(self, rows_BD: Tensor, to_TD: Tensor, block: Block) -> None:
        rows = rows_BD[: block.stop - block.start].to(to_TD.dtype)
        to_TD.index_add_(0, self.tokens_S[block.start : block.stop], rows)


@dataclass(frozen=True, eq=False)
class Held:
    """What is no tensor of the graph."""

    plan: Plan
    activation: Activation
    transposed: bool


def filled(rows: int) -> int:
    return rows if rows < STEP else -(-rows // STEP) * STEP


def block_rows(hidden_states: Tensor) -> int:
    rows = BLOCK_BYTES // max(hidden_states.shape[1] * hidden_states.element_size(), 1)
    return max(rows // STEP, 8) * STEP


def plan_of(selected_TK: Tensor, num_experts: int, rows: int) -> Plan:
    choices_S = selected_TK.reshape(-1)
    order_S = choices_S.argsort(stable=True)
    counts = torch.bincount(choices_S, minlength=num_experts).tolist()
    if len(counts) > num_experts:
        raise UsageError(
            "an expert is chosen that there is not", expected=f"0 to {num_experts - 1}", received=len(counts) - 1
        )
    blocks, start = [], 0
    for expert, count in enumerate(counts):
        for first in range(start, start + count, rows):
            blocks.append(Block(expert, first, min(first + rows, start + count), first == start))
        start += count
    longest = max((block.rows for block in blocks), default=0)
    return Plan(order_S, order_S // selected_TK.shape[1], tuple(blocks), longest)


# products


def product(left_BI: Tensor, right_IO: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """(B, O), of float32 by oneDNN, which on some processors does twice the work of the library that torch.mm calls.

    oneDNN prepares itself for every new shape, at the cost of a product: hence few numbers of rows (see STEP).
    """
    if left_BI.dtype == torch.float32 and len(left_BI) >= STEP and has_linear():
        made = torch.ops.mkldnn._linear_pointwise(left_BI, right_IO.T, bias_O, "none", [], "")
        return cast(Tensor, made)
    return left_BI @ right_IO if bias_O is None else torch.addmm(bias_O, left_BI, right_IO)


def has_linear() -> bool:
    return bool(torch.backends.mkldnn.enabled) and compiled_linear()


@cache
def compiled_linear() -> bool:
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and "AVX" in torch.backends.cpu.get_cpu_capability() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def by_expert(stack: Tensor, transposed: bool) -> tuple[Tensor, ...]:
    """Views (I, O) of every expert's matrix, so that rows (B, I) are multiplied from the right."""
    return (stack if transposed else stack.transpose(1, 2)).unbind(0)


def sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


# the node


class FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: Held, *given: Tensor) -> Tensor:
        kept: list[Tensor] = []
        y_TD = run_blocks(held, given, kept.append)
        ctx.held, ctx.num_given = held, len(given)
        ctx.save_for_backward(*given, *kept)
        return y_TD

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # else they would silently be zero
            raise UsageError(
                "the experts have no second derivatives", expected="a backward pass without create_graph",
                received="create_graph=True", hint='model.set_experts_implementation("eager")',
            )  # fmt: skip
        saved = ctx.saved_tensors  # to be read once: checkpointing makes them anew each time
        given, kept = saved[: ctx.num_given], saved[ctx.num_given :]
        work = Backward(ctx.held, given, dy_TD.contiguous(), ctx.needs_input_grad[1:])
        for block, h_BG in zip(ctx.held.plan.blocks, kept, strict=True):
            work.block(block, h_BG)
        return None, *work.gradients()


def run_blocks(held: Held, given: Sequence[Tensor], keep: Callable[[Tensor], None] | None = None) -> Tensor:
    x_TD, weights_TK, gate_up, down, *biases = given
    plan, weights_S1 = held.plan, held.plan.sorted_weights(weights_TK)
    ups, downs = by_expert(gate_up, held.transposed), by_expert(down, held.transposed)
    rows_BD = x_TD.new_empty(plan.longest, x_TD.shape[1])
    y_TD = torch.zeros_like(x_TD, dtype=sum_type(x_TD.dtype))
    for block in plan.blocks:
        e, w_B1 = block.expert, weights_S1[block.start : block.start + block.rows]
        h_BG = product(plan.gather(x_TD, rows_BD, block), ups[e], biases[0][e] if biases else None)
        if keep is not None:
            keep(h_BG)
        y_BD = product((held.activation(h_BG) * w_B1).to(x_TD.dtype), downs[e])
        if biases:
            y_BD.addr_(w_B1[:, 0].to(y_BD.dtype), biases[1][e])
        plan.add(y_BD, y_TD, block)
    return y_TD.to(x_TD.dtype)


class Backward:
    """The gradients of a pass, filled block by block."""

    def __init__(self, held: Held, given: Sequence[Tensor], dy_TD: Tensor, needs: Sequence[bool]):
        x_TD, weights_TK, *stacks = given
        self.held, self.x_TD, self.dy_TD, self.shape, self.biases = held, x_TD, dy_TD, weights_TK.shape, stacks[2:]
        self.weights_S1 = held.plan.sorted_weights(weights_TK)
        self.rows_BD = x_TD.new_empty(held.plan.longest, x_TD.shape[1])
        self.ups, self.downs = (by_expert(stack, held.transposed) for stack in stacks[:2])
        self.dx_TD = torch.zeros_like(x_TD, dtype=sum_type(x_TD.dtype)) if needs[0] else None
        self.dweights_S = torch.empty_like(self.weights_S1[:-STEP, 0]) if needs[1] else None
        self.stacks = [torch.empty_like(stack) if need else None for stack, need in zip(stacks, needs[2:], strict=True)]
        self.stacks += [None] * (4 - len(self.stacks))
        without = sorted(set(range(len(stacks[0]))) - {block.expert for block in held.plan.blocks})
        for stack in self.stacks:
            if stack is not None and without:
                stack[without] = 0

    def block(self, block: Block, h_BG: Tensor) -> None:
        plan, e, count = self.held.plan, block.expert, block.stop - block.start
        dgate_up, ddown, dgate_up_bias, ddown_bias = self.stacks
        w_B1 = self.weights_S1[block.start : block.start + block.rows]
        dy_BD = plan.gather(self.dy_TD, self.rows_BD, block)
        a_BM, pull = with_gradient(self.held.activation, h_BG)
        da_BM = product(dy_BD, self.downs[e].T)
        if self.dweights_S is not None:
            dweights_B = (da_BM * a_BM).sum(-1)
            if self.biases:
                dweights_B += dy_BD @ self.biases[1][e]
            self.dweights_S[block.start : block.stop] = dweights_B[:count]
        if ddown is not None:
            self.add_product(ddown[e], (a_BM * w_B1).to(dy_BD.dtype), dy_BD, block)
        if ddown_bias is not None:
            add(ddown_bias[e], (w_B1.T.to(dy_BD.dtype) @ dy_BD)[0], block)
        if self.dx_TD is None and dgate_up is None and dgate_up_bias is None:
            return
        dh_BG = pull((da_BM * w_B1).to(dy_BD.dtype))
        if dgate_up_bias is not None:
            add(dgate_up_bias[e], dh_BG.sum(0), block)
        if self.dx_TD is not None:
            plan.add(product(dh_BG, self.ups[e].T), self.dx_TD, block)
        if dgate_up is not None:
            self.add_product(dgate_up[e], plan.gather(self.x_TD, self.rows_BD, block), dh_BG, block)

    def add_product(self, matrix: Tensor, left_BI: Tensor, right_BO: Tensor, block: Block) -> None:
        """left^T right, as the matrix is stored."""
        pair = (left_BI, right_BO) if self.held.transposed else (right_BO, left_BI)
        add(matrix, product(pair[0].T, pair[1]), block)

    def gradients(self) -> tuple[Tensor | None, ...]:
        dweights_TK = None
        if self.dweights_S is not None:
            dweights_TK = torch.empty_like(self.dweights_S)
            dweights_TK[self.held.plan.order_S] = self.dweights_S
            dweights_TK = dweights_TK.view(self.shape)
        dx_TD = None if self.dx_TD is None else self.dx_TD.to(self.x_TD.dtype)
        return dx_TD, dweights_TK, *self.stacks[: 4 if self.biases else 2]


def add(to: Tensor, value: Tensor, block: Block) -> None:
    """The first block of an expert takes the place of what was never written."""
    to.copy_(value) if block.first else to.add_(value)


def with_gradient(activation: Activation, h_BG: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The activation, and what takes a gradient through it."""
    with torch.enable_grad():
        leaf = h_BG.detach().requires_grad_()
        a_BM = activation(leaf)
    return a_BM.detach(), lambda da_BM: torch.autograd.grad(a_BM, leaf, da_BM)[0]


def gate_of(experts: Any) -> Activation:
    return cast(Activation, experts._apply_gate)


def register() -> None:
    """Tells transformers the name; a second time changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
