# SPDX-License-Identifier: Apache-2.0
"""The story of a trained mixture's experts, on a small model and six texts that ship; every command of it can be typed.

OUT/profile.safetensors    what `anabranch experts profile` wrote
OUT/pruned                 a checkpoint of half the experts, made for one domain by `anabranch experts prune`
OUT/experts-demo.json, report.html    what is shown, and the page, made from these files alone
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anabranch.data.six_domains import CONFLICT, DOMAINS, seals
from anabranch.errors import UsageError
from anabranch.jobs.experts.demo_page import NUMBERS, write_experts_demo_page
from anabranch.jobs.experts.profile import experts_profile
from anabranch.jobs.experts.prune import experts_prune
from anabranch.jobs.experts.rank import allowed, highest, known, module, overlap
from anabranch.jobs.experts.settings import ProfileSettings, PruneSettings
from anabranch.jobs.experts.text_mixture import SHIPPED_MODEL, seal_letters
from anabranch.jobs.experts.texts import SHIPPED, Windows, losses_of, read_windows
from anabranch.jobs.settings import DemoFlags
from anabranch.measure.experts.domain_specialisation import load
from anabranch.measure.experts.statistics import ExpertStats
from anabranch.measure.intervals import interval
from anabranch.models.language.folder import hushed, open_language_model
from anabranch.models.mixtures.layers import MixtureLayer, open_layers
from anabranch.models.mixtures.routing import changed, off_refill
from anabranch.reuse.steer import ftri
from anabranch.train.publish import write_json
from anabranch.train.run_folder import RunFolder

TARGET, KEEP, NUM, DRAWS = "law", 4, 4, 8
PROFILED, ASKED, SWITCHED = 120, 60, 24
"""Windows of a domain: read for the profile, asked before and after, asked with each expert off."""
DATA = tuple(f"{domain}={SHIPPED}{domain}" for domain in DOMAINS)


def experts_demo(flags: DemoFlags) -> Path:
    """Read, switch off, rank, steer, prune, write the page; returns its path."""
    started = time.monotonic()
    check_shipped()
    with RunFolder.open(flags.out, {"topic": "experts"}) as run:
        out = run.path
        say(started, "1/5  what every expert does on six texts that it was trained on")
        stats = experts_profile(
            ProfileSettings(
                model=SHIPPED_MODEL, data=DATA, out=out / "profile.safetensors", limit=PROFILED, outputs=True
            )
        )
        with hushed():
            model, tokenizer = open_language_model(SHIPPED_MODEL)
        layers = open_layers(model)
        texts = read_windows(DATA, tokenizer, length=128, limit=ASKED)
        say(started, f"2/5  each of {len(layers) * stats.num_experts} experts off, one at a time")
        told = facts(model, layers, stats) | {"off": switched_off(model, layers, texts)}
        say(started, "3/5  rankings of the experts, and what the highest of each are worth")
        told["rankings"] = rankings(stats, model, layers, texts)
        say(started, f"4/5  the planted sentences, and steering away from what only {TARGET} says")
        told["seals"] = planted_knowledge(model, layers, stats)
        say(started, f"5/5  a checkpoint of {KEEP} of {stats.num_experts} experts for {TARGET}, beside random ones")
        told["pruned"] = experts_prune(
            PruneSettings(
                model=SHIPPED_MODEL, stats=out / "profile.safetensors", data=DATA, target=(TARGET,), keep=KEEP,
                out=out / "pruned", limit=ASKED,
            )
        )  # fmt: skip
        told["seconds"] = time.monotonic() - started
        write_json(out / NUMBERS, told)
        page = write_experts_demo_page(out)
    print(f"\npage     {page}")
    print(f"next     anabranch experts rank --stats {out / 'profile.safetensors'} --target {TARGET}")
    return page


def say(started: float, line: str) -> None:
    print(f"[{time.monotonic() - started:4.0f} s] {line}", flush=True)


def facts(model: Any, layers: Sequence[MixtureLayer], stats: ExpertStats) -> dict[str, Any]:
    return {
        "labels": list(DOMAINS), "layers": len(layers), "experts": stats.num_experts, "top_k": stats.top_k,
        "weights": sum(p.numel() for p in model.parameters()), "target": TARGET, "load": load_of(stats),
    }  # fmt: skip


def load_of(stats: ExpertStats) -> list[Any]:
    """(L, N, D): share of a domain's choices that each expert receives."""
    found: list[Any] = load(stats).permute(1, 2, 0).tolist()
    return found


def switched_off(model: Any, layers: Sequence[MixtureLayer], texts: Sequence[Windows]) -> list[dict[str, Any]]:
    """A row an expert: the change of every domain's loss, paired by window, in thousandths of a nat."""
    few = [Windows(one.label, one.input_ids[::step], one.attention_mask[::step])
           for one in texts if (step := max(1, len(one.input_ids) // SWITCHED))]  # fmt: skip
    before = {one.label: losses_of(model, one) for one in few}
    rows = []
    for i, layer in enumerate(layers):
        for expert in range(layer.num_experts):
            off = torch.arange(layer.num_experts) == expert
            with changed([layer], lambda own, triple, off=off: off_refill(own, triple, off)):
                after = {one.label: losses_of(model, one) for one in few}
            found = {name: interval((1000 * (after[name] - before[name])).numpy()).as_dict() for name in before}
            rows.append({"layer": i, "expert": expert, "change": found})
    return rows


def rankings(
    stats: ExpertStats, model: Any, layers: Sequence[MixtureLayer], texts: Sequence[Windows]
) -> dict[str, Any]:
    """The highest experts of the target by each ranking; what the losses are with them off; how far rankings agree."""
    others = [label for label in DOMAINS if label != TARGET]
    names = [name for name in known() if allowed(name, stats)]
    top = {name: highest(module(name).rank(stats, TARGET, others), NUM) for name in names}
    before = {one.label: losses_of(model, one) for one in texts}
    rows = {}
    for name, pairs in top.items():
        change = off_change(model, layers, texts, pairs, before)
        rows[name] = {"top": pairs, "change": change}
    drawn = [highest(module("random").rank(stats, TARGET, others, seed=seed), NUM) for seed in range(DRAWS)]
    found = [off_change(model, layers, texts, pairs, before) for pairs in drawn]
    rows["random"]["change"] = {
        label: interval([one[label]["mean"] for one in found]).as_dict() for label in found[0]
    }  # one draw may hit the busiest expert
    return {"rows": rows, "overlap": [[overlap(top[a], top[b]) for b in names] for a in names]}


def off_change(
    model: Any, layers: Sequence[MixtureLayer], texts: Sequence[Windows], pairs: Sequence[tuple[int, int]], before: Any
) -> dict[str, Any]:
    """The change of the losses with these experts off, in thousandths of a nat."""
    off = torch.zeros(len(layers), layers[0].num_experts, dtype=torch.bool)
    for layer, expert in pairs:
        off[layer, expert] = True
    place = {layer.name: i for i, layer in enumerate(layers)}
    hit = [layer for layer in layers if off[place[layer.name]].any()]
    with changed(hit, lambda own, triple: off_refill(own, triple, off[place[own.name]])):
        after = {one.label: losses_of(model, one) for one in texts}
    return {name: interval((1000 * (after[name] - before[name])).numpy()).as_dict() for name in before}


def planted_knowledge(model: Any, layers: Sequence[MixtureLayer], stats: ExpertStats) -> list[dict[str, Any]]:
    """In both domains of the conflict: how many letters are right, and how many are the other domain's."""
    scores = module("ftri").rank(stats, TARGET, [label for label in DOMAINS if label != TARGET])
    rows = []
    for arm in ("as it is", f"{NUM} experts of {TARGET} off", f"{NUM} random experts off"):
        if arm == "as it is":
            found = {domain: seal_letters(model, domain) for domain in CONFLICT}
        else:
            drawn = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
            made = ftri.recipe(drawn if "random" in arm else scores, stats.layers, num=NUM, top_k=stats.top_k)
            with made.applied(layers):
                found = {domain: seal_letters(model, domain) for domain in CONFLICT}
        for domain, letters in found.items():
            asked = list(seals(domain))
            right = sum(said == seal.letter for said, seal in zip(letters, asked, strict=True))
            other = sum(said == seal.other for said, seal in zip(letters, asked, strict=True))
            rows.append({"arm": arm, "domain": domain, "right": right, "other": other, "asked": len(asked)})
    return rows


def check_shipped() -> None:
    if not (SHIPPED_MODEL / "config.json").is_file():
        raise UsageError(
            "the small mixture did not come with this installation", expected=SHIPPED_MODEL,
            hint="python -m recipes.experts.train makes it in a quarter of an hour",
        )  # fmt: skip
