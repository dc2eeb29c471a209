# SPDX-License-Identifier: Apache-2.0
"""What a mixture's routers and experts did on labelled tokens, as sums that merge over batches, shards and machines.

Equation  : sums over the tokens t of a label and fold; z logits, g combine weights, a = 1 where selected, E outputs
              count sum a,  weight sum g,  weight_square sum g^2,  share sum g / sum_j g_j,
              logit sum z,  logit_square sum z^2,  probability sum softmax(z),  document_rate sum_t a / T_document
              norm sum a |E|,  weighted_norm sum g |E|,  share_norm sum (g / sum_j g_j) |E|,  peak max |E|
              turn sum g |E| max(1 - cos(h, h + o), 0)      h stream before the block, o what routing adds to it
Shapes    : D labels, F folds, L layers, N experts, T tokens of a batch, K chosen per token.
Differs   : g / sum_j g_j beside g: weights of families that do not normalise can't be compared as they are.
Check     : every sum equals a slow loop; merged shards equal one pass; padding changes nothing
            (tests/measure/experts/test_statistics.py).

Labels are of tokens: a domain, a class of answers, a marker. Folds are groups of whole documents, so that intervals
come from resampling documents; memory does not grow with the number of tokens.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from anabranch.errors import UsageError, did_you_mean
from anabranch.models.hub.card import front_matter
from anabranch.models.hub.pretrained import Pretrained
from anabranch.models.mixtures.layers import MixtureLayer
from anabranch.models.mixtures.routing import Seen, norm_after, watched
from anabranch.swap import swap_file

ROUTING = ("count", "weight", "weight_square", "share", "logit", "logit_square", "probability", "document_rate")
OUTPUTS = ("norm", "weighted_norm", "share_norm")
RESIDUAL = ("turn",)
MAXIMA = ("peak",)
FORMAT = "anabranch expert statistics 1"
NOTHING = torch.empty(0)
CARD = """\
{head}# Statistics of experts

What the routers and experts of one mixture did on labelled tokens: {layers} layers of {experts} experts, {top_k} chosen
for a token; the model's fingerprint is `{model}`.

| label | tokens |
| --- | --- |
{rows}

Sums: {sums}.

```python
from anabranch.measure.experts.statistics import ExpertStats

stats = ExpertStats.from_pretrained("path/to/this/folder")
```
"""


@dataclass
class ExpertStats(Pretrained):
    """The sums; `stats["count"]` is (D, F, L, N) float64."""

    MARK = "statistics.safetensors"

    labels: tuple[str, ...]
    layers: tuple[str, ...]
    num_experts: int
    top_k: int
    num_folds: int = 10
    model: str = ""
    """Fingerprint of the model that was watched."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0))  # (D, F)
    documents: Tensor = field(default_factory=lambda: torch.zeros(0))  # (D, F)
    pairs: Tensor = field(default_factory=lambda: torch.zeros(0))
    """(D, L, N, N), tokens that selected both; the diagonal is the count."""

    def __post_init__(self) -> None:
        D, F, L, N = len(self.labels), self.num_folds, len(self.layers), self.num_experts
        if not self.tokens.numel():
            self.tokens, self.documents = torch.zeros(D, F).double(), torch.zeros(D, F).double()
            self.pairs = torch.zeros(D, L, N, N).double()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.sums:
            raise UsageError(
                f"the statistics hold no {name!r}", expected=f"one of {', '.join(sorted(self.sums))}", received=name,
                hint="profile again with --outputs" if name in (*OUTPUTS, *RESIDUAL, *MAXIMA)
                else did_you_mean(name, self.sums),
            )  # fmt: skip
        return self.sums[name]

    def of(self, name: str, label: str) -> Tensor:
        """(L, N): one label's sum over all folds."""
        own = finite(self[name][self.index(label)], name, label)
        return own.amax(0) if name in MAXIMA else own.sum(0)

    def num_tokens(self, label: str) -> float:
        return float(finite(self.tokens[self.index(label)], "number of tokens", label).sum())

    def num_documents(self, label: str) -> float:
        return float(finite(self.documents[self.index(label)], "number of documents", label).sum())

    def index(self, label: str) -> int:
        if label not in self.labels:
            raise UsageError(f"the statistics know no {label!r}", hint=did_you_mean(label, self.labels))
        return self.labels.index(label)

    def resampled(self, folds: Sequence[int]) -> "ExpertStats":
        """As if these folds had been read, one of them perhaps several times; co-activation is left as it is."""
        index = torch.tensor(list(folds))
        sums = {name: value[:, index] for name, value in self.sums.items()}
        return ExpertStats(
            self.labels, self.layers, self.num_experts, self.top_k, len(folds), self.model, sums,
            self.tokens[:, index], self.documents[:, index], self.pairs,
        )  # fmt: skip

    def merge(self, other: "ExpertStats") -> Self:
        """Adds what another stream over the same model, labels and folds has seen."""
        mine, theirs = self.header(), other.header()
        if mine != theirs:
            differs = next(name for name in mine if mine[name] != theirs[name])
            raise UsageError(
                f"statistics of another {differs} can't be merged", expected=mine[differs], received=theirs[differs]
            )
        if self.sums and other.sums and set(self.sums) != set(other.sums):
            raise UsageError(
                "statistics that collected other sums can't be merged: a mean would cover a part of the tokens",
                expected=sorted(self.sums), received=sorted(other.sums),
            )  # fmt: skip
        for name, value in other.sums.items():
            self.add(name, value)
        self.tokens, self.documents = self.tokens + other.tokens, self.documents + other.documents
        self.pairs = self.pairs + other.pairs
        return self

    def add(self, name: str, value: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = value.clone()
        elif name in MAXIMA:
            self.sums[name] = torch.maximum(self.sums[name], value)
        else:
            self.sums[name] = self.sums[name] + value

    def header(self) -> dict[str, Any]:
        return {
            "model": self.model, "labels": list(self.labels), "layers": list(self.layers),
            "num_experts": self.num_experts, "top_k": self.top_k, "num_folds": self.num_folds,
        }  # fmt: skip

    def save(self, file: Path, notes: str = "") -> None:
        """One file in one step; `notes` go into its header, see `notes_of`."""
        tensors = {f"sums.{name}": value for name, value in self.sums.items()}
        tensors |= {"tokens": self.tokens, "documents": self.documents, "pairs": self.pairs}
        header = {"format": FORMAT, "header": json.dumps(self.header()), "notes": notes}
        plain = {name: value.contiguous() for name, value in tensors.items()}
        swap_file(lambda unfinished: save_file(plain, unfinished, header), file)

    @classmethod
    def load(cls, file: Path) -> "ExpertStats":
        """Raises UsageError where the file is torn or of another kind."""
        from safetensors import SafetensorError

        try:
            with safe_open(file, "pt") as opened:
                header = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{file} cannot be read", expected="statistics", received=str(error)) from None
        if header.get("format") != FORMAT:
            raise UsageError(
                f"{file} holds no expert statistics", expected=FORMAT, received=header.get("format", "no such header"),
                hint="anabranch experts profile writes them",
            )  # fmt: skip
        sums = {name.removeprefix("sums."): value for name, value in tensors.items() if name.startswith("sums.")}
        try:
            values = json.loads(header["header"])
            return cls(
                tuple(values["labels"]), tuple(values["layers"]), values["num_experts"], values["top_k"],
                values["num_folds"], values["model"], sums, tensors["tokens"], tensors["documents"], tensors["pairs"],
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"{file} is torn", expected="statistics", received=repr(error)) from None

    def write_files(self, folder: Path) -> None:
        self.save(folder / self.MARK)

    @classmethod
    def read_files(cls, folder: Path) -> "ExpertStats":
        return cls.load(folder / cls.MARK)

    def card(self) -> str:
        head = front_matter(library_name="anabranch", tags=["mixture-of-experts", "statistics"])
        rows = "\n".join(f"| {label} | {self.num_tokens(label):,.0f} |" for label in self.labels)
        return CARD.format(
            head=head, rows=rows, layers=len(self.layers), experts=self.num_experts, top_k=self.top_k,
            model=self.model or "not recorded", sums=", ".join(sorted(self.sums)) or "none",
        )  # fmt: skip


def finite(values: Tensor, name: str, label: str) -> Tensor:
    """An expert without a number would be ranked all the same, and a mean over infinitely many be a plausible 0."""
    if not bool(values.isfinite().all()):
        raise UsageError(
            f"the {name} of {label!r} in the statistics is not finite",
            expected="finite sums", received="NaN or infinity", hint="profile the model in a wider precision",
        )  # fmt: skip
    return values


def notes_of(file: Path) -> str:
    """What was written beside the statistics of a file that `ExpertStats.load` takes."""
    with safe_open(file, "pt") as opened:
        return str((opened.metadata() or {}).get("notes", ""))


class Collector:
    """Fills an `ExpertStats` from forward passes."""

    def __init__(
        self, model: nn.Module, layers: Sequence[MixtureLayer], labels: Sequence[str], *, num_folds: int = 10,
        outputs: bool = False, residual: bool = False, fingerprint: str = "",
    ):  # fmt: skip
        self.model, self.layers = model, tuple(layers)
        self.outputs, self.residual = outputs or residual, residual
        self.order = {layer.name: i for i, layer in enumerate(self.layers)}
        first = self.layers[0]
        self.stats = ExpertStats(
            tuple(labels), tuple(self.order), first.num_experts, first.top_k, num_folds, fingerprint
        )

    @contextmanager
    def collecting(self, labels: Tensor, folds: Tensor, attention_mask: Tensor) -> Iterator[None]:
        """Around one forward pass over (B, S) tokens; every row is a document.

        labels          (B, S) or (B, 1) int64, which label; -1: a token of none
        folds           (B,) int64
        attention_mask  (B, S), 0 for padding
        """
        stats = self.stats
        for what, values, limit in (("label", labels, len(stats.labels)), ("fold", folds, stats.num_folds)):
            if values.numel() and int(values.max()) >= limit:
                raise UsageError(f"there is no such {what}", expected=f"below {limit}", received=int(values.max()))
        labels_BS = labels.expand(attention_mask.shape).masked_fill(~attention_mask.bool(), -1)
        real_T = (labels_BS >= 0).reshape(-1)
        lengths_B = attention_mask.sum(1).double()
        keys_T = (labels_BS * stats.num_folds + folds[:, None]).reshape(-1)[real_T]
        per_token_T = (1 / lengths_B.clamp(min=1))[:, None].expand(labels_BS.shape).reshape(-1)[real_T]

        held: list[Seen] = []

        def take(seen: Seen) -> None:
            if self.outputs:  # too large to be held
                self.update(seen, real_T, keys_T, per_token_T)
            else:
                held.append(replace(seen, hidden_states=NOTHING, routed=NOTHING))

        with (
            torch.no_grad(),
            watched(self.layers, take, outputs=self.outputs, residual=self.residual, model=self.model),
        ):
            yield
        with torch.no_grad():  # once the pass is over: between its layers, its memory would be scattered
            for seen in held:
                self.update(seen, real_T, keys_T, per_token_T)
        size = len(stats.labels) * stats.num_folds
        stats.tokens += torch.bincount(keys_T.cpu(), minlength=size).view(stats.tokens.shape)
        for label in range(len(stats.labels)):
            has_B = (labels_BS == label).any(1).cpu()
            stats.documents[label] += torch.bincount(folds.cpu()[has_B], minlength=stats.num_folds)

    def update(self, seen: Seen, real_T: Tensor, keys_T: Tensor, per_token_T: Tensor) -> None:
        """One layer's part of one pass."""
        stats, layer = self.stats, self.order[seen.layer.name]
        logits_TN = seen.triple.router_logits[real_T].double()
        weights_TK = seen.triple.routing_weights[real_T].double()
        selected_TK = seen.triple.selected_experts[real_T]
        sums_T1 = weights_TK.sum(-1, keepdim=True)
        share_TK = torch.where(sums_T1 > 0, weights_TK / sums_T1, torch.zeros_like(weights_TK))
        cells_TK = keys_T[:, None] * stats.num_experts + selected_TK
        slots = {
            "count": torch.ones_like(weights_TK), "weight": weights_TK, "weight_square": weights_TK.square(),
            "share": share_TK, "document_rate": per_token_T[:, None].expand(weights_TK.shape),
        }  # fmt: skip
        if seen.outputs is not None:
            outputs_TKD = seen.outputs[real_T].float()
            norm_TK = outputs_TKD.norm(dim=-1).double()
            slots |= {"norm": norm_TK, "weighted_norm": weights_TK * norm_TK, "share_norm": share_TK * norm_TK}
            self.take_peak(layer, cells_TK, outputs_TKD.abs().amax(-1).double())
            if seen.residual is not None:
                before_TD, routed_TD = seen.residual[real_T].double(), seen.routed[real_T].double()
                if (after := norm_after(self.model, seen.layer)) is not None:
                    routed_TD = after(seen.routed[real_T]).double()
                scale = getattr(self.model.config, "residual_multiplier", 1.0)
                cos_T = nn.functional.cosine_similarity(before_TD, before_TD + scale * routed_TD, dim=-1)
                slots["turn"] = weights_TK * norm_TK * (1 - cos_T).clamp(min=0)[:, None]
        for name, values_TK in slots.items():
            self.scatter(name, layer, cells_TK.flatten(), values_TK.flatten())
        self.scatter_rows("logit", layer, keys_T, logits_TN)
        self.scatter_rows("logit_square", layer, keys_T, logits_TN.square())
        self.scatter_rows("probability", layer, keys_T, logits_TN.softmax(-1))
        self.count_pairs(layer, keys_T // stats.num_folds, selected_TK)

    def shape(self) -> tuple[int, int, int, int]:
        stats = self.stats
        return len(stats.labels), stats.num_folds, len(stats.layers), stats.num_experts

    def scatter(self, name: str, layer: int, cells: Tensor, values: Tensor) -> None:
        D, F, _, N = self.shape()
        summed = torch.zeros(D * F * N, dtype=torch.float64, device=values.device).index_add_(0, cells, values)
        self.sum_of(name)[:, :, layer] += summed.view(D, F, N).cpu()

    def scatter_rows(self, name: str, layer: int, keys_T: Tensor, values_TN: Tensor) -> None:
        D, F, _, N = self.shape()
        summed = torch.zeros(D * F, N, dtype=torch.float64, device=values_TN.device).index_add_(0, keys_T, values_TN)
        self.sum_of(name)[:, :, layer] += summed.view(D, F, N).cpu()

    def take_peak(self, layer: int, cells_TK: Tensor, values_TK: Tensor) -> None:
        D, F, _, N = self.shape()
        highest = torch.zeros(D * F * N, dtype=torch.float64, device=values_TK.device)
        highest.scatter_reduce_(0, cells_TK.flatten(), values_TK.flatten(), "amax")
        own = self.sum_of("peak")[:, :, layer]
        torch.maximum(own, highest.view(D, F, N).cpu(), out=own)

    def count_pairs(self, layer: int, labels_T: Tensor, selected_TK: Tensor) -> None:
        chosen_TN = torch.zeros(len(selected_TK), self.stats.num_experts, device=selected_TK.device)
        chosen_TN.scatter_(1, selected_TK, 1.0)
        for label in torch.unique(labels_T).tolist():
            own = chosen_TN[labels_T == label]
            self.stats.pairs[label, layer] += (own.T @ own).double().cpu()

    def sum_of(self, name: str) -> Tensor:
        sums = self.stats.sums
        if name not in sums:
            sums[name] = torch.zeros(self.shape(), dtype=torch.float64)
        return sums[name]
