# SPDX-License-Identifier: Apache-2.0
"""What `anabranch experts` can be told. The first class of a pair holds the flags, the second every further setting.

Light on purpose: the command line reads these without importing torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anabranch.train.trackers import Tracked


@dataclass(frozen=True, kw_only=True)
class OfModel:
    model: Path = Path("model")
    """A folder that transformers wrote, of a mixture of experts, tokenizer included."""


@dataclass(frozen=True, kw_only=True)
class Reading(OfModel):
    """Which model reads which texts."""

    data: tuple[str, ...] = ()
    """name=FILE for every label: .txt, or .jsonl with "text" in each row; domain:NAME for a text that ships."""
    length: int = 128
    """Tokens of a window."""
    limit: int = 200
    """Windows of a label, spread evenly through its text."""
    batch_size: int = 16


@dataclass(frozen=True, kw_only=True)
class ProfileFlags(Reading):
    out: Path = Path("profile.safetensors")
    """The file to write; OUT.json beside it says in words what it holds."""
    outputs: bool = False
    """Also what experts put out: norms, maxima, and how far they turn the stream."""
    collect: Literal["passes", "dsmoe", "router_lens"] = "passes"
    """Passes over every label; dsmoe: the first label's salient tokens against its common ones, by gradients;
    router_lens: also what a copy chooses whose routers were tuned on the texts."""
    resume: bool = False
    """Go on with a profile that was stopped."""


@dataclass(frozen=True, kw_only=True)
class ProfileSettings(ProfileFlags):
    num_folds: int = 10
    """Parts of each text that intervals are drawn from."""
    epochs: int = 3
    """Of router_lens."""
    learning_rate: float = 5e-4
    """Of router_lens."""


@dataclass(frozen=True, kw_only=True)
class RankFlags:
    stats: Path = Path("profile.safetensors")
    """What anabranch experts profile wrote."""
    target: str = ""
    """The label whose experts are looked for."""
    against: tuple[str, ...] = ()
    """Labels that it is set against; all others when left out."""
    by: tuple[str, ...] = ()
    """Rankings, by name; all that the statistics allow when left out."""
    num: int = 4
    """How many of the highest are shown, and compared between rankings."""
    out: Path | None = None
    """A JSON file to write: all scores, intervals and overlaps."""


@dataclass(frozen=True, kw_only=True)
class RankSettings(RankFlags):
    resamplings: int = 200
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SteerFlags:
    stats: Path = Path("profile.safetensors")
    """What anabranch experts profile wrote."""
    target: str = ""
    """The label whose experts are steered."""
    against: tuple[str, ...] = ()
    """Labels that it is set against; all others when left out."""
    by: str = "ftri"
    """ftri, rice, dsmoe or steermoe, each with its own ranking; or manual, with --experts and --kind."""
    num: int = 2
    """How many experts, over all layers."""
    amount: float | None = None
    """Rice's beta, dsmoe's alpha, or the amount of a manual scale or bias."""
    turn: Literal["on", "off"] = "off"
    """Whether ftri and steermoe switch what the target shows on or off."""
    experts: tuple[str, ...] = ()
    """For manual: layer.expert, layers counted from 0 as anabranch experts rank shows them."""
    kind: str = "empty"
    """For manual: empty, empty_keep_sum, refill, scale, scale_keep_sum, bias, promote, suppress."""
    out: Path = Path("steer.json")
    """The recipe to write."""


@dataclass(frozen=True, kw_only=True)
class SteerSettings(SteerFlags):
    pass


@dataclass(frozen=True, kw_only=True)
class GenerateFlags(OfModel):
    steer: tuple[Path, ...] = ()
    """Recipes of anabranch experts steer, one after another."""
    prompt: str = ""
    """Go on with this text."""
    prompts: Path | None = None
    """A text file with one prompt a line, or .jsonl with "text" in each row."""
    out: Path | None = None
    """A .jsonl file to write; without it texts are printed."""
    max_new_tokens: int = 64
    temperature: float = 0.0
    """0: the likeliest token."""
    contrast: tuple[int, ...] = ()
    """SCMoE: in place of recipes, decode against the same model routed to the experts of these ranks, such as 2."""
    skip: str = ""
    """naee or modes: in place of recipes, pass over slots of little weight, by thresholds from --data."""
    data: tuple[str, ...] = ()
    """name=FILE: the texts that --skip takes its thresholds from."""
    seed: int = 0
    export: Path | None = None
    """Write the steered model as a stock checkpoint here, where a checkpoint can say it, and end."""


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(GenerateFlags):
    strict: bool = True
    """Refuse recipes that were made on another model."""
    alpha: float = 0.1
    """Of contrast: tokens less likely than this share of the likeliest are barred."""
    beta: float = 0.5
    """Of contrast: its strength."""
    skip_share: float = 0.25
    """Of modes: the least share of slots to pass over."""
    skip_windows: int = 20
    """Of skip: windows of 128 tokens that are read of every text."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    length: int = 128
    """Tokens of a window."""
    limit: int = 100
    """Windows of a label that losses are taken on."""


@dataclass(frozen=True, kw_only=True)
class PruneFlags(OfModel):
    stats: Path | None = None
    """What anabranch experts profile wrote on this model; naee and random need none."""
    data: tuple[str, ...] = ()
    """name=FILE for every label whose loss is told before and after; naee searches on the targets among them."""
    target: tuple[str, ...] = ()
    """Labels whose experts stay; of several, each counts the same in every layer."""
    by: str = "easy_ep"
    """The ranking; or naee (the subset that keeps the outputs), or random."""
    keep: int = 4
    """Experts that every layer keeps."""
    protect: tuple[str, ...] = ()
    """layer.expert that stay whatever their score; super: those of massive outputs, found in the statistics."""
    out: Path = Path("pruned")
    """The checkpoint to write, with experts.json: what was kept, and the losses."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class PruneSettings(PruneFlags, Asked):
    controls: int = 3
    """Random prunings that the same number of experts is compared with."""


@dataclass(frozen=True, kw_only=True)
class MergeFlags(OfModel):
    data: tuple[str, ...] = ()
    """name=FILE for every label: usage and outputs are taken on the targets, losses are told for all."""
    target: tuple[str, ...] = ()
    """Labels that the merge is made for; all when left out."""
    by: str = "mc_smoe"
    """mc_smoe (aligned, grouped by their logits) or sub_moe (grouped by their outputs)."""
    keep: int = 4
    """Distinct experts that a layer has afterwards, on average; the others point to them."""
    out: Path = Path("merged")
    """The checkpoint to write, with experts.json."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class MergeSettings(MergeFlags, Asked):
    pass


@dataclass(frozen=True, kw_only=True)
class TuneFlags(OfModel):
    stats: Path = Path("profile.safetensors")
    """What anabranch experts profile wrote on this model."""
    data: tuple[str, ...] = ()
    """name=FILE: the first is learnt, from its first nine tenths (a shipped text: from the part to learn from); losses
    of the rest of it and of the others are told before and after."""
    target: str = ""
    """The label of the statistics whose experts learn."""
    by: str = "esft_token"
    """The ranking that chooses them; random, drawn by the seed, is the control."""
    p: float = 0.2
    """ESFT: the share of relevance that the chosen experts of a layer hold."""
    num: int = 0
    """CEFT: so many of each layer, in place of a share."""
    steps: int = 200
    learning_rate: float = 1e-4
    """The paper's 1e-5 is for models of billions of weights."""
    out: Path = Path("tuned")
    """The run folder, and in it the adapter: the tuned experts alone, and experts.json."""
    merged: Path | None = None
    """Also write the whole checkpoint here."""
    resume: bool = False
    """Go on with a run that was stopped."""


@dataclass(frozen=True, kw_only=True)
class TuneSettings(TuneFlags, Tracked):
    controls: int = 0
    """Trainings of as many random experts of every layer, in the table beside the chosen ones; each takes as long."""
    seed: int = 0
    length: int = 128
    limit: int = 400
    batch_size: int = 16
    weight_decay: float = 0.1
    sharding: Literal["none", "full"] = "none"
    """full: of several processes each keeps a part of parameters, gradients and moments (docs/scaling.md)."""
    save_every: int = 200
