# SPDX-License-Identifier: Apache-2.0
"""Every attack on one model, the erased one or a control: how often the concept is drawn then.

Shapes    : k pictures with the concept, their boxes and captions, and harmless ones; n pictures an attack.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anabranch.data.streams import derived_seed
from anabranch.errors import UsageError, did_you_mean
from anabranch.jobs.erase.arms import Arm, Judges, Subject
from anabranch.jobs.erase.sample import batches, rule
from anabranch.measure.concept_ratio import Rate
from anabranch.models.diffusion.family import denoiser
from anabranch.models.diffusion.latents import to_latents, to_pixels
from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.attacks import adversarial, inversion, paraphrase, prompt_search, relearning
from anabranch.suppress.attacks.partial import STRENGTHS, sample_from
from anabranch.suppress.attacks.quantise import quantised
from anabranch.suppress.detectors.protocol import Box
from anabranch.suppress.geom_erasing.bins import covered_bins
from anabranch.suppress.guidance import first_noise

NAMES = ("paraphrase", "adversarial", "search", "inversion", "relearn", "benign", "int8", "int4", "partial")
FAMILIES = {
    "adversarial": "adversarial_prompt",
    "search": "prompt_search",
    "inversion": "concept_inversion",
    "benign": "benign_tuning",
    "int8": "compression/int8",
    "int4": "compression/int4",
    "partial": "partial_noise",
}
"""What `anabranch.measure.erasure` calls them, where it calls them otherwise."""
NEEDS_CONCEPT, NEEDS_HARMLESS = ("adversarial", "inversion", "relearn", "partial"), ("benign",)
Curve = list[tuple[int, Rate]]


@dataclass(frozen=True, kw_only=True)
class Material:
    """What attacks are made with; `source` says where the pictures with the concept came from."""

    pixels: Tensor
    boxes: list[list[Box]]
    captions: list[str]
    harmless: Tensor
    harmless_captions: list[str]
    source: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    steps: int = 100
    seeds: int = 1
    """Repetitions of the attacks that train a model."""
    seed: int = 0

    @property
    def at(self) -> tuple[int, ...]:
        """Steps after which a model that is fine-tuned is looked at."""
        return tuple(sorted({0, max(1, self.steps // 4), max(1, self.steps // 2), self.steps}))


@dataclass(kw_only=True)
class Attacked:
    """One model under attack: arms by the name that `measure.erasure` has for them, curves a seed each."""

    arms: dict[str, Arm] = field(default_factory=dict)
    curves: dict[str, list[Curve]] = field(default_factory=dict)


def chosen_attacks(text: str) -> list[str]:
    """`all`, `none` or names with commas between them."""
    if text in ("all", "none"):
        return list(NAMES) if text == "all" else []
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in NAMES:
            raise UsageError(f"there is no attack {name!r}", hint=did_you_mean(name, NAMES))
    return [name for name in NAMES if name in names]


def attack(
    names: Sequence[str],
    subject: Subject,
    prompts: Sequence[str],
    seeds: Sequence[int],
    judges: Judges,
    material: Material,
    word: str,
    plan: Plan,
    note: Callable[[str], None] = lambda line: None,
) -> Attacked:
    """All named attacks; the model is as before when this returns."""
    found = Attacked()
    for name in names:
        if name == "paraphrase":
            found.arms |= paraphrased(subject, prompts, seeds, judges, word)
        elif name == "adversarial":
            found.arms |= led(subject, prompts, seeds, judges, material, plan)
        elif name == "search":
            config = prompt_search.Config(seed=plan.seed)
            text = prompt_search.search(subject.pipe, prompts, word, config)[-1].text
            found.arms[FAMILIES[name]] = after(text, subject, prompts, seeds, judges)
        elif name == "inversion":
            found.arms[FAMILIES[name]] = inverted(subject, prompts, seeds, judges, material, word, plan)
        elif name in ("relearn", "benign"):
            found.arms[FAMILIES.get(name, name)], found.curves[name] = relearnt(
                name, subject, prompts, seeds, judges, material, plan
            )
        elif name in ("int8", "int4"):
            with quantised(denoiser(subject.pipe), int(name[3:])):
                found.arms[FAMILIES[name]] = judges.arm(subject.draw(prompts, seeds), prompts)
        else:
            found.arms |= partly_noised(subject, seeds, judges, material, plan)
        note(name)
    return found


def paraphrased(
    subject: Subject, prompts: Sequence[str], seeds: Sequence[int], judges: Judges, word: str
) -> dict[str, Arm]:
    kinds = list(zip(*(paraphrase.paraphrases(prompt, word) for prompt in prompts), strict=True))
    return {
        f"paraphrase/{kind}": judges.arm(subject.draw(asked, seeds), asked)
        for kind, asked in zip(paraphrase.KINDS, kinds, strict=True)
    }


def led(
    subject: Subject, prompts: Sequence[str], seeds: Sequence[int], judges: Judges, material: Material, plan: Plan
) -> dict[str, Arm]:
    """After 10, 20 and 40 steps of the search, or at its end where it is shorter."""
    steps = min(plan.steps, adversarial.AT[-1])
    config = adversarial.Config(steps=steps, seed=plan.seed)
    found = adversarial.search(subject.pipe, to_latents(subject.pipe, material.pixels), material.captions, config)
    at = sorted({min(steps, step) for step in adversarial.AT})
    return {
        f"{FAMILIES['adversarial']}/{step}": after(found[step].text, subject, prompts, seeds, judges) for step in at
    }


def after(text: str, subject: Subject, prompts: Sequence[str], seeds: Sequence[int], judges: Judges) -> Arm:
    """Every prompt with the same words before it."""
    asked = [adversarial.before(subject.pipe, text, prompt) for prompt in prompts]
    return judges.arm(subject.draw(asked, seeds), asked)


def inverted(
    subject: Subject,
    prompts: Sequence[str],
    seeds: Sequence[int],
    judges: Judges,
    material: Material,
    word: str,
    plan: Plan,
) -> Arm:
    config = inversion.Config(steps=plan.steps, seed=plan.seed)
    latents = to_latents(subject.pipe, material.pixels)
    with inversion.inverted(subject.pipe, latents, material.captions, config, word):
        asked = [inversion.asking(subject.pipe, prompt) for prompt in prompts]
        return judges.arm(subject.draw(asked, seeds), asked)


def relearnt(
    name: str,
    subject: Subject,
    prompts: Sequence[str],
    seeds: Sequence[int],
    judges: Judges,
    material: Material,
    plan: Plan,
) -> tuple[Arm, list[Curve]]:
    """The last arm of the first seed, and a curve of rates a seed."""
    concept = name == "relearn"
    pixels = material.pixels if concept else material.harmless
    captions = material.captions if concept else material.harmless_captions
    latents = to_latents(subject.pipe, pixels)
    runs = []
    for number in range(plan.seeds):
        config = relearning.Config(at=plan.at, seed=derived_seed("relearning", plan.seed, number) % 2**31)
        runs.append(
            relearning.relearn(
                subject.pipe, latents, captions, config, lambda step: judges.arm(subject.draw(prompts, seeds), prompts)
            )
        )
    return runs[0][-1][1], [[(step, arm.seen.rate) for step, arm in run] for run in runs]


def partly_noised(
    subject: Subject, seeds: Sequence[int], judges: Judges, material: Material, plan: Plan
) -> dict[str, Arm]:
    """From pictures with the concept, asked for by their own captions; policy detected is told where it is in them."""
    pipe, how, count = subject.pipe, subject.how, len(material.pixels)
    latents = to_latents(pipe, material.pixels)
    bins, side = None, material.pixels.shape[-1]
    if subject.applied is not None and subject.policy == "detected":
        grid = subject.applied.adapter.vocabulary.grid
        bins = [covered_bins(boxes, side, side, grid) if boxes else [] for boxes in material.boxes]
    asked = [material.captions[i % count] for i in range(len(seeds))]
    arms = {}
    for strength in STRENGTHS:
        parts = []
        for rows in batches(len(seeds), how.batch_size):
            picks, chosen = [i % count for i in rows], [seeds[i] for i in rows]
            negative = subject.negatives(len(rows), plan.seed, None if bins is None else [bins[i] for i in picks])
            guidance = rule(pipe, encode_prompts(pipe, [asked[i] for i in rows]), negative, how)
            noise = first_noise(pipe, chosen)
            z = sample_from(pipe, guidance, latents[picks], noise, how.steps, max(strength, 1 / how.steps), chosen)
            parts.append(to_pixels(pipe, z))
        arms[f"partial_noise/{strength:g}"] = judges.arm(torch.cat(parts), asked)
    return arms
