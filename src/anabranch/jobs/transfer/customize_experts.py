# SPDX-License-Identifier: Apache-2.0
"""Which experts serve a task: its images vote for a route, the route becomes a dense model, and that is proven."""

from typing import Any

import torch
from torch import Tensor, nn

from anabranch.allocate.clusters.record import Clustering
from anabranch.data.images import Images
from anabranch.errors import CheckFailed
from anabranch.jobs.transfer.clusters import check_encoder
from anabranch.jobs.transfer.embed import embed
from anabranch.jobs.transfer.pretrain_experts import load_experts
from anabranch.jobs.transfer.settings import CustomizeSettings
from anabranch.measure.probes import ProbeConfig, probe
from anabranch.mixture.context import Context, route
from anabranch.models import vit_mae
from anabranch.reuse.customize import Choice, along, choose, facts, histogram, path_votes
from anabranch.reuse.extract import extract
from anabranch.specialize.moce import routes

TOLERANCE = 1e-6
"""Largest difference between the features of the extracted and the routed model, times their size where that is above
one: only a folded gate value rounds."""
PROOF_IMAGES = 64
ORIGIN = "A plain Vision Transformer, taken out of a mixture of cluster-conditional experts (MoCE, arXiv 2402.05382)."


def choose_and_extract(
    settings: CustomizeSettings, task: Images, summary: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Images -> clusters of the *base* encoder -> votes -> the route's experts as a dense model."""
    base, clusters = vit_mae.load(settings.run / "base"), Clustering.load(settings.run / "clusters")
    check_encoder(clusters, base, settings.run)
    model = load_experts(settings.run, base, clusters)
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
    said |= in_words(said, len(task))
    return dense, {"method": "moce", "select": settings.select, "tried": tried, **said}


def in_words(said: dict[str, Any], task_images: int) -> dict[str, str]:
    """What the model card and the terminal say about the choice."""
    if said.get("coverage") is None:
        return {"origin": ORIGIN, "how": "No route through experts was chosen: this is the plain model."}
    how = (
        f"The route {said['path']} through the experts was chosen because {said['coverage']:.0%} of the task's "
        f"{task_images:,} training images belong to clusters that take it "
        f"(effective number of clusters: {said['effective_clusters']:.1f})."
    )
    chosen = f"experts {said['path']}, taken by {said['coverage']:.0%} of its images"
    return {"origin": ORIGIN, "how": how, "chosen": chosen}


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
