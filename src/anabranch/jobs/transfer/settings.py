# SPDX-License-Identifier: Apache-2.0
"""What measuring, pre-training and customising can be told.

The first class of a pair holds the flags, the second every further setting. Light on purpose: the command line reads
these without importing torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anabranch.train.trackers import Tracked

Budget = Literal["equal-steps", "equal-images", "equal-epochs", "equal-exposure"]
Objective = Literal["mae", "simsiam", "byol"]
Method = Literal["moce", "mae", "token-moe", "sdr", "simsiam", "byol"]
Scope = Literal["ffn", "blocks", "encoder", "autoencoder"]
Select = Literal["cluster", "path", "knn"]


@dataclass(frozen=True, kw_only=True)
class MeasureFlags:
    sources: tuple[str, ...] = ()
    """Folders to learn from, one a domain; or patchwork:NAME for a domain that ships with the package."""
    tasks: tuple[str, ...] = ()
    """Folders of labelled images, one folder a class; train/ and test/ inside are respected."""
    out: Path = Path("runs/measure")
    """The run folder to write."""
    objective: Objective = "mae"
    """How the models learn: mae, a masked autoencoder (ViT); simsiam or byol, two views of an image (ResNet)."""
    steps: int = 1500
    """Optimiser steps of the model of a source."""
    seeds: int = 3
    """Repetitions; a verdict needs at least two."""
    budget: Budget = "equal-steps"
    """What is held equal between the models of one source and the shared one."""
    preset: str = "tiny"
    """Size of the model: tiny, small or base."""
    leave_one_out: bool = False
    """Also train the shared model without each source, to say which of them harms."""
    resume: bool = False
    """Go on with a run that was stopped."""


@dataclass(frozen=True, kw_only=True)
class MeasureSettings(MeasureFlags):
    first_seed: int = 0
    batch_size: int = 64
    learning_rate: float | None = None
    """Peak; None takes the objective's own, 4e-3 for mae."""
    warmup_steps: int = 60
    num_labels: int = 300
    num_draws: int = 5
    image_size: int | None = None
    channels: Literal[1, 3] | None = None
    probe_points: int = 3
    """Points of the learning curve, the last one at the end of training."""
    max_images: int = 20_000
    """Images of a task that are embedded for its probe."""
    augment: bool = False
    workers: int | None = None
    """Processes that train models side by side; as many as cores by default."""


@dataclass(frozen=True, kw_only=True)
class PretrainFlags:
    images: tuple[str, ...] = ()
    """Folders of images, any nesting, no labels needed; or patchwork:NAME."""
    method: Method = "moce"
    """moce: experts for clusters; mae: its plain model; token-moe: experts by token, the control; sdr: sub-nets of a
    ResNet for clusters; simsiam, byol: its plain model."""
    out: Path = Path("runs/pretrain")
    """The run folder to write."""
    base: Path | None = None
    """A model to start from (transformers folder): a masked autoencoder, or a ResNet; trained here when left out."""
    experts: int = 4
    """Experts in every layer that has them."""
    clusters: str = "auto"
    """How many clusters the images are divided into, or auto."""
    steps: int = 1500
    """Optimiser steps of this method; a base trained here gets as many before, of sdr a share of them (base_share)."""
    preset: str = "tiny"
    """Size of a base that is trained here: tiny, small or base."""
    expert_scope: Scope = "ffn"
    """What an expert owns: a block's feed-forward network (the paper's), blocks, the encoder, or the autoencoder."""
    resume: bool = False
    """Go on with a run that was stopped."""


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(PretrainFlags, Tracked):
    seed: int = 0
    batch_size: int = 64
    learning_rate: float | None = None
    """Peak of the base; None takes that of how it learns, 4e-3 for mae. Experts peak at `expert_learning_rate`."""
    expert_learning_rate: float = 3e-3
    warmup_steps: int = 60
    weight_decay: float | None = None
    """None takes that of how the model learns, 0.05 for mae."""
    base_steps: int | None = None
    """Steps of a base that is trained here; `steps` by default."""
    save_every: int = 500
    image_size: int | None = None
    channels: Literal[1, 3] | None = None
    augment: bool = False
    mixed_precision: Literal["no", "bf16"] = "no"
    sharding: Literal["none", "full"] = "none"
    """full: of several processes each keeps a part of parameters, gradients and moments (docs/scaling.md)."""
    assignment: Literal["gate", "fixed"] = "fixed"
    """gate: a learned gate sees the cluster; fixed: balanced groups of clusters are the experts."""
    expert_layers: tuple[int, ...] | None = None
    """Blocks that get experts; None takes all blocks of a model up to 4 deep, else the last two odd ones."""
    gate_scale: Literal["straight_through", "prob", "renormalised"] = "straight_through"
    temperature: float = 1.0
    noise_std: float | None = None
    init_noise: float = 1e-2
    aux_loss_coef: float = 0.01
    balance: Literal["hard", "soft"] = "hard"
    entropy_coef: float = 0.0
    distill_coef: float = 0.0
    cluster_embedding: Literal["centroid", "learned"] = "centroid"
    clusterer: Literal["sinkhorn", "kmeans"] = "sinkhorn"
    mixed_target: float = 1.0
    """1 asks for clusters of equal size; below that, partly for the sizes that k-means finds."""
    capacity_factor: float | None = 1.1
    """No cluster holds more than this many times its fair share; None leaves the sizes to the transport."""
    min_rank: int = 2
    """Fewer directions than this in the base's features mean that it has collapsed."""
    fit_images: int = 256_000
    """Images that the clusters are fitted on; the rest is assigned."""
    groups: int = 4
    """Of sdr: groups of channels that every split stage chooses one of; there are groups ** split_stages paths."""
    split_stages: int = 4
    """Stages that are split, the last ones; stages that all sub-nets have in common leave them little of their own."""
    split_ratio: float = 0.25
    """Share of a stage's channels that all sub-nets have in common."""
    ssl: Literal["simsiam", "byol"] = "simsiam"
    """How the sub-nets learn."""
    paths: Literal["tree", "random"] = "tree"
    """tree: similar clusters share groups; random: the same paths dealt at random, the control."""
    teacher: Literal["anchor", "supernet"] = "anchor"
    """What the sub-nets are distilled from: one plain path trained on all images, or all groups at once."""
    heads: Literal["own", "common"] = "own"
    """Of projector and predictor, a pair for every sub-net or one for all."""
    kd_coef: float = 0.25
    """Weight of the distillation; 1 was too much for small nets, on one seed (recipes/sdr)."""
    kd_schedule: Literal["constant", "anneal"] = "anneal"
    """anneal: half of kd_coef is left at the end of a phase."""
    kd_view: Literal["cross", "same"] = "cross"
    """Which view the teacher sees: the other one (the paper's), or the same."""
    anchor_share: float = 0.2
    """Share of the steps that also train what all sub-nets share, on all images."""
    paths_a_step: int = 2
    phase_rate: float = 0.6
    """Learning rate of the phases with sub-nets, as a multiple of that of phase 0 (recipes/sdr)."""
    base_share: float = 0.4
    """Share of the steps before the first split."""
    progressive: bool = True
    """Split one stage after the other; False splits all of them at once."""


@dataclass(frozen=True, kw_only=True)
class CustomizeFlags:
    run: Path = Path("runs/pretrain")
    """A finished run of anabranch pretrain."""
    task: str = ""
    """A folder of the task's images; labels are needed for --select knn only."""
    out: Path = Path("model")
    """The model folder to write."""
    select: Select = "path"
    """path: the route most of the images take; cluster: the largest cluster's; knn: try routes on the labels."""


@dataclass(frozen=True, kw_only=True)
class CustomizeSettings(CustomizeFlags):
    num_labels: int = 300
    """Labels that --select knn may look at."""
    knn_routes: int = 5
    """Routes that --select knn tries, most voted first, besides the plain base."""
    max_images: int = 20_000
    keep: float = 1.0
    """Of sdr: share of each group's channels that stay; below 1 the model is narrower, cheaper and less exact."""
