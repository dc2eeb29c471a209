# SPDX-License-Identifier: Apache-2.0
"""What `anabranch erase` can be told. The first class of a pair holds the flags, the second every further setting.

Light on purpose: the command line reads these without importing torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anabranch.train.trackers import Tracked

Mode = Literal["data", "model"]
Trained = Literal["lora", "denoiser", "tokens"]
Policy = Literal["none", "name", "sampled", "prior", "all", "detected"]


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    model: Path = Path("model")
    """A diffusers pipeline folder."""
    labels: Path = Path("labels.jsonl")
    """What anabranch erase scan found."""
    mode: Mode = "data"
    """data: fine-tune on images that contain the concept; model: clean a model, training the new words alone."""
    out: Path = Path("adapter")
    """The adapter folder to write."""
    concept: str = ""
    """What the concept is called, such as watermark; the scan's name when left out."""
    images: Path | None = None
    """The folder of the images, where it has moved since the scan."""
    steps: int = 1000
    """Optimiser steps."""
    grid: str = "8"
    """Bins a side, or columns x rows such as 8x6."""
    trained: Trained = "lora"
    """Of mode data: lora, the whole denoiser, or tokens (the new words) alone."""
    seed: int = 0
    resume: bool = False
    """Go on with a run that was stopped."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(TrainFlags, Tracked):
    alpha: float = 2.0
    """Weight of what lies outside of the concept over what lies inside; 1 is the plain loss."""
    r: int = 8
    """Rank of the LoRA."""
    batch_size: int = 8
    learning_rate: float | None = None
    """Peak; None takes 1e-4 of LoRA, 1e-5 of the denoiser, 1e-3 of the new words alone."""
    token_rate: float = 10.0
    """Learning rate of the new words, as a multiple of that of LoRA or the denoiser."""
    warmup_steps: int = 20
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "bf16"] = "no"
    sharding: Literal["none", "full"] = "none"
    """full: of several processes each keeps a part of parameters, gradients and moments (docs/scaling.md)."""
    save_every: int = 250
    prompt_dropout: float = 0.1
    caption_dropout: float = 0.1
    """Share of the rows that keep the new words without their caption, as a negative prompt has them."""
    concept_token: Literal["new", "word"] = "new"
    """new: a word of its own, started at the concept's; word: the concept's own, which then changes its meaning."""
    policy: Policy | None = None
    """Default negative prompt of the adapter; None takes name after mode data, all or prior after mode model."""
    flip: bool = False
    """Mirror the images and their boxes as well, half of the rows; never of text or QR codes."""
    caption: str = "a photo of a {class}"
    """Caption of images that have none but lie in class folders."""
    publish_tokens: bool = True
    """The words' embeddings also make the concept: False leaves them out of the folder, ready negatives stay."""


@dataclass(frozen=True, kw_only=True)
class SampleFlags:
    model: Path = Path("model")
    """A diffusers pipeline folder."""
    adapter: Path | None = None
    """The adapter; without it the model is sampled as it is."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    out: Path = Path("samples")
    """The folder of pictures to write."""
    policy: Policy | None = None
    """Negative prompt: none, name, sampled, prior, all, detected; the adapter's own when left out."""
    count: int = 1
    """Pictures a prompt."""
    negative: str = ""
    """What you do not want besides; put after the concept."""
    guidance: float | None = None
    """Scale of the guidance; the pipeline's own when left out."""
    steps: int | None = None
    """Steps of the scheduler; the pipeline's own when left out."""
    detector: str = ""
    """For policy detected: who looks where the concept is, as in anabranch erase scan."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SampleSettings(SampleFlags):
    negative_scale: float | None = None
    """A strength of its own for the negative prompt, in a third pass; None is guidance away from it."""
    window: tuple[float, float] = (0.0, 1.0)
    """Share of the run in which the negative prompt stands."""
    strength: float = 1.0
    """Of the adapter's LoRA."""
    threshold: float | None = None
    batch_size: int = 8


@dataclass(frozen=True, kw_only=True)
class BakeFlags:
    model: Path = Path("model")
    """A diffusers pipeline folder."""
    adapter: Path = Path("adapter")
    """What anabranch erase train wrote."""
    out: Path = Path("baked")
    """The LoRA folder to write; it needs no negative prompt."""
    prompts: Path | None = None
    """A text file, a prompt a line, of what will be asked for."""
    policy: Policy | None = None
    """The negative prompt that is put into the weights; the adapter's own when left out."""
    eta: float = 1.0
    """How far away from the negative prompt."""
    steps: int = 300
    """Optimiser steps."""
    seed: int = 0
    resume: bool = False


@dataclass(frozen=True, kw_only=True)
class BakeSettings(BakeFlags, Tracked):
    guidance: float | None = None
    r: int = 8
    batch_size: int = 8
    learning_rate: float = 1e-4
    sample_steps: int = 20
    num_latents: int = 64
    """Pictures that the model makes to be trained on."""
    keep_coef: float = 1.0
    """Weight of the term that holds the unconditional output where it was."""
    save_every: int = 100
    warmup_steps: int = 10
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class EvalFlags:
    model: Path = Path("model")
    """A diffusers pipeline folder."""
    adapter: Path | None = None
    """What was made to erase the concept: from erase train or erase bake."""
    prompts: Path | None = None
    """A text file, a prompt a line, of what is asked for; the concept is in none of them."""
    detector: str = ""
    """Who looks for the concept, as in anabranch erase scan."""
    second_detector: str = ""
    """Another detector, which had no part in the labels."""
    out: Path = Path("runs/erase-eval")
    """The run folder to write: table, page, pictures."""
    clean: Path | None = None
    """Real pictures without the concept: false alarms are measured and quality is compared on them."""
    concept: str = ""
    """A word for the concept; the adapter's when left out."""
    samples: int = 200
    """Pictures an arm."""
    attacks: str = "all"
    """all, none, or some of paraphrase,adversarial,search,inversion,relearn,benign,int8,int4,partial."""
    never: Path | None = None
    """A pipeline that never saw the concept: the floor that `removed` is measured against."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class EvalSettings(EvalFlags):
    policy: Policy | None = None
    guidance: float | None = None
    steps: int | None = None
    batch_size: int = 8
    threshold: float | None = None
    second_threshold: float | None = None
    labels: Path | None = None
    """The labels that the adapter was trained on: pictures for the attacks that need some of the concept."""
    attack_steps: int = 100
    """Steps of the attacks that train: a word for the concept, or the model itself."""
    attack_samples: int = 50
    """Pictures an attack, of one seed and step."""
    attack_images: int = 16
    """Pictures with the concept, and harmless ones, that an attack may use."""
    attack_seeds: int = 1
    """Repetitions of relearning; a verdict on it takes 3."""
    ladder: bool = True
    """Draw under every policy that fits, and not just under the adapter's own."""
    no_op: str = ""
    """Negative prompt of the eraser that does nothing; the empty one makes the model's own pictures again."""
    features: Path | None = None
    """A transformers image model, such as a CLIP, in whose space quality is compared; a plain space when left out."""
