# SPDX-License-Identifier: Apache-2.0
"""For one task the ordinary checkpoint that serves it: choose a route, extract it, prove it, hand it over."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.allocate.clusters.record import Clustering
from anabranch.data.images import Images, open_images
from anabranch.errors import CheckFailed, UsageError
from anabranch.jobs.card import model_card
from anabranch.jobs.corpus import at_most, short_name, with_split
from anabranch.jobs.embed import embed
from anabranch.jobs.measure import write_json
from anabranch.jobs.pretrain import fingerprint, load_experts, pixel_statistics
from anabranch.jobs.settings import CustomizeSettings
from anabranch.measure.probes import ProbeConfig, probe
from anabranch.mixture.context import Context, route
from anabranch.models import vit_mae
from anabranch.reuse.customize import Choice, along, choose, facts, histogram, path_votes
from anabranch.reuse.extract import extract
from anabranch.specialize.moce import routes
from anabranch.train.publish import publish_folder

TOLERANCE = 1e-6
"""Largest difference between the features of the extracted and the routed model, times their size where that is above
one: only a folded gate value rounds."""
PROOF_IMAGES = 64


def customize(settings: CustomizeSettings) -> dict[str, Any]:
    """Write settings.out, a transformers folder with model card and customize.json; returns what the latter holds."""
    if not settings.task:
        raise UsageError("no task was named", expected="--task DIR", hint="a folder of the task's images")
    summary = read_summary(settings.run)
    plain = summary["method"] == "mae"
    base = vit_mae.load(settings.run / ("model" if plain else "base"))
    task = open_task(settings, base)
    if plain:
        dense = base
        said: dict[str, Any] = {"method": "mae", "path": [], "warnings": []}
    else:
        clusters = Clustering.load(settings.run / "clusters")
        check_encoder(clusters, base, settings.run)
        model = load_experts(settings.run, base, clusters)
        dense, said = choose_and_extract(settings, base, model, clusters, task)
    said["warnings"] += foreign_pixels(summary, task)
    vit = vit_mae.to_plain(dense)
    said |= {
        "task": task.name,
        "task_images": len(task),
        "unreadable_images": [bad.path for bad in task.quarantine],
        "run": str(settings.run),
        "parameters": sum(p.numel() for p in vit.parameters()),
        "macs": vit_mae.macs(dense),
    }
    publish_folder(lambda folder: write_model(folder, vit, said), settings.out)
    tell(said, settings.out)
    return said


def read_summary(run: Path) -> dict[str, Any]:
    file = run / "summary.json"
    if not file.is_file():
        state = "no such folder" if not run.exists() else "an unfinished run, or another kind of folder"
        raise UsageError(
            f"{run} is not a finished run of anabranch pretrain",
            expected="a folder with summary.json",
            received=state,
            hint="finish it with --resume",
        )
    summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if summary["method"] == "token-moe":
        raise UsageError(
            f"{run} is a TokenMoE: its experts are chosen token by token, so no dense model equals it",
            hint="pretrain --method moce",
        )
    return summary


def open_task(settings: CustomizeSettings, base: nn.Module) -> Images:
    """The training images of the task; with labels, where they are asked for, half of them to score routes on."""
    labelled = settings.select == "knn"
    task = open_images(
        settings.task, image_size=base.config.image_size, channels=base.config.num_channels, labelled=labelled
    )
    if labelled and task.is_test is not None:
        task = replace(task.take(~task.is_test), is_test=None)  # the task's own test images are never looked at
    task = with_split(task) if labelled else task.unlabelled()
    return replace(at_most(task, settings.max_images, seed=0), name=short_name(settings.task))


def foreign_pixels(summary: dict[str, Any], task: Images) -> list[str]:
    """A warning where the task's brightness or colours lie far from those that were learned from."""
    theirs = pixel_statistics(task)["pixel_mean"]
    learned = list(zip(summary.get("pixel_mean", []), summary.get("pixel_std", []), strict=True))
    far = [f"{t:.2f} instead of {m:.2f}" for t, (m, s) in zip(theirs, learned, strict=False) if abs(t - m) > s]
    return (
        [f"the task's pixels have another mean ({', '.join(far)} of full brightness): inverted, or scaled?"]
        if far
        else []
    )


def check_encoder(clusters: Clustering, base: nn.Module, run: Path) -> None:
    if clusters.encoder_sha256 != fingerprint(base):
        raise UsageError(
            f"{run}/base is not the encoder that the clusters were found with",
            expected=f"an encoder with the fingerprint {clusters.encoder_sha256}",
            received=fingerprint(base),
            hint="restore RUN/base as pretrain wrote it",
        )


def choose_and_extract(
    settings: CustomizeSettings, base: nn.Module, model: nn.Module, clusters: Clustering, task: Images
) -> tuple[nn.Module, dict[str, Any]]:
    """Images -> clusters of the *base* encoder -> votes -> the route's experts as a dense model."""
    found = clusters.assign(embed(base, task))
    table = routes(model)
    if settings.select == "knn":
        choice, tried = choose_by_labels(settings, base, model, table, found.labels, task)
    else:
        choice, tried = choose(found.labels, table, settings.select), None
    if choice is None:
        dense, said = base, {"path": [], "warnings": ["no route beats the plain base on the labels given"]}
    else:
        dense = extract(model, choice.cluster)
        difference = proof(model, dense, choice.cluster, task)
        said = facts(choice, found.distance, clusters.health["distance_p95"]) | {"largest_difference": difference}
    return dense, {"method": "moce", "select": settings.select, "tried": tried, **said}


def choose_by_labels(
    settings: CustomizeSettings, base: nn.Module, model: nn.Module, table: Tensor, labels: Tensor, task: Images
) -> tuple[Choice | None, list[dict[str, Any]]]:
    """The best of the most voted routes, and of the base, by nearest neighbours on the task's own labels."""
    counts = histogram(labels, table.shape[1])
    choices = [along(path, counts, table) for path in list(path_votes(counts, table))[: settings.knn_routes]]
    candidates: list[tuple[Choice | None, nn.Module]] = [(None, base)]
    candidates += [(choice, extract(model, choice.cluster)) for choice in choices]
    config = ProbeConfig(num_labels=settings.num_labels)
    labels_N, is_test_N = task.labels.numpy(), task.is_test.numpy()
    scores = [
        probe(embed(dense, task).numpy(), labels_N, is_test_N, config, seed=0)["knn"].accuracy
        for _, dense in candidates
    ]
    tried = [
        {"path": None if choice is None else list(choice.path), "knn": score}
        for (choice, _), score in zip(candidates, scores, strict=True)
    ]
    return candidates[max(range(len(scores)), key=scores.__getitem__)][0], tried


@torch.no_grad()
def proof(model: nn.Module, dense: nn.Module, cluster: int, images: Images) -> float:
    """Largest difference between the tokens of the routed and of the extracted model; more than 1e-6 fails."""
    few = images.take(torch.arange(min(PROOF_IMAGES, len(images))))
    pixel_values = vit_mae.normalise(few.store.read(torch.arange(len(few))))
    with route(model, Context(ids={"cluster": torch.full((len(few),), cluster)})):
        routed = vit_mae.encode(model, pixel_values)
    difference = float((routed - vit_mae.encode(dense, pixel_values)).abs().max())
    allowed = TOLERANCE * max(1.0, float(routed.abs().max()))
    if difference > allowed:
        raise CheckFailed(
            "the extracted model does not equal the routed one", expected=f"at most {allowed}", received=difference
        )
    return difference


def write_model(folder: Path, vit: nn.Module, said: dict[str, Any]) -> None:
    vit.save_pretrained(folder)
    config = vit.config
    processor = vit_mae.image_processor(config.image_size, config.num_channels)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n", encoding="utf-8")
    write_json(folder / "customize.json", said)
    (folder / "README.md").write_text(model_card(said, config), encoding="utf-8")


def tell(said: dict[str, Any], out: Path) -> None:
    if said.get("coverage") is not None:
        print(f"{said['task']}: experts {said['path']}, taken by {said['coverage']:.0%} of its images")
    if said["unreadable_images"]:
        print(f"{len(said['unreadable_images'])} unreadable images are listed in customize.json")
    for warning in said["warnings"]:
        print(f"warning: {warning}")
    print(f"model  {out}   ({said['parameters']:,} parameters, {said['macs']:,} multiply-accumulates an image)")
    print(f'       transformers.AutoModel.from_pretrained("{out}", add_pooling_layer=False)')
