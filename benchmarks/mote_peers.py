# SPDX-License-Identifier: Apache-2.0
"""Step experts against PEFT's own mixtures of adapters: `adapter_names` and X-LoRA.

adapter_names: one adapter a row, for inference only, so forward alone; ours receives one id a row. A linear of 1024 to
1024 with 4 and with 16 adapters, 2,048 tokens, and the small model with 16 adapters.
X-LoRA: a Llama of 4 layers, width 256, vocabulary 512, LoRA of rank 8 on all its linears, 8 x 128 tokens; 16 experts
by token and 4 by segments of 32. X-LoRA gates every expert on every token, and runs the model twice: a first pass for
the gates, then the one with them. Both are counted, and its first pass computes the experts too, times zero. Ours
receives the ids; where a gate must find them, the row with "a pass for the ids" adds a pass without experts and a gate.
X-LoRA trains its gates alone unless told otherwise; ours and the plain LoRA train their experts.
Floor: one plain LoRA of the rank that acts on a token. All cases of a table run in the same rounds in random order;
times are medians, ratios are medians over rounds of ratios within a round, with the least and the greatest.
Before timing, ours must equal `adapter_names`, and X-LoRA with gates of 0 and 1, to 1e-5.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anabranch.mixture import Context, route
from anabranch.mixture.lora import Path, Plan, lora_layers, route_lora
from benchmarks._timing import compare
from benchmarks.mote import LENGTH, RANK, ROWS, SEGMENT, THREADS, WIDTH, layer_of, lora_linear

HIDDEN, LAYERS, VOCABULARY, TOKENS = 256, 4, 512, 128
ROUNDS, TOLERANCE, BAR = 9, 1e-5, 4.0
FLOOR, OURS, XLORA = "one LoRA", "ours", "PEFT X-LoRA, both passes"
Cases = dict[str, Callable[[], object]]


def numbered(num_experts: int) -> tuple[str, ...]:
    """X-LoRA knows its adapters by their numbers only."""
    return tuple(str(i) for i in range(num_experts))


def small_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


def with_adapters(names: tuple[str, ...]) -> Any:
    """The same weights whenever the names are as many."""
    from peft import LoraConfig, get_peft_model

    config = partial(LoraConfig, r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(small_model(), config(init_lora_weights=False), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(init_lora_weights=False))
    model.base_model.set_adapter(list(names))
    return model.eval()


def routed(model: Any, path: Path = "dense") -> Any:
    route_lora(model, Plan(experts=tuple(model.peft_config), universal=None, path=path))
    return model


def x_lora(num_experts: int, train_experts: bool = False) -> Any:
    """X-LoRA over the adapters of `with_adapters`, which it loads from folders."""
    from peft import XLoraConfig, get_peft_model

    names = numbered(num_experts)
    with tempfile.TemporaryDirectory() as folder:
        with_adapters(names).save_pretrained(folder, selected_adapters=list(names), save_embedding_layers=False)
        folders = {name: f"{folder}/{name}" for name in names}
        config = XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=HIDDEN, adapters=folders, use_trainable_adapters=train_experts
        )
        return get_peft_model(small_model(), config).eval()


def with_gates(model: Any, gates: Tensor, input_ids: Tensor) -> Any:
    """X-LoRA's second pass with gates (B, N, layers, E) from elsewhere."""

    def inject(module: Any, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**named, "scalings": gates}

    inner = model.base_model.lora_model.model
    hooks = [layer.register_forward_pre_hook(inject, with_kwargs=True) for layer in lora_layers(inner).values()]
    try:
        return inner(input_ids=input_ids)
    finally:
        for hook in hooks:
            hook.remove()


def forward(model: Any, ids: Tensor | None, *args: Any, **named: Any) -> Any:
    """Of a model with experts where there are ids, else of a plain one; the context is new each time."""
    if ids is None:
        return model(*args, **named)
    with route(model, Context(ids={"step": ids})):
        return model(*args, **named)


def step(model: Any, ids: Tensor | None, input_ids: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    forward(model, ids, input_ids=input_ids, labels=input_ids).loss.backward()


@torch.no_grad()
def chosen_ids(model: Any, gate: Tensor, input_ids: Tensor) -> Tensor:
    """What X-LoRA's first pass is for, without the experts that it multiplies by zero."""
    with model.disable_adapter():
        hidden = model(input_ids=input_ids, output_hidden_states=True).hidden_states[-1]
    return (hidden @ gate).argmax(-1)


def without_gradient(run: Callable[[], object]) -> Callable[[], object]:
    return torch.no_grad()(run)


def check_same(told: str, ours: Tensor, theirs: Tensor) -> None:
    difference = (ours - theirs).abs().max().item()
    print(f"  {told}: greatest difference {difference:.1e}, of values up to {theirs.abs().max().item():.1f}")
    if not difference <= TOLERANCE:
        raise SystemExit(f"{told}: expected a difference of at most {TOLERANCE}, received {difference}")


def trained(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def by_row_layer(num_experts: int) -> Cases:
    rows = max(ROWS, num_experts)
    x, ids = torch.randn(rows, ROWS * LENGTH // rows, WIDTH), torch.arange(rows) % num_experts
    names = numbered(num_experts)
    one, theirs = lora_linear(("0",), RANK), lora_linear(names, RANK)
    ours, each = routed(lora_linear(names, RANK)), routed(lora_linear(names, RANK), path="segment")
    adapter_names = [names[i] for i in ids.tolist()]

    def in_context(model: Any) -> Tensor:
        with route(model, Context(ids={"step": ids})):
            return layer_of(model)(x)

    cases: Cases = {
        FLOOR: lambda: layer_of(one)(x),
        OURS: lambda: in_context(ours),
        "ours, a product an expert": lambda: in_context(each),
        "PEFT adapter_names": lambda: layer_of(theirs)(x, adapter_names=adapter_names),
    }
    with torch.no_grad():
        check_same("ours and adapter_names", in_context(ours), layer_of(theirs)(x, adapter_names=adapter_names))
    return {name: without_gradient(run) for name, run in cases.items()}


def by_row_model(num_experts: int) -> Cases:
    input_ids, ids = torch.randint(VOCABULARY, (num_experts, TOKENS)), torch.arange(num_experts)
    names = numbered(num_experts)
    one, theirs = with_adapters(("0",)), with_adapters(names)
    ours, each = routed(with_adapters(names)), routed(with_adapters(names), path="segment")
    adapter_names = [names[i] for i in ids.tolist()]
    cases: Cases = {
        FLOOR: lambda: forward(one, None, input_ids),
        OURS: lambda: forward(ours, ids, input_ids),
        "ours, a product an expert": lambda: forward(each, ids, input_ids),
        "PEFT adapter_names": lambda: theirs(input_ids, adapter_names=adapter_names),
    }
    with torch.no_grad():
        theirs_logits = theirs(input_ids, adapter_names=adapter_names).logits
        check_same("ours and adapter_names", forward(ours, ids, input_ids).logits, theirs_logits)
    return {name: without_gradient(run) for name, run in cases.items()}


class Gated:
    """The models of both X-LoRA tables, and what they are fed."""

    def __init__(self, num_experts: int, ids: Tensor):
        names = numbered(num_experts)
        self.ids, self.input_ids = ids, torch.randint(VOCABULARY, ids.shape)
        self.gate = torch.randn(HIDDEN, num_experts)
        self.one = with_adapters(("0",))
        self.ours, self.each = routed(with_adapters(names)), routed(with_adapters(names), path="segment")
        self.theirs, self.trainable = x_lora(num_experts), x_lora(num_experts, train_experts=True)
        one_hot = torch.nn.functional.one_hot(ids, num_experts).float()
        self.gates = one_hot[:, :, None].expand(-1, -1, len(lora_layers(self.ours)), -1)

    @torch.no_grad()
    def check(self) -> None:
        ours = forward(self.ours, self.ids, self.input_ids).logits
        check_same("ours and X-LoRA with gates of 0 and 1", ours, self.second_pass().logits)
        passes: list[int] = []
        first = next(iter(lora_layers(self.theirs).values()))
        hook = first.base_layer.register_forward_hook(lambda *_: passes.append(1))
        self.theirs(input_ids=self.input_ids)
        hook.remove()
        self.trainable(input_ids=self.input_ids)
        told = ", ".join(f"{trained(model):,}" for model in (self.theirs, self.trainable, self.ours, self.one))
        print(f"  X-LoRA ran its model {len(passes)} times for one forward: both are counted")
        print(f"  numbers that learn in X-LoRA, X-LoRA with experts, ours, one LoRA: {told}")

    def second_pass(self) -> Any:
        return with_gates(self.theirs, self.gates, self.input_ids)

    def forwards(self) -> Cases:
        def after_a_pass() -> object:
            return forward(self.ours, chosen_ids(self.ours, self.gate, self.input_ids), self.input_ids)

        cases: Cases = {
            FLOOR: lambda: forward(self.one, None, self.input_ids),
            OURS: lambda: forward(self.ours, self.ids, self.input_ids),
            "ours, a product an expert": lambda: forward(self.each, self.ids, self.input_ids),
            "ours, and a pass for the ids": after_a_pass,
            XLORA: lambda: self.theirs(input_ids=self.input_ids),
            "its second pass alone": self.second_pass,
        }
        return {name: without_gradient(run) for name, run in cases.items()}

    def steps(self) -> Cases:
        def after_a_pass() -> None:
            step(self.ours, chosen_ids(self.ours, self.gate, self.input_ids), self.input_ids)

        return {
            FLOOR: lambda: step(self.one, None, self.input_ids),
            OURS: lambda: step(self.ours, self.ids, self.input_ids),
            "ours, a product an expert": lambda: step(self.each, self.ids, self.input_ids),
            "ours, and a pass for the ids": after_a_pass,
            XLORA: lambda: step(self.theirs, None, self.input_ids),
            "PEFT X-LoRA, gates and experts learn": lambda: step(self.trainable, None, self.input_ids),
        }


def rounds_of(cases: Cases) -> dict[str, list[float]]:
    """Seconds of every case in every round, for ratios to more than one reference."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}

    def clocked(name: str) -> None:
        start = time.perf_counter()
        cases[name]()
        seconds[name].append(time.perf_counter() - start)

    compare({name: partial(clocked, name) for name in cases}, FLOOR, rounds=ROUNDS)
    return {name: every[-ROUNDS:] for name, every in seconds.items()}


def ratios(own: list[float], reference: list[float]) -> list[float]:
    return sorted(a / b for a, b in zip(own, reference, strict=True))


def told_ratio(values: list[float]) -> str:
    return f"{statistics.median(values):6.2f} ({values[0]:5.2f} - {values[-1]:5.2f})"


def table(title: str, cases: Cases, bar: float | None = None) -> None:
    seconds = rounds_of(cases)
    print(f"  {title + ':':<38}{'ms':>8}   {'to one LoRA':<24} to ours")
    for name, own in seconds.items():
        to_floor, to_ours = ratios(own, seconds[FLOOR]), ratios(own, seconds[OURS])
        milliseconds = 1e3 * statistics.median(own)
        print(f"  {name:<38}{milliseconds:8.1f}  {told_ratio(to_floor):<24} {told_ratio(to_ours)}")
    if bar is not None:
        ratio = statistics.median(ratios(seconds[XLORA], seconds[OURS]))
        print(f"  X-LoRA takes {ratio:.2f} times as long as ours   bar {bar} {'met' if ratio >= bar else 'missed'}")


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", THREADS)))
    torch.manual_seed(0)
    print(f"float32, threads {torch.get_num_threads()}, rank {RANK}; median (least - greatest) of {ROUNDS} rounds")
    for num_experts in (4, 16):
        print(f"\nadapter_names: a linear of {WIDTH}, {num_experts} adapters, one a row")
        table("forward", by_row_layer(num_experts))
    print("\nadapter_names: the small model, 16 adapters, one a row")
    table("forward", by_row_model(16))
    by_token = torch.randint(16, (ROWS, TOKENS))
    by_segment = (torch.arange(TOKENS) // SEGMENT % 4).expand(ROWS, TOKENS)
    for told, num_experts, ids, bar in (("16 by token", 16, by_token, BAR), ("4 by segment", 4, by_segment, None)):
        print(f"\nX-LoRA: the small model, {told}")
        gated = Gated(num_experts, ids)
        gated.check()
        table("forward", gated.forwards(), bar)
        table("forward and backward", gated.steps(), bar)


if __name__ == "__main__":
    main()
