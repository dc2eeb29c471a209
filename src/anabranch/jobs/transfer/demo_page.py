# SPDX-License-Identifier: Apache-2.0
"""The page of the demo and of the recipe: the transfer matrix, then what experts change, with every control."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.allocate.clusters.record import Clustering
from anabranch.jobs.transfer.corpus import mixture, open_together
from anabranch.jobs.transfer.effects import SCOPES, arm_name
from anabranch.jobs.transfer.embed import embed
from anabranch.jobs.transfer.measure_page import ends, estimated, transfer_facts, transfer_lead, transfer_sections
from anabranch.jobs.transfer.pretrain_page import cluster_section
from anabranch.models import vit_mae
from anabranch.report.figures import Effect, Matrix, curves, forest, loads, two_matrices
from anabranch.report.page import Page, Section, Table, write


def write_demo_page(run: Path) -> Path:
    """report.html of a run of `demo` or of the recipe, from its files."""
    transfer = json.loads((run / "transfer.json").read_text(encoding="utf-8"))
    result = json.loads((run / "demo.json").read_text(encoding="utf-8"))
    page = Page(
        title="Where sharing hurts, and what experts do about it",
        lead=[*transfer_lead(transfer), *planted_lead(result), *experts_lead(result)],
        facts=[*transfer_facts(transfer)[:-1], *arm_facts(transfer, result)],
        sections=[
            *transfer_sections(transfer)[:2],
            side_by_side(transfer, result),
            effect_section(result),
            *cluster_sections(run, result["sources"]),
            who_serves_whom(result),
            what_routers_see(result),
            arm_table(result),
            what_it_takes(result),
            *transfer_sections(transfer)[2:],
            arm_curves(result),
        ],
    )
    return write(page, run / "report.html")


def planted_lead(result: dict[str, Any]) -> list[str]:
    """What is artificial, said before any number of it is read."""
    planted = [spec.partition(":")[2] for spec in result["sources"] if spec.startswith("planted:")]
    if not planted:
        return []
    return [
        f"{', '.join(planted)} are a planted conflict: one real domain in {len(planted)} pixel codes, which one narrow "
        "network cannot read at once. They show what is done where sharing has to hurt, not how often it does."
    ]


def experts_lead(result: dict[str, Any]) -> list[str]:
    """The comparisons that were run, each in a sentence with its interval and its verdict."""
    experts, scope = result["experts"], result["scope"]
    said = {
        ("separate", "continued"): "One model a domain, minus the shared model, both trained on from the same start "
        "with equally many images and steps",
        (experts, arm_name("random-clusters", scope)): "Experts of clusters that were found without labels, minus "
        "experts of random groups",
        (experts, f"{experts} wrong"): "The expert that a task picks, minus the experts that it does not pick",
        (experts, "continued"): "Experts of clusters, minus the shared model trained on equally long",
    }
    return compared(result, said)


def compared(result: dict[str, Any], said: dict[tuple[str, str], str]) -> list[str]:
    """A sentence for each of these pairs of arms that was run."""
    found = {(effect["left"], effect["right"]): effect for effect in result["effects"]}
    return [
        f"{words}: {estimated(found[pair])} points ({found[pair]['verdict']})."
        for pair, words in said.items()
        if pair in found
    ]


def arm_facts(transfer: dict[str, Any], result: dict[str, Any]) -> list[tuple[str, object]]:
    return [
        ("experts", f"{result['num_experts']} for {result['num_clusters']} clusters{SCOPES[result['scope']]}"),
        ("stage with experts", f"{result['steps']:,} steps of {result['batch_size']} images, the same for every arm"),
        ("processor time", f"{(transfer['seconds'] + result['seconds']) / 60:.0f} minutes"),
    ]


def side_by_side(transfer: dict[str, Any], result: dict[str, Any]) -> Section:
    """One model a source against the shared model; one expert a domain against the continued model."""
    before, after = transfer["matrix"]["minus_shared"], result["after_routing"]
    figure = two_matrices(
        Matrix("one model a domain, minus the shared model", *(ends(before, end) for end in ("mean", "low", "high"))),
        Matrix(
            "the expert it picked, minus the continued model", *(ends(after, end) for end in ("mean", "low", "high"))
        ),
        result["tasks"],
        result["tasks"],
        "Before and after routing",
        row_title="of",
        column_title="wanted for",
    )
    text = [
        "Left: what a task gains or loses when one domain is learned alone. Right: the same for the expert that a "
        "domain's images voted for, after one model was divided into experts and trained on. Domains may share one."
    ]
    return Section("Before and after routing", text=text, figures=[figure])


def effect_section(result: dict[str, Any]) -> Section:
    scope = SCOPES[result.get("scope", "ffn")]  # the page's own scope need not be said on every line
    found, nearest = (
        [effect | {"name": effect["name"].removesuffix(scope)} for effect in result[probe]]
        for probe in ("effects", "effects_knn")
    )
    rows = [Effect(e["name"], e["mean"], e["low"], e["high"], e["count"], e["verdict"]) for e in found]
    table = Table(
        "Every difference, task by task",
        ["difference", *result["tasks"]],
        [[e["name"], *(estimated(e["tasks"][task]) for task in result["tasks"])] for e in found],
    )
    knn = Table(
        "The same with nearest neighbours",
        ["difference", "mean over tasks", "verdict"],
        [[e["name"], estimated(e), e["verdict"]] for e in nearest],
    )
    text = [
        f"Primary score, chosen beforehand: linear probe with {result['num_labels']} labels, mean over tasks; points "
        f"with 95 % intervals over {len(result['seeds'])} seeds, paired. Every arm starts from the same base and sees "
        "equally many images in equally many steps.",
    ]
    return Section(
        "What it changes", text=text, figures=[forest(rows, "Differences between arms")], tables=[table, knn]
    )


def cluster_sections(run: Path, sources: list[str]) -> list[Section]:
    """Contact sheets of the first seed's clusters, with the domains that are in them."""
    kept = sorted((run / "moce").glob("seed-*"))
    if not kept:
        return []
    pools = [images.unlabelled() for images in open_together(sources, [False] * len(sources), None, None, None)]
    pool = mixture(pools)
    domain = torch.cat([torch.full((len(images),), i) for i, images in enumerate(pools)])
    labelled = replace(pool, labels=domain, class_names=tuple(images.name for images in pools))
    features: Tensor = embed(vit_mae.load(kept[0] / "base"), pool)
    return [cluster_section(Clustering.load(kept[0] / "clusters"), pool, features, labelled)]


def who_serves_whom(result: dict[str, Any]) -> Section:
    figures = [
        loads(
            {key.removeprefix("layer "): load for key, load in layers.items()},
            result["tasks"],
            f"{name}: expert by domain",
        )
        for name, layers in result["load"].items()
    ]
    cover = ", ".join(f"{task} {100 * share:.0f} %" for task, share in result["coverage"].items())
    text = [
        f"Share of a task's images whose own cluster takes the route the task picked: {cover}.",
        f"Purity of the groups: {result['purity']:.2f} of the images are of the commonest domain of their group.",
    ]
    return Section("Which expert serves which domain", text=text, figures=figures)


def what_routers_see(result: dict[str, Any]) -> Section:
    names = {
        "nmi_cluster": "NMI with cluster",
        "nmi_label": "NMI with domain",
        "token_agreement": "tokens that agree with their image",
        "pixel_r2": "R² on patch brightness and contrast",
    }
    rows = [
        [name, layer, *(f"{values[key]:.2f}" for key in names)]
        for name, layers in result["semantics"].items()
        for layer, values in layers.items()
    ]
    text = ["A router that follows what images show has a high NMI; one that follows how patches look has a high R²."]
    return Section(
        "What the routers look at", text=text, tables=[Table("Routing", ["router", "layer", *names.values()], rows)]
    )


def arm_table(result: dict[str, Any]) -> Section:
    rows = [
        [name, estimated_level(levels["mean"]), *(f"{levels['tasks'][task]['mean']:.1f}" for task in result["tasks"])]
        for name, levels in result["levels"].items()
    ]
    return Section(
        "Every arm", tables=[Table("Accuracy in percent", ["arm", "mean over tasks", *result["tasks"]], rows)]
    )


def estimated_level(interval: dict[str, Any]) -> str:
    if interval["low"] is None:
        return f"{interval['mean']:.1f}"
    return f"{interval['mean']:.1f} [{interval['low']:.1f}, {interval['high']:.1f}]"


def what_it_takes(result: dict[str, Any]) -> Section:
    """What would have to be true for a user's data to gain, said from the bounds that were measured."""
    oracle = [e for e in result["effects"] if (e["left"], e["right"]) == ("oracle", "continued")]
    apart = [e for e in result["effects"] if (e["left"], e["right"]) == ("separate", "continued")]
    text = []
    if oracle:
        text.append(
            f"The bound: experts of the true domains gain {estimated(oracle[0])} points ({oracle[0]['verdict']}). "
            "Experts of clusters can hardly be expected to gain more than these."
        )
    if apart:
        text.append(f"No sharing at all gains {estimated(apart[0])} points at equal images ({apart[0]['verdict']}).")
    text.append(
        "Your data may gain from experts when its own matrix shows semantic harm, when the shared model's curve is "
        "flat, when a task's images fall into few clusters, and when enough of the network is divided: --expert-scope "
        "encoder or autoencoder, or separate models for the domains that conflict."
    )
    return Section("What would have to be true for your data to gain", text=text)


def arm_curves(result: dict[str, Any]) -> Section:
    series = {
        name: ([step for step, _ in points], [loss for _, loss in points], None, None)
        for name, points in result["losses"].items()
    }
    figure = curves(series, "optimiser steps after the base", "training loss", "Training loss of the arms, first seed")
    return Section("Training of the arms", text=["A lower loss is not yet a better feature."], figures=[figure])
