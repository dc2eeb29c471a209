# SPDX-License-Identifier: Apache-2.0
"""The arms of the experiment with experts: every one starts from the same base and gets the same images and steps.

random-init      the network before it learned anything: the floor
base             where all other arms start
continued        the base, trained on: the fair baseline
moce             experts of clusters found without labels; each task takes the route its images vote for
moce-gate        the same with a learned gate instead of fixed groups
random-clusters  experts of groups of the same sizes without meaning: the floor
oracle           experts of the true domains: what any clustering could give
token-moe        experts chosen token by token: the control
separate         one model a domain, each with its domain's share of every batch: no sharing at all
wider            no experts, but as many hidden units as all experts together: is it only size?
"""

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.allocate.clusters import sinkhorn
from anabranch.allocate.clusters.groups import group_clusters
from anabranch.allocate.clusters.record import Clustering
from anabranch.data.images import Images
from anabranch.data.streams import ShuffledIndices, StratifiedIndices, derived_seed
from anabranch.jobs.transfer.clusters import fingerprint
from anabranch.jobs.transfer.corpus import at_most, mixture
from anabranch.jobs.transfer.effects import arm_name, mean_scores, picked_scores
from anabranch.jobs.transfer.embed import embed
from anabranch.jobs.transfer.measure import Corpus, probe_tasks, shared_model, thinned
from anabranch.jobs.transfer.pretrain_experts import save_experts
from anabranch.jobs.transfer.stages import pixel_statistics
from anabranch.measure.semantics import pixel_routing, routing_semantics
from anabranch.mixture.context import Context, route
from anabranch.mixture.layer import routings
from anabranch.models import vit_mae
from anabranch.reuse.customize import choose
from anabranch.reuse.extract import extract
from anabranch.specialize import moce, token_moe
from anabranch.specialize.mae import MaskedAutoencoding, masked_images
from anabranch.train.loop import TrainConfig, train
from anabranch.train.publish import replace_folder, write_json

LOOK_IMAGES = 300
"""Test images of each task that the routers are watched on."""


@dataclass(frozen=True, kw_only=True)
class ArmSettings:
    steps: int = 1500
    batch_size: int = 60
    learning_rate: float = 3e-3
    warmup_steps: int = 60
    num_experts: int = 5
    num_clusters: int = 15
    expert_scope: str = "ffn"
    """Of the experts that the page is about, whose runs are kept."""
    num_labels: int = 300
    num_draws: int = 5


@dataclass(frozen=True)
class Arm:
    name: str
    seed: int
    scope: str = "ffn"

    @property
    def key(self) -> str:
        return f"{arm_name(self.name, self.scope)}.seed-{self.seed}"

    @property
    def stream_seed(self) -> int:
        """Of the batches and masks: others than the base has seen, the same for every arm."""
        return derived_seed("second stage", self.seed)


@dataclass(frozen=True)
class Bench:
    """What every arm of one run is given."""

    settings: ArmSettings
    corpus: Corpus
    run: Path

    @property
    def pool(self) -> Images:
        return mixture(self.corpus.sources)

    @property
    def domains(self) -> Tensor:
        """(N,) the source of every image of the pool."""
        return torch.cat([torch.full((len(images),), i) for i, images in enumerate(self.corpus.sources)])


def run_arm(bench: Bench, arm: Arm) -> dict[str, Any]:
    """Train one arm from the seed's base and probe it on every task."""
    started = time.perf_counter()
    base = vit_mae.load(shared_model(bench.run, arm.seed))
    work: dict[str, Callable[..., dict[str, Any]]] = {
        "random-init": untrained,
        "base": lambda bench, arm, base: {"scores": probe_tasks(base, bench.corpus.tasks, bench.settings, arm.seed)},
        "continued": continued,
        "wider": wider,
        "token-moe": tokens,
        "separate": separate,
        "moce": clustered,
        "moce-gate": clustered,
        "random-clusters": clustered,
        "oracle": clustered,
    }
    result = work[arm.name](bench, arm, base)
    return {"arm": arm.name, "scope": arm.scope, "seed": arm.seed, "seconds": time.perf_counter() - started, **result}


def learn(bench: Bench, objective: nn.Module, stream: Any, arm: Arm, batch_size: int | None = None) -> list[float]:
    settings = bench.settings
    config = TrainConfig(
        steps=settings.steps,
        batch_size=batch_size or settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=min(settings.warmup_steps, settings.steps // 2),
        seed=arm.seed,
    )
    return train(objective, stream, config).losses


def shuffled(bench: Bench, model: nn.Module, arm: Arm, **ids: Tensor) -> Any:
    indices = ShuffledIndices(len(bench.pool), bench.settings.batch_size, arm.stream_seed)
    return masked_images(bench.pool, model, indices, seed=arm.stream_seed, **ids)


def untrained(bench: Bench, arm: Arm, base: nn.Module) -> dict[str, Any]:
    """The floor: the same network before it learned anything."""
    config = copy.deepcopy(base.config)
    return {"scores": probe_tasks(vit_mae.fresh(config, arm.seed), bench.corpus.tasks, bench.settings, arm.seed)}


def continued(bench: Bench, arm: Arm, base: nn.Module) -> dict[str, Any]:
    losses = learn(bench, MaskedAutoencoding(base), shuffled(bench, base, arm), arm)
    return {"scores": probe_tasks(base, bench.corpus.tasks, bench.settings, arm.seed), "losses": thinned(losses)}


def wider(bench: Bench, arm: Arm, base: nn.Module) -> dict[str, Any]:
    """E copies of every hidden unit, their outputs divided by E: nearly the same function at first."""
    times = bench.settings.num_experts
    generator = torch.Generator().manual_seed(arm.seed)
    with torch.no_grad():
        for layer in base.vit.layers:
            first, second = layer.mlp.fc1, layer.mlp.fc2
            noise = [
                1e-2 * first.weight.std() * torch.randn(first.weight.shape, generator=generator) for _ in range(times)
            ]
            first.weight = nn.Parameter(torch.cat([first.weight + n for n in noise]))
            first.bias = nn.Parameter(first.bias.repeat(times))
            second.weight = nn.Parameter(second.weight.repeat(1, times) / times)
    return continued(bench, arm, base)


def separate(bench: Bench, arm: Arm, base: nn.Module) -> dict[str, Any]:
    """One model a domain on its share of every batch: as many images of its own as the shared model sees of them."""
    corpus, count = bench.corpus, len(bench.corpus.sources)
    batch_size = bench.settings.batch_size // count
    models = []
    for pool in corpus.sources:
        model = vit_mae.copy_of(base)
        indices = ShuffledIndices(len(pool), batch_size, arm.stream_seed)
        stream = masked_images(pool, model, indices, seed=arm.stream_seed)
        learn(bench, MaskedAutoencoding(model), stream, arm, batch_size)
        models.append(probe_tasks(model, corpus.tasks, bench.settings, arm.seed))
    return picked_scores(corpus, models, {task.name: own for task, own in zip(corpus.tasks, corpus.own, strict=True)})


def tokens(bench: Bench, arm: Arm, base: nn.Module) -> dict[str, Any]:
    settings, corpus = bench.settings, bench.corpus
    config = moce.Config(num_experts=settings.num_experts)
    model = token_moe.insert(vit_mae.copy_of(base), config, torch.Generator().manual_seed(arm.seed))
    objective = token_moe.TokenRouted(model, config, seed=arm.seed, batch_size=settings.batch_size)
    losses = learn(bench, objective, shuffled(bench, base, arm), arm)
    clusters = find_clusters(bench, base, arm.seed)
    return {
        "scores": probe_tasks(model, corpus.tasks, settings, arm.seed),
        "losses": thinned(losses),
        **watch(model.eval(), base, clusters, corpus, settings.num_experts),
    }


def find_clusters(bench: Bench, base: nn.Module, seed: int) -> Clustering:
    config = sinkhorn.Config(num_clusters=bench.settings.num_clusters, capacity_factor=1.1, min_rank=2)
    return sinkhorn.fit(embed(base, bench.pool), config, torch.Generator().manual_seed(seed))


def clustered(bench: Bench, arm: Arm, base: nn.Module) -> dict[str, Any]:
    """Experts of clusters, of random groups, or of the true domains, and the task's own choice among them."""
    settings, corpus = bench.settings, bench.corpus
    clusters = find_clusters(bench, base, arm.seed)
    ids, groups = memberships(bench, arm, clusters)
    config = moce.Config(
        num_experts=settings.num_experts,
        assignment="gate" if arm.name == "moce-gate" else "fixed",
        expert_scope=arm.scope,  # type: ignore[arg-type]
    )
    generator = torch.Generator().manual_seed(arm.seed)
    centroids = clusters.centroids if len(groups) == len(clusters) else torch.zeros(len(groups), 1)
    model = moce.insert(vit_mae.copy_of(base), centroids, groups, config, generator)
    objective = moce.ClusterConditional(model, config, seed=arm.seed, batch_size=settings.batch_size)
    if config.assignment == "fixed":
        indices: Any = StratifiedIndices(groups[ids], settings.batch_size, arm.stream_seed)
        stream = masked_images(bench.pool, base, indices, seed=arm.stream_seed, cluster=ids)
    else:
        stream = shuffled(bench, base, arm, cluster=ids)
    losses = learn(bench, objective, stream, arm)
    model.eval()
    table = moce.routes(model)
    paths = sorted({tuple(column) for column in table.T.tolist()})
    of_path = [extract(model, table.T.tolist().index(list(path))) for path in paths]
    scores = [probe_tasks(dense, corpus.tasks, settings, arm.seed) for dense in of_path]
    if arm.name == "random-clusters":  # a task has no reason to prefer one of them: their mean is what it can expect
        return {"scores": mean_scores(corpus, scores, range(len(scores))), "losses": thinned(losses)}
    votes = {task.name: vote(arm, base, clusters, table, task, corpus) for task in corpus.tasks}
    result = picked_scores(corpus, scores, {name: paths.index(path) for name, (path, _) in votes.items()})
    result |= {
        "losses": thinned(losses),
        "coverage": {name: share for name, (_, share) in votes.items()},
        "paths": paths,
    }
    if arm.name in ("moce", "moce-gate"):
        purity = group_purity(groups[ids], bench.domains, settings.num_experts)
        result |= {"purity": purity, **watch(model, base, clusters, corpus, settings.num_experts)}
    if arm.name == "moce" and arm.scope == settings.expert_scope:
        keep(bench, arm, base, clusters, model, config, groups)
    return result


def memberships(bench: Bench, arm: Arm, clusters: Clustering) -> tuple[Tensor, Tensor]:
    """(N,) the cluster of every image, (K,) the group of every cluster."""
    generator = torch.Generator().manual_seed(arm.seed)
    if arm.name == "oracle":
        return bench.domains, torch.arange(len(bench.corpus.sources))
    groups = group_clusters(clusters.centroids, clusters.sizes, bench.settings.num_experts, generator)
    if arm.name == "random-clusters":
        return clusters.labels[torch.randperm(len(clusters.labels), generator=generator)], groups
    return clusters.labels, groups


def vote(
    arm: Arm, base: nn.Module, clusters: Clustering, table: Tensor, task: Images, corpus: Corpus
) -> tuple[tuple[int, ...], float]:
    """The route of a task and the share of its training images that take it."""
    if arm.name == "oracle":
        own = corpus.own[[t.name for t in corpus.tasks].index(task.name)]
        return tuple(table[:, own].tolist()), 1.0
    labels = clusters.assign(embed(base, task.take(~task.is_test))).labels
    choice = choose(labels, table, "path")
    return choice.path, choice.coverage


def group_purity(groups: Tensor, domains: Tensor, num_groups: int) -> float:
    """Share of images whose domain is the commonest one of their group."""
    table = torch.zeros(num_groups, int(domains.max()) + 1).index_put_(
        (groups, domains), torch.ones(len(groups)), accumulate=True
    )
    return float(table.amax(1).sum() / table.sum())


@torch.no_grad()
def watch(model: nn.Module, base: nn.Module, clusters: Clustering, corpus: Corpus, num_experts: int) -> dict[str, Any]:
    """What the routers look at, and which expert serves which domain, layer by layer, on test images."""
    few = [at_most(task.take(task.is_test), LOOK_IMAGES, seed=0) for task in corpus.tasks]
    domains = np.repeat(np.arange(len(few)), [len(images) for images in few])
    pixels = torch.cat([images.store.read(torch.arange(len(images))) for images in few])
    ids = clusters.assign(torch.cat([embed(base, images) for images in few])).labels
    with route(model, Context(ids={"cluster": ids}, training=False)):
        vit_mae.encode(model, vit_mae.normalise(pixels))
    patches = base.patchify(vit_mae.normalise(pixels))
    look = [patches.mean(-1).flatten().numpy(), patches.std(-1).flatten().numpy()]
    semantics, load = {}, {}
    for layer, (name, decided) in enumerate(routings(model).items()):
        repeat = 1 if decided.per == "token" else vit_mae.num_patches(base) + 1
        chosen = decided.selected_experts[:, 0].repeat_interleave(repeat).view(len(pixels), -1)[:, 1:]
        logits = decided.router_logits if torch.isfinite(decided.router_logits).all() else decided.scores
        of_patch = logits.repeat_interleave(repeat, 0).view(len(pixels), -1, logits.shape[1])[:, 1:].flatten(0, 1)
        semantics[f"layer {layer}"] = routing_semantics(chosen.numpy(), ids.numpy(), domains) | {
            "pixel_r2": pixel_routing(of_patch.numpy(), *look),
            "where": name,
        }
        share = np.stack(
            [[(chosen[domains == d] == e).float().mean().item() for d in range(len(few))] for e in range(num_experts)]
        )
        load[f"layer {layer}"] = share.tolist()
    return {"semantics": semantics, "load": load}


def keep(
    bench: Bench, arm: Arm, base: nn.Module, clusters: Clustering, model: nn.Module, config: Any, groups: Tensor
) -> None:
    """Leave a run that `anabranch customize` understands."""
    distance = clusters.assign(embed(base, bench.pool)).distance
    health = clusters.health | {"distance_p95": float(np.quantile(distance.numpy(), 0.95))}
    found = replace(clusters, health=health, encoder_sha256=fingerprint(base))

    summary = {"method": "moce", "images": len(bench.pool), "steps": bench.settings.steps}
    summary |= {"settings": asdict(bench.settings), **pixel_statistics(bench.pool)}

    def write(folder: Path) -> None:
        base.save_pretrained(folder / "base")
        found.save(folder / "clusters")
        (folder / "model").mkdir()
        save_experts(folder / "model", model, config, groups)
        write_json(folder / "summary.json", summary)

    replace_folder(write, bench.run / "moce" / f"seed-{arm.seed}")
