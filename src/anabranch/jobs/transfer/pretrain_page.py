# SPDX-License-Identifier: Apache-2.0
"""The page of a run of `pretrain`: clusters one can look at, who learns what, and how training went."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from anabranch.allocate.clusters.record import Clustering
from anabranch.data.images import Images
from anabranch.errors import UsageError
from anabranch.jobs.transfer.corpus import check_same_images, mixture, open_together
from anabranch.jobs.transfer.embed import embed
from anabranch.models.bridge import open_model, read_config
from anabranch.report.figures import ClusterSheet, cluster_sheets, curves
from anabranch.report.page import Page, Section, Table, write
from anabranch.train.metrics import read_metrics

TERMS = ("loss", "masked", "siamese", "balance", "distill", "entropy")
"""What is drawn of metrics.jsonl."""


def write_pretrain_page(run: Path, images: Images | None = None) -> Path:
    """report.html of a run of `pretrain`, finished or not; contact sheets need the images, which are looked for."""
    images = images or reopened(run)
    summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").exists() else {}
    sections = [*expert_sections(summary), *subnet_sections(summary), *training_sections(run)]
    if images is not None and (run / "clusters").is_dir():
        base = open_model(run / "base")
        sections.insert(0, cluster_section(Clustering.load(run / "clusters"), images, embed(base, images)))
    warnings = summary.get("clusters", {}).get("health", {}).get("warnings", [])
    if warnings:
        sections.insert(0, Section("Mind", text=warnings, kind="caution"))
    page = Page(
        title="What was learned" if summary else "What was learned (unfinished)",
        lead=pretrain_lead(summary),
        facts=[
            (name, summary[name])
            for name in ("method", "images", "steps", "images_seen", "quarantine")
            if name in summary
        ],
        sections=sections,
    )
    return write(page, run / "report.html")


def reopened(run: Path) -> Images | None:
    """The images that the run learned from, where they still are what they were."""
    file = run / "config.resolved.yaml"
    if not file.exists() or not (run / "clusters").is_dir():
        return None
    config = read_config(run / "base")
    specs = yaml.safe_load(file.read_text(encoding="utf-8"))["images"]
    try:
        images = mixture(open_together(specs, [False] * len(specs), config["image_size"], config["num_channels"], None))
        check_same_images(run, [images])
    except UsageError:
        return None
    return images


def pretrain_lead(summary: dict[str, Any]) -> list[str]:
    if not summary:
        return ["The run is not finished. The same command with --resume goes on."]
    lead = [f"{summary['method']} learned from {summary['images']:,} images in {summary['steps']:,} steps."]
    if summary.get("dead_experts"):
        lead.append(f"Experts without images: {', '.join(summary['dead_experts'])}.")
    elif "routes" in summary:
        lead.append("Every expert of every layer serves some clusters.")
    elif "paths" in summary:
        lead.append(f"There are {len(summary['paths'])} sub-nets to take out, and the model of all images.")
    if "clusters" in summary:
        health = summary["clusters"]["health"]
        lead.append(f"{summary['clusters']['line']}; stability {health['stability']:.2f} over resamples.")
    return lead


def expert_sections(summary: dict[str, Any]) -> list[Section]:
    if "routes" not in summary:
        return []
    clusters = [f"c{k}" for k in range(summary["clusters"]["count"])]
    rows = [[f"layer {layer}", *row] for layer, row in enumerate(summary["routes"])]
    routes = Table("The expert of every cluster", ["layer", *clusters], rows)
    load = Table(
        "Share of the images that each expert serves",
        ["layer", *(f"expert {e}" for e in range(len(summary["load"][0])))],
        [[f"layer {layer}", *(f"{100 * share:.0f} %" for share in row)] for layer, row in enumerate(summary["load"])],
    )
    return [Section("Who learns what", tables=[routes, load])]


def subnet_sections(summary: dict[str, Any]) -> list[Section]:
    """Every sub-net with its clusters, and what of the training reached it."""
    if "paths" not in summary:
        return []
    spent, sizes = summary["account"], summary["clusters"]["sizes"]
    clusters: list[list[int]] = [[] for _ in summary["paths"]]
    for cluster, row in enumerate(summary["path_of_cluster"]):
        clusters[row].append(cluster)
    names = [f"sub-net {row}" for row in range(len(clusters))]
    digits = [" ".join(map(str, path)) for path in summary["paths"]]
    served = [" ".join(f"c{k}" for k in own) for own in clusters]
    images = [sum(sizes[k] for k in own) for own in clusters]
    seen = summary["directions"]
    directions = [seen["sub_nets"].get(str(row)) for row in range(len(clusters))]
    columns = (names, digits, served, images, spent["steps_touching_path"], spent["images_seen_by_path"], directions)
    shared = ("all images", "", "all", sum(sizes), spent["steps_touching_shared"], spent["images_seen_by_shared"], None)
    table = Table(
        "What each sub-net learned from",
        ["model", "group in each stage", "clusters", "images", "steps", "images seen", "directions"],
        [*zip(*columns, strict=True), shared],
        notes=[
            "Steps count the turns of a sub-net and of those that it grew out of, phase 0 among them.",
            f"Directions hold 95 % of the variance of the features; the model of phase 0 has {seen['base']}. Fewer "
            "than half of these are a collapse.",
        ],
    )
    return [Section("Who learns what", tables=[table])]


def stages_of(run: Path) -> list[tuple[str, Path]]:
    """What trained, in order, and its folder."""
    phases = sorted(run.glob("phase-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    named = [(folder.name.replace("-", " "), folder) for folder in phases]
    return [("the base", run / "base-training"), *named, ("this stage", run)]


def training_sections(run: Path) -> list[Section]:
    """Loss curves of every stage that has metrics."""
    figures = []
    for name, folder in stages_of(run):
        if (folder / "metrics.jsonl").exists() and (lines := read_metrics(folder / "metrics.jsonl")):
            keys = [key for key in TERMS if key in lines[0]]
            series = {key: ([l["step"] for l in lines], [l[key] for l in lines], None, None) for key in keys}
            figures.append(curves(series, "optimiser steps", "training loss", f"Training of {name}"))
    return [Section("Training", figures=figures)] if figures else []


def cluster_section(clusters: Clustering, images: Images, features: Tensor, domains: Images | None = None) -> Section:
    """A card a cluster: typical images, images at its border, and whatever else is in it."""
    text = ["A cluster that shows one kind of image will make an expert of it; a mixed one will not."]
    return Section(
        "The clusters",
        text=text,
        figures=[cluster_sheets(cluster_cards(clusters, images, features, domains), "The clusters")],
    )


def cluster_cards(
    clusters: Clustering, images: Images, features: Tensor, domains: Images | None = None, each: int = 8
) -> list[ClusterSheet]:
    """Cards of all clusters; `domains` are the same images with labels that are counted in each cluster."""
    near = torch.cdist(clusters.centroids, clusters.centroids).fill_diagonal_(torch.inf).argmin(1)
    found = clusters.assign(features)
    generator = torch.Generator().manual_seed(clusters.seed)
    cards = []
    for k in range(len(clusters)):
        members = (clusters.labels == k).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        picked = {
            "nearest": members[found.distance[members].argsort()],
            "border": members[found.margin[members].argsort()],
            "random": shuffled,
        }
        names, purity = ((), None) if domains is None else label_lift(domains, members)
        cards.append(
            ClusterSheet(
                name=f"cluster {k}",
                size=len(members),
                **{name: images.store.read(rows[:each]).numpy() for name, rows in picked.items()},
                labels=names,
                purity=purity,
                sibling=f"cluster {int(near[k])}",
            )
        )
    return cards


def label_lift(domains: Images, members: Tensor, most: int = 3) -> tuple[list[tuple[str, float]], float]:
    """The labels that are commoner here than everywhere, with their lift, and the share of the commonest one."""
    here = torch.bincount(domains.labels[members], minlength=len(domains.class_names)).double()
    everywhere = torch.bincount(domains.labels, minlength=len(domains.class_names)).double()
    lift = (here / here.sum()) / (everywhere / everywhere.sum()).clamp(min=1e-12)
    order = lift.argsort(descending=True)[:most].tolist()
    named = [(domains.class_names[i], float(lift[i])) for i in order if here[i] >= 5 and lift[i] > 1]
    return named, float(here.max() / here.sum())
