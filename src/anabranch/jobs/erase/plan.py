# SPDX-License-Identifier: Apache-2.0
"""What a training of `anabranch erase train` is to be, from its settings, labels and model.

All that can be known to be wrong is refused here, before a run folder is made.
"""

import math
from typing import Any

from anabranch.data.labels import Labels
from anabranch.errors import UsageError
from anabranch.jobs.erase.settings import Trained, TrainSettings
from anabranch.models.diffusion.family import encoders, family, image_side
from anabranch.suppress.geom_erasing.bins import Box, covered_bins
from anabranch.suppress.geom_erasing.erase import Config, check_contrast, grid_of
from anabranch.suppress.geom_erasing.negatives import negative_prompts
from anabranch.suppress.geom_erasing.words import Vocabulary, fitted, room, token_count
from anabranch.train.config import TrainConfig

RATES = {"lora": 1e-4, "denoiser": 1e-5, "tokens": 1e-3}
NEVER_MIRRORED = ("qr", "text", "read-text")
"""Detectors of what is another thing in a mirror."""


def erase_config(settings: TrainSettings) -> Config:
    if settings.mode == "model" and settings.trained == "denoiser":
        raise UsageError(
            "trained=denoiser would change nothing: mode model trains the new words alone",
            expected="--mode data, or --trained left out",
            received="--mode model --trained denoiser",
            hint="--mode data fine-tunes the denoiser on images that contain the concept",
        )
    kind = kind_of(settings)
    for name, used in (("r", kind == "lora"), ("token_rate", kind != "tokens")):
        if not used and getattr(settings, name) != getattr(TrainSettings, name):
            raise UsageError(
                f"{name} would change nothing",
                expected="LoRA to be trained" if name == "r" else "something besides the new words to be trained",
                received=f"{name} {getattr(settings, name)} where {kind} is trained",
                hint="learning_rate is that of the new words then" if name == "token_rate" else f"leave {name} out",
            )
    if settings.mode == "model" and math.isinf(settings.alpha):
        raise UsageError(
            "alpha: expected a finite number in model removal, where the region teaches the words",
            expected="a number above 0",
            received=settings.alpha,
            hint="alpha 2, the default",
        )
    if not 0 < settings.token_rate < math.inf:
        raise UsageError(
            "token_rate: the new words would not learn",
            expected="a number above 0",
            received=settings.token_rate,
            hint="10, the default",
        )
    try:
        return Config(
            mode=settings.mode,
            trained=kind,
            alpha=settings.alpha,
            r=settings.r,
            token_rate=1.0 if kind == "tokens" else settings.token_rate,
            seed=settings.seed,
        )
    except ValueError as error:
        raise UsageError(str(error), hint="alpha 2 and r 8, the defaults") from None


def kind_of(settings: TrainSettings) -> Trained:
    return "tokens" if settings.mode == "model" else settings.trained


def training_config(settings: TrainSettings) -> TrainConfig:
    drops = (settings.prompt_dropout, settings.caption_dropout)
    if not (all(0 <= drop <= 1 for drop in drops) and sum(drops) < 1):
        raise UsageError(
            "prompt_dropout and caption_dropout leave no row as it is",
            expected="shares from 0, together below 1",
            received=f"{drops[0]} and {drops[1]}",
            hint="0.1 and 0.1, the defaults",
        )
    rate = RATES[kind_of(settings)] if settings.learning_rate is None else settings.learning_rate
    if not rate > 0:
        raise UsageError(
            "learning_rate: nothing would be learned", expected="above 0", received=rate, hint="leave it out"
        )
    try:
        return TrainConfig(
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=rate,
            warmup_steps=min(settings.warmup_steps, settings.steps // 2),
            weight_decay=0.0,  # of new words it would be a pull towards the origin
            betas=(0.9, 0.99),
            max_grad_norm=settings.max_grad_norm,
            seed=settings.seed,
            save_every=settings.save_every,
            mixed_precision=settings.mixed_precision,
            sharding=settings.sharding,
            tracker=settings.tracker,
        )
    except ValueError as error:
        raise UsageError(str(error), hint="anabranch erase train --help names the defaults") from None


def refuse_mirrors(settings: TrainSettings, labels: Labels) -> None:
    if settings.flip and labels.detector.startswith(NEVER_MIRRORED):
        raise UsageError(
            "flip: what this detector finds is another thing in a mirror",
            expected=f"labels of a detector that is none of {', '.join(NEVER_MIRRORED)}",
            received=f"labels of {labels.detector}",
            hint="leave flip out",
        )


def concept_of(settings: TrainSettings, labels: Labels) -> str:
    concept = " ".join((settings.concept or labels.concept).split())
    if not concept:
        raise UsageError(
            "the concept has no name",
            expected="--concept NAME",
            received="none, and the labels have none",
            hint="such as --concept watermark",
        )
    return concept


def vocabulary_of(settings: TrainSettings, concept: str) -> Vocabulary:
    if settings.concept_token == "word":
        return Vocabulary(name=concept, grid=grid_of(settings.grid), new_name=False)
    word = "_".join("".join(c if c.isalnum() else " " for c in concept.lower()).split())
    return Vocabulary(name=f"<{word or 'concept'}>", grid=grid_of(settings.grid))


def check_vocabulary(pipe: Any, vocabulary: Vocabulary) -> None:
    """The words are new, differ, and leave room for a place."""
    words = vocabulary.words()
    if len(set(words)) < len(words):
        raise UsageError(
            f"{vocabulary.name!r} is the word of a place already",
            expected="a name that is none of the places'",
            received=vocabulary.name,
            hint="another --concept",
        )
    for encoder, tokenizer, _ in encoders(pipe):
        if known := sorted(set(words) & set(tokenizer.get_vocab())):
            raise UsageError(
                f"{known[0]!r} is already in the vocabulary of {encoder}",
                expected="words that are new to the model",
                received=f"{len(known)} known words",
                hint="another --concept; or --set concept_token=word, to keep the word that the model has",
            )
    if place_room(pipe, vocabulary) < 1:
        raise UsageError(
            "the concept and one of its places do not fit into a prompt",
            expected=f"at most {room(pipe)} tokens",
            received=f"{1 + room(pipe) - place_room(pipe, vocabulary)}",
            hint="--set concept_token=new, which is one token" if not vocabulary.new_name else "another model",
        )


def place_room(pipe: Any, vocabulary: Vocabulary) -> int:
    """Places that a prompt can name after the concept, before the words are attached and after."""
    return room(pipe) - (1 if vocabulary.new_name else token_count(pipe, vocabulary.name))


def policy_of(
    settings: TrainSettings, config: Config, pipe: Any, vocabulary: Vocabulary, boxes: list[list[Box] | None]
) -> str:
    """The adapter's own policy, which has to be one that it can be sampled with."""
    most, side = place_room(pipe, vocabulary), image_side(pipe)
    known = [fitted(covered_bins(found, side, side, vocabulary.grid), most) for found in boxes if found]
    policy = settings.policy or default_policy(config, vocabulary, most, bool(known))
    negative_prompts(policy, vocabulary, 1, training_bins=known, most=most, detected=[[]])
    return policy


def default_policy(config: Config, vocabulary: Vocabulary, most: int, has_places: bool) -> str:
    if config.mode == "data" or not has_places:
        return "name"
    return "all" if len(vocabulary.grid) <= most else "prior"


def warnings_for(
    settings: TrainSettings,
    pipe: Any,
    boxes: list[list[Box] | None],
    captions: list[str],
    vocabulary: Vocabulary,
) -> list[str]:
    """What can be trained, but should be known."""
    found = [warning] if (warning := check_contrast(boxes)) else []
    grid, latent = vocabulary.grid, family(pipe).latent_size(pipe)
    if latent % grid.columns or latent % grid.rows:
        found.append(
            f"a grid of {grid.columns} x {grid.rows} does not divide latents of {latent} x {latent}: where a latent "
            "lies in two bins, its weight is their mean"
        )
    if math.isinf(settings.alpha):
        found.append("alpha is infinite: nothing inside of the concept's region is learned, so its words learn little")
    if not any(captions):
        found.append("no image has a caption: a clean image is what the empty prompt draws, and nothing else is named")
    return found
