# SPDX-License-Identifier: Apache-2.0
"""Compressed experts: a token's lesser experts are not run; a vector of each scales the input of those that are.

Paper     : arXiv 2503.00634.
Equation  : main: the k_m slots of highest weight, aux: the rest;  theta_t = sum_aux (g_i / sum_aux g_j) theta_i
            y_t = sum_main g_i E_i(x_t * theta_t), elementwise;  theta_i = 1 before training
Shapes    : T tokens, D width, N experts, K chosen per token, k_m of them run.
Differs   : one vector an expert, at the experts' input; the paper's count of parameters suggests more inside.
            Kept as theta - 1, so that weight decay pulls towards the input as it is. Main weights are not renormalised.
            The vectors are trained with the model frozen, or along with what else requires a gradient.
Check     : theta = 1 is the truncation to k_m; only vectors of chosen aux experts get a gradient; k_m = K changes
            nothing (tests/reuse/merge/test_compressed_experts.py).

The vectors need this module to run: no stock checkpoint holds them.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.models.mixtures.layers import MixtureLayer
from anabranch.models.mixtures.routing import refuse_unseen
from anabranch.swap import swap_file
from anabranch.train.loop import Stream, TrainConfig, TrainResult, train

FORMAT = "anabranch compressed experts 1"


def by_weight(selected_experts: Tensor, routing_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same slots, the highest weight first: not every family sorts them."""
    order_TK = routing_weights.argsort(dim=-1, descending=True, stable=True)
    return selected_experts.gather(1, order_TK), routing_weights.gather(1, order_TK)


def scale(offsets: Tensor, aux_experts: Tensor, aux_weights: Tensor) -> Tensor:
    """theta_t = 1 + sum_aux (g_i / sum_aux g_j) (theta_i - 1), (T, D); 1 where all aux weights are zero."""
    total_T1 = aux_weights.float().sum(-1, keepdim=True)
    share_TA = torch.where(total_T1 > 0, aux_weights.float() / total_T1.clamp(min=1e-30), torch.zeros_like(total_T1))
    return 1 + (share_TA[..., None] * offsets[aux_experts].float()).sum(1)


class CompressedExperts(nn.Module):
    """The vectors of every layer; `with compressed.applied():` around forward passes."""

    def __init__(self, layers: Sequence[MixtureLayer], num_main: int):
        super().__init__()
        if not 1 <= num_main <= layers[0].top_k:
            raise UsageError("so many experts can't be run", expected=f"1 to {layers[0].top_k}", received=num_main)
        self.layers, self.num_main = tuple(layers), num_main
        shapes = [(layer.num_experts, layer.hidden_size) for layer in layers]
        devices = [layer.router.weight.device for layer in layers]
        pairs = zip(shapes, devices, strict=True)
        self.offsets = nn.ParameterList([torch.zeros(shape, device=device) for shape, device in pairs])  # type: ignore[arg-type]

    @contextmanager
    def applied(self) -> Iterator[None]:
        fired: set[str] = set()
        with ExitStack() as stack:
            for layer, offsets in zip(self.layers, self.offsets, strict=True):
                stack.enter_context(self.replaced(layer, offsets, fired))
            yield
        refuse_unseen(self.layers, fired)

    @contextmanager
    def replaced(self, layer: MixtureLayer, offsets: Tensor, fired: set[str]) -> Iterator[None]:
        before_us = vars(layer.experts).get("forward")
        plain = layer.experts.forward

        def forward(hidden_states: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
            fired.add(layer.name)
            if self.num_main < selected.shape[1]:
                k = self.num_main
                selected, weights = by_weight(selected, weights)
                theta_TD = scale(offsets, selected[:, k:], weights[:, k:]).to(hidden_states.dtype)
                hidden_states, selected, weights = hidden_states * theta_TD, selected[:, :k], weights[:, :k]
            routed: Tensor = plain(hidden_states, selected, weights)
            return routed

        layer.experts.forward = forward
        try:
            yield
        finally:
            del layer.experts.forward
            if before_us is not None:
                layer.experts.forward = before_us

    def save(self, file: Path) -> None:
        header = {"layers": [layer.name for layer in self.layers], "num_main": self.num_main}
        tensors = {str(i): value.detach().contiguous() for i, value in enumerate(self.offsets)}
        told = {"format": FORMAT, "header": json.dumps(header)}
        swap_file(lambda unfinished: save_file(tensors, unfinished, told), file)

    @classmethod
    def load(cls, file: Path, layers: Sequence[MixtureLayer]) -> "CompressedExperts":
        from safetensors import SafetensorError

        try:
            with safe_open(file, "pt") as opened:
                header = opened.metadata() or {}
                tensors = [opened.get_tensor(str(i)) for i in range(len(opened.keys()))]
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{file} cannot be read", expected=FORMAT, received=str(error)) from None
        if header.get("format") != FORMAT:
            raise UsageError(f"{file} holds no compressed experts", expected=FORMAT, received=header.get("format"))
        shapes = [(layer.name, (layer.num_experts, layer.hidden_size)) for layer in layers]
        try:
            values = json.loads(header["header"])
            num_main = int(values["num_main"])
            stored = list(zip(values["layers"], (tuple(value.shape) for value in tensors), strict=True))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"{file} is torn", expected="layers and num_main", received=repr(error)) from None
        if shapes != stored:
            raise UsageError(f"{file} is of another model", expected=shapes[:1], received=stored[:1])
        found = cls(layers, num_main)
        with torch.no_grad():
            for mine, value in zip(found.offsets, tensors, strict=True):
                mine.copy_(value)
        return found


class NextToken(nn.Module):
    """Objective: {"input_ids": (B, S), "labels": (B, S), optional, -100 where nothing is learned} -> {"loss": ()}."""

    def __init__(self, model: Any, compressed: CompressedExperts):
        super().__init__()
        self.model, self.compressed = model, compressed

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = batch.get("labels", batch["input_ids"])
        with self.compressed.applied():
            logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
        return {"loss": nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:])}


def fit(
    model: Any, compressed: CompressedExperts, stream: Stream, config: TrainConfig, run: Path | None = None
) -> TrainResult:  # fmt: skip
    """Trains the vectors with the model frozen; to train both, minimise `NextToken` itself."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        return train(NextToken(model, compressed), stream, config, run)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
