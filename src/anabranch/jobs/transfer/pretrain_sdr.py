# SPDX-License-Identifier: Apache-2.0
"""A base, clusters of its features, a tree over the clusters, and a super-net with a sub-net for each of them.

RUN/base-training, RUN/base     phase 0: one model of all images, which also finds the clusters
RUN/phase-1, RUN/phase-2, …     checkpoints and metrics of the phases in which more and more stages are split
RUN/model                       model.safetensors with all sub-nets, paths.json with their digits
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anabranch.allocate.clusters import tree
from anabranch.allocate.clusters.record import Clustering
from anabranch.data.images import Images
from anabranch.errors import AnabranchError, UsageError
from anabranch.jobs.progress import say
from anabranch.jobs.transfer.clusters import described, obtain_clusters
from anabranch.jobs.transfer.learners import family_of, learner, training
from anabranch.jobs.transfer.sdr_checks import base_steps, check_request
from anabranch.jobs.transfer.sdr_monitor import look
from anabranch.jobs.transfer.settings import PretrainSettings
from anabranch.jobs.transfer.stages import (
    finish,
    learner_of,
    open_pool,
    open_run,
    plain_stream,
    publish,
    publish_once,
    second_stage,
    start_model,
    train_stage,
)
from anabranch.models import resnet
from anabranch.specialize.sdr import phases, supernet
from anabranch.specialize.sdr.objective import Config as LearningConfig
from anabranch.specialize.sdr.objective import SubnetLearning, grown
from anabranch.specialize.sdr.phases import Phase
from anabranch.specialize.sdr.schedule import Rounds
from anabranch.specialize.sdr.supernet import SuperNet
from anabranch.train.publish import write_json
from anabranch.train.signals import StopFlag

PATHS = "paths.json"


def pretrain(settings: PretrainSettings) -> dict[str, Any]:
    images = open_pool(settings)
    count = check_request(settings, len(images))
    with StopFlag() as stop, open_run(settings, images) as run:
        plain = obtain_plain(settings, images, run)
        stop.check("stopped before clustering")
        clusters = obtain_clusters(settings, plain.model, images, run, count)
        planned = plan(settings, plain.model, clusters)
        schedules = schedule(settings, planned)
        learned, stages, seen = learn(settings, plain, images, clusters, planned, schedules, run)
        publish(run / "model", lambda folder: save_subnets(folder, learned.net, planned[-1]))
        summary = describe(settings, learned.net, clusters, planned, schedules, stages) | {"directions": seen}
        finish(run, settings, images, summary)
    return summary


def obtain_plain(settings: PretrainSettings, images: Images, run: Path) -> nn.Module:
    """Phase 0, trained now or before, with its heads; only a base that was given gets new ones."""
    model = start_model(settings, images, run)
    plain: nn.Module = learner(learner_of(settings)).objective(model, seed=settings.seed)
    if settings.base is None:
        say(f"phase 0: one model of all images ({settings.ssl})")
        stream = plain_stream(settings, images, model, settings.seed)
        with failing_in("phase 0"):
            train_stage(settings, plain, stream, base_steps(settings), run / "base-training", settings.learning_rate)
        publish_once(run / "base", lambda folder: model.eval().save_pretrained(folder))
    return plain.eval()


def plan(settings: PretrainSettings, model: nn.Module, clusters: Clustering) -> list[Phase]:
    """What is split when, and which clusters each path learns from."""
    generator = torch.Generator().manual_seed(settings.seed)
    stages = len(model.config.depths)
    digits = tree.grow(clusters.centroids, clusters.sizes, settings.groups, settings.split_stages, generator)
    if settings.paths == "random":
        digits = tree.shuffled(digits, generator)
    steps = settings.steps - base_steps(settings)
    return phases.plan(digits, stages, steps, progressive=settings.progressive)


def schedule(settings: PretrainSettings, planned: Sequence[Phase]) -> list[Rounds]:
    return [phases.rounds(p, settings.paths_a_step, settings.anchor_share, settings.seed) for p in planned]


def learn(
    settings: PretrainSettings,
    plain: nn.Module,
    images: Images,
    clusters: Clustering,
    planned: Sequence[Phase],
    schedules: Sequence[Rounds],
    run: Path,
) -> tuple[SubnetLearning, list[dict[str, Any]], dict[str, Any]]:
    """All phases after phase 0; those that are finished are read back. Last, the directions of the features."""
    learned, stages, seen = unsplit(settings, plain, images), [], {}
    rate = settings.phase_rate * training(learner_of(settings), settings.learning_rate)["learning_rate"]
    for number, (phase, rounds) in enumerate(zip(planned, schedules, strict=True), 1):
        say(f"phase {number}: {len(phase.paths)} sub-nets, {phase.num_split} stages split, {phase.steps} steps")
        learned = grown(learned, phase.paths, phase.num_split, phase.steps)
        stream = phases.batches(phase, rounds, clusters.labels, settings.batch_size, views(settings, images, plain))
        with failing_in(f"phase {number}"):
            stages.append(train_stage(settings, learned, stream, phase.steps, run / f"phase-{number}", rate))
        seen = look(learned.net, plain.model, images, number)
    return learned, stages, seen


@contextmanager
def failing_in(phase: str) -> Iterator[None]:
    """A failure of the training itself says in which phase."""
    try:
        yield
    except AnabranchError as error:
        if type(error) is not AnabranchError:  # a wrong request, or a stop, is the same in every phase
            raise
        raise AnabranchError(f"{phase}, {error}") from error


def unsplit(settings: PretrainSettings, plain: nn.Module, images: Images) -> SubnetLearning:
    """The super-net before any split, on the base; without progress on fresh weights."""
    model, heads = plain.model, plain
    if not settings.progressive:
        model = family_of(learner_of(settings)).fresh(plain.model.config, second_stage(settings) % 2**31)
        heads = learner(learner_of(settings)).objective(model, seed=second_stage(settings) % 2**31)
    given = {"groups": settings.groups, "split_ratio": settings.split_ratio, "teacher": settings.teacher}
    config = LearningConfig(
        ssl=settings.ssl,
        heads=settings.heads,
        kd_coef=settings.kd_coef,
        kd_schedule=settings.kd_schedule,
        kd_view=settings.kd_view,
    )
    net = supernet.supernet(model, supernet.Config(**given))  # type: ignore[arg-type]
    return SubnetLearning(net, heads.projector, heads.predictor, config, total_steps=1)


def views(settings: PretrainSettings, images: Images, plain: nn.Module) -> Any:
    """Indices -> the stream of their views."""

    def make(indices: Any) -> Any:
        made = learner(learner_of(settings))
        return made.stream(images, plain.model, indices, seed=second_stage(settings), augment=settings.augment)

    return make


def save_subnets(folder: Path, net: SuperNet, phase: Phase) -> None:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    facts = {
        "config": asdict(net.config),
        "num_split": net.num_split,
        "paths": [list(path) for path in net.paths],
        "of_cluster": phase.of_cluster.tolist(),
    }
    write_json(folder / PATHS, facts)


def load_subnets(run: Path) -> tuple[SuperNet, Tensor]:
    """The super-net of a finished run, and the path (K,) that learned from each cluster."""
    file = run / "model" / PATHS
    if not file.is_file():
        raise UsageError(f"{run} holds no finished sub-nets", hint="pretrain --method sdr, or --resume it")
    facts = json.loads(file.read_text(encoding="utf-8"))
    net = supernet.supernet(resnet.load(run / "base"), supernet.Config(**facts["config"]))
    net = supernet.grow(net, [tuple(path) for path in facts["paths"]], facts["num_split"])
    net.load_state_dict(load_file(run / "model" / "model.safetensors"))
    return net.eval(), torch.tensor(facts["of_cluster"])


def describe(
    settings: PretrainSettings,
    net: SuperNet,
    clusters: Clustering,
    planned: Sequence[Phase],
    schedules: Sequence[Rounds],
    stages: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """What summary.json says about the sub-nets and what they cost."""
    spent = phases.account(base_steps(settings), planned, schedules, settings.batch_size)
    plain = sum(p.numel() for p in net.extract(0).parameters())
    return {
        **described(clusters),
        "steps": spent.total_steps,
        "images_seen": spent.images_seen,
        "untouched": [name for stage in stages for name in stage["untouched"]],
        "paths": [list(path) for path in net.paths],
        "path_of_cluster": planned[-1].of_cluster.tolist(),
        "phases": [{"paths": len(p.paths), "num_split": p.num_split, "steps": p.steps} for p in planned],
        "account": asdict(spent),
        "parameters": {"all": sum(p.numel() for p in net.parameters()), "one_path": plain},
    }
