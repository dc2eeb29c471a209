# SPDX-License-Identifier: Apache-2.0
"""The arms of the experiment with sub-nets: every one starts from the same base and sees equally many images in all.

random-init       the network before it learned anything: the floor
base              where all other arms start: phase 0
continued         the base, trained on: the fair baseline
by-cluster        the same, every batch from one cluster: what comes from the batches alone, without sub-nets
multi-crop        the same with two small crops beside the two views: "just train better", at twice the cost
sdr               sub-nets of clusters found without labels; each task takes the one its images vote for
sdr-random        the same images dealt to sub-nets without meaning: the floor
sdr-16            sixteen sub-nets of smaller clusters, in place of as few as there are groups in a stage
sdr-kd            with distillation from the shared model
sdr-common-heads  one projector and predictor for all sub-nets, in place of a pair for each
sdr-ratio-50/75   half, or three quarters of a split stage's channels common, in place of a quarter
sdr-at-once       fresh weights, every stage split from the first step, as many steps as base and phases together
separate          one model a cluster, each with the turns that its sub-net would have had: nothing is shared
oracle            one model a true domain, each with its share of the turns: what any clustering could give
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from anabranch.allocate.clusters import sinkhorn, tree
from anabranch.allocate.clusters.record import Clustering
from anabranch.data.streams import ShuffledIndices, derived_seed
from anabranch.data.views import Views
from anabranch.errors import UsageError
from anabranch.jobs.transfer.corpus import at_most, mixture
from anabranch.jobs.transfer.effects import mean_scores, picked_scores
from anabranch.jobs.transfer.embed import embed
from anabranch.jobs.transfer.learners import learner, training
from anabranch.jobs.transfer.measure import PRIMARY, Corpus, heads_file, probe_tasks, shared_model, thinned
from anabranch.jobs.transfer.sdr_monitor import directions_of
from anabranch.models import resnet
from anabranch.reuse.nearest import best, leave_one_out
from anabranch.specialize.sdr import phases, supernet
from anabranch.specialize.sdr.channels import SHARED
from anabranch.specialize.sdr.objective import Config as LearningConfig
from anabranch.specialize.sdr.objective import SubnetLearning, grown
from anabranch.specialize.sdr.phases import Phase
from anabranch.specialize.sdr.schedule import PathIndices, Rounds
from anabranch.train.loop import TrainConfig, train

VARIANTS: dict[str, dict[str, Any]] = {
    "sdr": {},
    "sdr-random": {"shuffled": True},
    "sdr-16": {"clusters": 16},
    "sdr-kd": {"kd_coef": 0.25},
    "sdr-common-heads": {"heads": "common"},
    "sdr-at-once": {"progressive": False},
    "sdr-ratio-50": {"split_ratio": 0.5},
    "sdr-ratio-75": {"split_ratio": 0.75},
}
"""The settings that are other than in `sdr`."""
SAMPLED = 4
"""Sub-nets of random images that are probed."""
LAST_STEPS = 50
"""Steps at the end of training over which the spread of the embeddings is averaged."""


@dataclass(frozen=True, kw_only=True)
class SdrArmSettings:
    objective: str = "simsiam"
    base_steps: int = 1000
    """Of the base, which `measure` has trained."""
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 0.03
    """Of the second stage of plain models."""
    subnet_rate: float = 0.06
    """Of sub-nets, whose gradients are a mean over turns: a group's own is halved by a step of two."""
    warmup_steps: int = 60
    groups: int = 4
    split_stages: int = 4
    clusters: int = 4
    """One for every sub-net, as many as there are paths, or fewer."""
    split_ratio: float = 0.25
    heads: Literal["own", "common"] = "own"
    kd_coef: float = 0.0
    progressive: bool = True
    shuffled: bool = False
    """Deal the images to the clusters at random."""
    turns_a_step: int = 2
    shared_share: float = 0.2
    num_labels: int = 300
    num_draws: int = 5


@dataclass(frozen=True)
class SdrArm:
    name: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.name}.seed-{self.seed}"

    @property
    def stream_seed(self) -> int:
        """Of batches and views: others than the base has seen, the same for every arm."""
        return derived_seed("second stage", self.seed)


@dataclass(frozen=True)
class SdrBench:
    """What every arm of one run is given."""

    settings: SdrArmSettings
    corpus: Corpus
    run: Path

    @property
    def pool(self) -> Any:
        return mixture(self.corpus.sources)


def run_sdr_arm(bench: SdrBench, arm: SdrArm) -> dict[str, Any]:
    """Train one arm from the seed's base and probe it on every task."""
    started = time.process_time()  # of this process, which has one thread: neighbours do not count
    work: dict[str, Callable[..., dict[str, Any]]] = {
        "random-init": untrained,
        "base": base_alone,
        "continued": continued,
        "by-cluster": continued,
        "multi-crop": continued,
        "separate": separate,
        "oracle": separate,
        **dict.fromkeys(VARIANTS, subnets),
    }
    result = work[arm.name](bench, arm, load_plain(bench, arm))
    return {"arm": arm.name, "seed": arm.seed, "seconds": time.process_time() - started, **result}


def load_plain(bench: SdrBench, arm: SdrArm) -> nn.Module:
    """The seed's base with its heads, as `measure` left them."""
    folder = shared_model(bench.run, arm.seed)
    plain: nn.Module = learner(bench.settings.objective).objective(resnet.load(folder), seed=arm.seed)
    plain.load_state_dict(load_file(heads_file(folder)), strict=False)
    return plain


def probed(bench: SdrBench, arm: SdrArm, model: nn.Module) -> dict[str, Any]:
    return probe_tasks(model.eval(), bench.corpus.tasks, bench.settings, arm.seed)


def account(total_steps: int, images: int, own_steps: float, own_images: float) -> dict[str, Any]:
    """What the arm spent in all, and what of it reached the model that one task is given."""
    return {
        "account": {
            "total_steps": total_steps,
            "images_seen": images,
            "steps_touching_path": own_steps,
            "images_seen_by_path": own_images,
        }
    }


def untrained(bench: SdrBench, arm: SdrArm, plain: nn.Module) -> dict[str, Any]:
    model = resnet.fresh(plain.model.config, arm.seed)
    return {"scores": probed(bench, arm, model), "ranks": directions_of([model], bench.pool), **account(0, 0, 0, 0)}


def base_alone(bench: SdrBench, arm: SdrArm, plain: nn.Module) -> dict[str, Any]:
    steps, images = bench.settings.base_steps, bench.settings.base_steps * bench.settings.batch_size
    spent = account(steps, images, steps, images)
    return {"scores": probed(bench, arm, plain.model), "ranks": directions_of([plain.model], bench.pool), **spent}


@dataclass
class Learned:
    """What training said of itself."""

    losses: list[float] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        return {"losses": thinned(self.losses), "spread": float(np.mean(self.spreads[-LAST_STEPS:]))}


def learn(
    bench: SdrBench, objective: nn.Module, stream: Any, arm: SdrArm, steps: int, batch_size: int, learned: Learned
) -> None:
    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        **training(bench.settings.objective, bench.settings.learning_rate),
        warmup_steps=min(bench.settings.warmup_steps, steps // 2),
        seed=arm.seed,
    )
    found = train(objective, stream, config, on_step=lambda step, logs: learned.spreads.append(logs["spread"]))
    learned.losses += found.losses


def continued(bench: SdrBench, arm: SdrArm, plain: nn.Module) -> dict[str, Any]:
    settings, learned = bench.settings, Learned()
    views = Views(num_small=2) if arm.name == "multi-crop" else Views()
    indices: Any = ShuffledIndices(len(bench.pool), settings.batch_size, arm.stream_seed)
    if arm.name == "by-cluster":
        labels = find_clusters(bench, arm, resnet.copy_of(plain.model)).labels
        members = [(labels == k).nonzero()[:, 0] for k in range(settings.clusters)]
        rounds = Rounds(len(members), 1, settings.shared_share, arm.stream_seed)
        indices = PathIndices(rounds, members, len(bench.pool), settings.batch_size)
    made = learner(settings.objective)
    stream = made.stream(bench.pool, plain.model, indices, seed=arm.stream_seed, views=views)
    learn(bench, plain, stream, arm, settings.steps, settings.batch_size, learned)
    total = settings.base_steps + settings.steps
    spent = account(total, total * settings.batch_size, total, total * settings.batch_size)
    scores = probed(bench, arm, plain.model)
    return {"scores": scores, "ranks": directions_of([plain.model], bench.pool), **learned.told(), **spent}


def find_clusters(bench: SdrBench, arm: SdrArm, base: nn.Module) -> Clustering:
    config = sinkhorn.Config(num_clusters=bench.settings.clusters, capacity_factor=1.1, min_rank=2)
    return sinkhorn.fit(embed(base, bench.pool), config, torch.Generator().manual_seed(arm.seed))


def subnets(bench: SdrBench, arm: SdrArm, plain: nn.Module) -> dict[str, Any]:
    """All phases from the base, the choice of every task, and as many sub-nets probed as the arm needs."""
    settings = replace(bench.settings, learning_rate=bench.settings.subnet_rate, **VARIANTS[arm.name])
    bench, corpus = replace(bench, settings=settings), bench.corpus
    base = resnet.copy_of(plain.model)
    clusters = find_clusters(bench, arm, base)
    generator = torch.Generator().manual_seed(arm.seed)
    digits = tree.grow(clusters.centroids, clusters.sizes, settings.groups, settings.split_stages, generator)
    labels = clusters.labels
    if settings.shuffled:
        labels = labels[torch.randperm(len(labels), generator=generator)]
    first = settings.base_steps if settings.progressive else 0
    steps = settings.base_steps + settings.steps - first
    planned = phases.plan(digits, len(base.config.depths), steps, progressive=settings.progressive)
    schedules = [phases.rounds(p, settings.turns_a_step, settings.shared_share, arm.stream_seed) for p in planned]
    net, learned = train_phases(bench, arm, plain, planned, schedules, labels)
    spent = phases.account(first, planned, schedules, settings.batch_size)
    told = learned.told() | account(
        spent.total_steps, spent.images_seen, spent.steps_touching_path[0], spent.images_seen_by_path[0]
    )
    told |= {"ranks": directions_of(map(net.extract, range(len(net.paths))), bench.pool)}
    if settings.shuffled:  # a task has no reason to prefer one of them: their mean is what it can expect
        models = [net.extract(row) for row in range(min(SAMPLED, len(net.paths)))]
        scores = mean_scores(corpus, [probed(bench, arm, model) for model in models], range(len(models)))
        return told | {"scores": scores}
    votes = {task.name: vote(base, clusters, planned[-1], task) for task in corpus.tasks}
    picked = {name: row for name, (row, _) in votes.items()}
    told |= {
        "coverage": {name: share for name, (_, share) in votes.items()},
        "purity": {task.name: purity(bench, planned[-1].of_cluster[labels] == picked[task.name], t)
                   for t, task in enumerate(corpus.tasks)},
    }  # fmt: skip
    if arm.name != "sdr":
        return told | {"scores": of_picked(bench, arm, lambda row: net.extract(row), picked)}
    return told | every_subnet(bench, arm, net, picked)


def every_subnet(bench: SdrBench, arm: SdrArm, net: supernet.SuperNet, picked: dict[str, int]) -> dict[str, Any]:
    """All sub-nets and the shared model beside them on every task, and the choices that labels would make."""
    models = [net.extract(row) for row in range(len(net.paths))]
    scores = [probed(bench, arm, model) for model in models]
    shared = net.extract(SHARED)
    of_shared = probed(bench, arm, shared)
    candidates, candidate_scores = [shared, *models], [of_shared, *scores]
    return {
        **picked_scores(bench.corpus, scores, picked),
        "wrong": of_others(bench, scores, picked),
        "shared": of_shared,
        "regret": {name: lost(scores, name, row) for name, row in picked.items()},
        "by_neighbours": by_neighbours(bench, arm, candidates, candidate_scores, bench.settings.num_labels),
        "by_all_neighbours": by_neighbours(bench, arm, candidates, candidate_scores, None),
    }


def of_others(bench: SdrBench, scores: list[dict[str, Any]], picked: dict[str, int]) -> dict[str, Any]:
    """Every task's mean score with the sub-nets that other tasks picked and it did not."""
    wrong = {}
    for name, mine in picked.items():
        others = sorted(set(picked.values()) - {mine})
        if not others:
            raise UsageError("all tasks picked one sub-net: there is no wrong choice to compare with", received=picked)
        wrong[name] = mean_scores(bench.corpus, scores, others)[name]
    return wrong


def of_picked(
    bench: SdrBench, arm: SdrArm, model_of: Callable[[int], nn.Module], picked: dict[str, int]
) -> dict[str, Any]:
    """Every task's score with the model that it picked, no other one being looked at."""
    scores: dict[str, Any] = {}
    for task in bench.corpus.tasks:
        scores |= probe_tasks(model_of(picked[task.name]).eval(), [task], bench.settings, arm.seed)
    return scores


def purity(bench: SdrBench, mine: Tensor, task: int) -> float:
    """Share of a sub-net's images that come from the task's own source."""
    domains = torch.cat([torch.full((len(images),), i) for i, images in enumerate(bench.corpus.sources)])
    return float((domains[mine] == bench.corpus.own[task]).float().mean())


def lost(scores: list[dict[str, Any]], task: str, row: int) -> float:
    """What the best sub-net, found on half of the test images, has over the chosen one on the other half."""
    linear = [score[task][PRIMARY] for score in scores]
    winner = best([score["choose"] for score in linear])
    return float(linear[winner]["report"] - linear[row]["report"])


def train_phases(
    bench: SdrBench,
    arm: SdrArm,
    plain: nn.Module,
    planned: Sequence[Phase],
    schedules: Sequence[Rounds],
    labels: Tensor,
) -> tuple[supernet.SuperNet, Learned]:
    settings, made = bench.settings, learner(bench.settings.objective)
    if not settings.progressive:
        plain = made.objective(resnet.fresh(plain.model.config, arm.seed), seed=arm.seed)
    given = supernet.Config(groups=settings.groups, split_ratio=settings.split_ratio)
    config = LearningConfig(ssl=settings.objective, heads=settings.heads, kd_coef=settings.kd_coef)  # type: ignore[arg-type]
    current = SubnetLearning(supernet.supernet(plain.model, given), plain.projector, plain.predictor, config, 1)
    learned = Learned()

    def views(indices: Any) -> Any:
        return made.stream(bench.pool, plain.model, indices, seed=arm.stream_seed)

    for phase, rounds in zip(planned, schedules, strict=True):
        current = grown(current, phase.paths, phase.num_split, phase.steps)
        stream = phases.batches(phase, rounds, labels, settings.batch_size, views)
        learn(bench, current, stream, arm, phase.steps, settings.batch_size, learned)
    return current.net.eval(), learned


def vote(base: nn.Module, clusters: Clustering, last: Phase, task: Any) -> tuple[int, float]:
    """The sub-net that most of a task's training images belong to, and their share; no label is looked at."""
    found = clusters.assign(embed(base, task.take(~task.is_test))).labels
    counts = torch.bincount(last.of_cluster[found], minlength=len(last.paths))
    return int(counts.argmax()), float(counts.max() / counts.sum())


def by_neighbours(
    bench: SdrBench, arm: SdrArm, models: Sequence[nn.Module], scores: list[dict[str, Any]], num_labels: int | None
) -> dict[str, Any]:
    """The choice by labelled training images, all or so many; the shared model is the first and wins ties."""
    picked, chosen, regret = {}, {}, {}
    for task in bench.corpus.tasks:
        few = task.take(~task.is_test)
        few = few if num_labels is None else at_most(few, num_labels, arm.seed)
        right = [float(leave_one_out(embed(model, few), few.labels).float().mean()) for model in models]
        winner = best(right)
        picked[task.name], chosen[task.name] = winner, scores[winner][task.name]
        regret[task.name] = lost(scores, task.name, winner)
    return {"picked": picked, "scores": chosen, "regret": regret}


def separate(bench: SdrBench, arm: SdrArm, plain: nn.Module) -> dict[str, Any]:
    """One model a cluster or a domain, as many turns each as all sub-nets have in the mean, nothing shared."""
    settings, corpus, learned = bench.settings, bench.corpus, Learned()
    if arm.name == "oracle":
        labels = torch.cat([torch.full((len(images),), i) for i, images in enumerate(corpus.sources)])
        picked = {task.name: own for task, own in zip(corpus.tasks, corpus.own, strict=True)}
        count = len(corpus.sources)
    else:
        base = resnet.copy_of(plain.model)
        clusters = find_clusters(bench, arm, base)
        labels, count = clusters.labels, len(clusters)
        last = phases.phase(torch.arange(count)[:, None], 1, 1)
        picked = {task.name: vote(base, clusters, last, task)[0] for task in corpus.tasks}
    share = settings.batch_size // settings.turns_a_step
    steps = max(settings.steps * settings.turns_a_step // count, 1)
    models = {}
    for k in range(count) if arm.name == "oracle" else sorted(set(picked.values())):  # what nobody picks is not trained
        mine = load_plain(bench, arm)
        pool = bench.pool.take((labels == k).nonzero()[:, 0])
        indices = ShuffledIndices(len(pool), share, arm.stream_seed)
        stream = learner(settings.objective).stream(pool, mine.model, indices, seed=arm.stream_seed)
        learn(bench, mine, stream, arm, steps, share, learned)
        models[k] = mine.model
    first, images = settings.base_steps, settings.base_steps * settings.batch_size
    spent = account(first + steps * count, images + steps * count * share, first + steps, images + steps * share)
    told = spent | learned.told() | {"ranks": directions_of(models.values(), bench.pool)}
    if arm.name == "oracle":
        return told | picked_scores(corpus, [probed(bench, arm, models[k]) for k in range(count)], picked)
    return told | {"scores": of_picked(bench, arm, models.__getitem__, picked)}
