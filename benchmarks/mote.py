# SPDX-License-Identifier: Apache-2.0
"""Step experts against one LoRA: a layer, a training step, decoding.

Layer: a linear of 1024 to 1024 with experts of rank 8, 8 rows of 256 tokens in segments of 32, forward and backward,
float32. The peer is PEFT's layer with one adapter of the same rank; beside it PEFT's own way to mix adapters
(`adapter_names`, whole rows, forward only, each segment fed as a row) and PEFT with all four adapters on every token.
Model: a Llama of 8 layers, width 256, vocabulary 8,192; a training step of 8 x 128 tokens against one LoRA of twice the
rank, which is what acts on a token; decoding of one token with a cache against one adapter. The steps' tokens are
trained in both. Two threads; ratios to the reference of the same round, median over rounds.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch

from anabranch.mixture import Context, route
from anabranch.mixture.lora import Plan, route_lora
from benchmarks._timing import compare

warnings.simplefilter("ignore", FutureWarning)
THREADS, WIDTH, RANK, ROWS, LENGTH, SEGMENT = 2, 1024, 8, 8, 256, 32
BARS = {
    "layer, 3 + 1 experts by segment": 1.08,
    "layer, 16 experts by token": 1.2,
    "training step": 1.2,
    "decoding": 1.1,
}
NAMES = ("analysis", "guidance", "answer", "shared")


def lora_linear(names: tuple[str, ...], r: int) -> torch.nn.Module:
    """A linear in a model of its own, with adapters of these names."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["layer"], init_lora_weights=False)
    inner = torch.nn.ModuleDict({"layer": torch.nn.Linear(WIDTH, WIDTH)})
    model = get_peft_model(inner, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(names))
    return model


def layer_of(model: Any) -> Any:
    return model.base_model.model["layer"]


def forward_backward(layer: Any, x: torch.Tensor) -> None:
    layer(x).square().mean().backward()


def routed(model: Any, plan: Plan, ids: torch.Tensor, x: torch.Tensor) -> Callable[[], None]:
    route_lora(model, plan)

    def run() -> None:
        with route(model, Context(ids={"step": ids})):
            forward_backward(layer_of(model), x)

    return run


def layers() -> dict[str, Callable[[], object]]:
    x = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    segments = (torch.arange(LENGTH) // SEGMENT % 3).expand(ROWS, LENGTH)
    tokens = torch.randint(16, (ROWS, LENGTH))
    many = tuple(f"expert_{i}" for i in range(16))
    one, mixed, everyone = lora_linear(("only",), RANK), lora_linear(NAMES, RANK), lora_linear(NAMES, RANK)
    rows, row_names = x.detach().reshape(-1, SEGMENT, WIDTH), [NAMES[i % 3] for i in range(ROWS * LENGTH // SEGMENT)]

    def adapter_names() -> None:
        with torch.no_grad():
            layer_of(mixed)(rows, adapter_names=row_names)

    def forward_alone() -> None:
        with torch.no_grad():
            layer_of(one)(x)

    cases: dict[str, Callable[[], object]] = {
        "one LoRA": lambda: forward_backward(layer_of(one), x),
        "layer, 3 + 1 experts by segment": routed(
            lora_linear(NAMES, RANK), Plan(experts=NAMES[:3], universal="shared"), segments, x
        ),
        "the same, a product an expert": routed(
            lora_linear(NAMES, RANK), Plan(experts=NAMES[:3], universal="shared", path="segment"), segments, x
        ),
        "layer, 16 experts by token": routed(lora_linear(many, RANK), Plan(experts=many, universal=None), tokens, x),
        "16 by token, a product an expert": routed(
            lora_linear(many, RANK), Plan(experts=many, universal=None, path="segment"), tokens, x
        ),
        "PEFT, four adapters on every token": lambda: forward_backward(layer_of(everyone), x),
        "forward alone: one LoRA": forward_alone,
        "forward alone: PEFT adapter_names, three": adapter_names,
    }
    return cases


def language_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def adapted(r: int, names: tuple[str, ...]) -> Any:
    from peft import LoraConfig, get_peft_model

    tokens = [8186, 8187, 8188, 8189, 8190, 8191]
    settings = {"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    last = LoraConfig(**settings, trainable_token_indices=tokens)
    model = get_peft_model(language_model(), LoraConfig(**settings) if len(names) > 1 else last, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, copy.deepcopy(last) if name == names[-1] else LoraConfig(**settings))
    model.base_model.set_adapter(list(names))
    return model


def mixture(r: int) -> Any:
    from anabranch.mixture.token_rows import light_token_rows

    model = adapted(r, NAMES)
    route_lora(model, Plan(experts=NAMES[:3], universal="shared"))
    light_token_rows(model)
    return model


def steps() -> dict[str, Callable[[], object]]:
    ids = torch.randint(8000, (8, 128))
    where = (torch.arange(128) // 43).clamp(max=2).expand(8, 128)
    plain, mixed = adapted(32, ("only",)), mixture(16)
    optimizers = {id(m): torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], fused=True)
                  for m in (plain, mixed)}  # fmt: skip

    def step(model: Any) -> None:
        optimizer = optimizers[id(model)]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    def mixed_step() -> None:
        with route(mixed, Context(ids={"step": where})):
            step(mixed)

    return {"one LoRA, rank 2r": lambda: step(plain), "training step": mixed_step}


def decoding() -> dict[str, Callable[[], object]]:
    prompt, count = torch.randint(8000, (1, 32)), 24
    plain, mixed = adapted(16, ("only",)), mixture(16)

    @torch.no_grad()
    def decode(model: Any, ids: dict[str, torch.Tensor]) -> None:
        ids["step"] = torch.zeros(1, 32, dtype=torch.long)
        cache = model(input_ids=prompt, use_cache=True).past_key_values
        for place in range(count):
            ids["step"] = torch.full((1, 1), place * 3 // count)
            cache = model(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True).past_key_values

    def decode_mixed() -> None:
        ids: dict[str, torch.Tensor] = {}
        with route(mixed, Context(ids=ids)):
            decode(mixed, ids)

    return {"one adapter": lambda: decode(plain, {}), "decoding": decode_mixed}


def main() -> None:
    torch.set_num_threads(THREADS)
    for cases, reference in ((layers(), "one LoRA"), (steps(), "one LoRA, rank 2r"), (decoding(), "one adapter")):
        for name, ratio in compare(cases, reference, rounds=9).items():
            bar = BARS.get(name)
            told = "" if bar is None else f"   bar {bar} {'met' if ratio.median <= bar else 'missed'}"
            print(f"  {name:<42} {ratio.median:5.2f}   {1e3 * ratio.seconds:7.1f} ms{told}")


if __name__ == "__main__":
    main()
