# SPDX-License-Identifier: Apache-2.0
"""Is there negative transfer? Train a model on each source and one on all, probe every model on every task.

Every finished model is kept as a small JSON file, so that a stopped run goes on where it was.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from anabranch import __version__
from anabranch.data.images import Images
from anabranch.data.streams import ShuffledIndices
from anabranch.errors import Stopped, UsageError
from anabranch.jobs.parallel import side_by_side
from anabranch.jobs.progress import Progress
from anabranch.jobs.results import measured
from anabranch.jobs.settings import plain_values_of
from anabranch.jobs.together import Beat, rank, share
from anabranch.jobs.transfer.corpus import (
    at_most,
    check_names,
    check_positive,
    check_same_images,
    is_same,
    mixture,
    open_together,
    with_split,
)
from anabranch.jobs.transfer.embed import embed
from anabranch.jobs.transfer.inside import look_inside
from anabranch.jobs.transfer.learners import family_of, learner, training
from anabranch.jobs.transfer.settings import MeasureSettings
from anabranch.measure.intervals import interval
from anabranch.measure.probes import PROBES, ProbeConfig, check_task, probe
from anabranch.measure.relatedness import agreement
from anabranch.measure.transfer import SHARED, TransferScores, summarise
from anabranch.report.result import Results
from anabranch.train.loop import TrainConfig, train
from anabranch.train.publish import replace_folder, write_json
from anabranch.train.run_folder import RunFolder, differing_keys
from anabranch.train.signals import StopFlag

PRIMARY = "linear"


@dataclass(frozen=True)
class Corpus:
    sources: tuple[Images, ...]
    tasks: tuple[Images, ...]
    own: tuple[int, ...]
    """For each task its source, or -1 where no source has its name and relatedness decides."""


@dataclass(frozen=True)
class Cell:
    """One model to train: which images, for how long, with which seed."""

    model: str
    members: tuple[int, ...]
    seed: int
    steps: int
    batch_size: int
    images_a_source: int | None = None

    @property
    def key(self) -> str:
        return f"{self.model}.seed-{self.seed}"


def measure(settings: MeasureSettings) -> Results:
    """Train, probe, summarise; writes transfer.json and report.html into the run and returns what the former holds."""
    corpus = open_corpus(settings)
    with StopFlag() as stop, RunFolder.open(settings.out, plain_values_of(settings), settings.resume) as run:
        check_same_images(run.path, [*corpus.sources, *corpus.tasks])
        cells = plan(settings, corpus)
        made_with = {"settings": plain_values_of(settings), "version": __version__}
        shared = (settings, corpus, run.path)
        results = run_cells(run.path / "models", cells, train_and_probe, shared, made_with, settings.workers, stop)
        result = conclude(settings, corpus, cells, results)
        if rank() == 0:
            write_json(run.path / "transfer.json", result)
    from anabranch.jobs.transfer.measure_page import write_transfer_page

    if rank() == 0:
        write_transfer_page(settings.out)
    return measured(result)


def open_corpus(settings: MeasureSettings) -> Corpus:
    check_positive(settings, "steps", "seeds", "batch_size", "num_labels", "num_draws", "probe_points", "max_images")
    source_names = check_names(settings.sources, "sources", 2)
    task_names = check_names(settings.tasks, "tasks", 1)
    specs = [*settings.sources, *settings.tasks]
    both = [any(is_same(spec, task) for task in settings.tasks) for spec in settings.sources]
    opened = open_together(
        specs,
        both + [True] * len(task_names),
        settings.image_size,
        settings.channels,
        settings.preset,
        learner(settings.objective).FAMILY,
    )
    # a folder that is source and task gives its training half only, or the test images would be learned from
    sources = [
        (with_split(images) if is_task else images).unlabelled()
        for images, is_task in zip(opened[: len(source_names)], both, strict=True)
    ]
    for images in sources:
        if len(images) < 2:
            raise UsageError(f"source {images.name} has too few images", expected="at least 2", received=len(images))
    tasks = [at_most(with_split(task), settings.max_images, seed=0) for task in opened[len(source_names) :]]
    for task in tasks:
        check_task(task.labels.numpy(), task.is_test.numpy())
    own = tuple(source_names.index(name) if name in source_names else -1 for name in task_names)
    return Corpus(tuple(sources), tuple(tasks), own)


def plan(settings: MeasureSettings, corpus: Corpus) -> list[Cell]:
    """Every model to train under the budget; `steps` are those of a model of one source."""
    count = len(corpus.sources)
    everything = tuple(range(count))
    sizes = [len(images) for images in corpus.sources]
    groups = {images.name: (i,) for i, images in enumerate(corpus.sources)} | {SHARED: everything}
    if settings.leave_one_out:
        groups |= {f"without-{corpus.sources[i].name}": tuple(j for j in everything if j != i) for i in everything}
    cells = []
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        for name, members in groups.items():
            cell = Cell(name, members, seed, settings.steps, settings.batch_size)
            if settings.budget == "equal-epochs":
                share = sum(sizes[i] for i in members) / (sum(sizes) / count)
                cell = replace(cell, steps=max(round(settings.steps * share), 1))
            elif settings.budget == "equal-images":
                cell = replace(cell, images_a_source=max(min(sizes) // len(members), 1))
            elif settings.budget == "equal-exposure":
                share = sum(sizes[i] for i in members) / sum(sizes)
                cell = replace(cell, batch_size=max(round(settings.batch_size * share), 1))
            cells.append(cell)
    return cells


def run_cells(
    folder: Path,
    cells: Sequence[Any],
    work: Callable[[Any, Any], Any],
    shared: Any,
    made_with: dict[str, Any],
    workers: int | None,
    stop: StopFlag,
) -> dict[str, Any]:
    """{cell key: result of `work(shared, cell)`}, done now or read from a former attempt with the same settings."""
    folder.mkdir(exist_ok=True)
    made_with = json.loads(json.dumps(made_with))  # as a file gives it back
    results = {cell.key: read_cell(path, made_with) for cell in cells if (path := folder / f"{cell.key}.json").exists()}
    mine = share([cell for cell in cells if cell.key not in results])
    beat = Beat(len(mine), stop)  # from here on all have looked at the folder, and one of them may add to it
    with Progress(folder.name, total=len(results) + len(mine), done=len(results)) as progress:
        for cell, result in side_by_side(work, shared, mine, workers, beat):
            write_json(folder / f"{cell.key}.json", {"made_with": made_with, **result})
            results[cell.key] = result
            beat.left -= 1
            progress.advance(f"{cell.key}: {result['seconds']:.0f} s")
    beat.until_all_are_done()
    others = [cell for cell in cells if cell.key not in results and (folder / f"{cell.key}.json").exists()]
    results |= {cell.key: read_cell(folder / f"{cell.key}.json", made_with) for cell in others}
    if beat.stopped:
        what = f"stopped with {len(results)} of {len(cells)} {folder.name} finished"
        raise Stopped(what, hint="the same command with --resume")
    return {cell.key: results[cell.key] for cell in cells}  # not in the order in which they were finished


def read_cell(path: Path, made_with: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    before = result.pop("made_with", {})
    if before != made_with:
        names = differing_keys(before, made_with)
        raise UsageError(
            f"{path} was made with other settings",
            expected="the settings of this command",
            received=f"others in {', '.join(names[:3])}",
            hint="another --out",
        )
    return result


def shared_model(run: Path, seed: int) -> Path:
    """Where the model that learned from all sources is kept: a base for experts."""
    return run / "shared" / f"seed-{seed}"


def heads_file(folder: Path) -> Path:
    """Beside a shared model what its learner had besides: projectors and the like, for training that goes on."""
    return folder / "heads.safetensors"


def save_shared(folder: Path, model: torch.nn.Module, objective: torch.nn.Module) -> None:
    model.eval().save_pretrained(folder)
    own = {f"model.{name}" for name in model.state_dict()}
    heads = {name: tensor for name, tensor in objective.state_dict().items() if name not in own}
    if heads:
        save_file(heads, heads_file(folder))


def train_and_probe(shared: tuple[MeasureSettings, Corpus, Path], cell: Cell) -> dict[str, Any]:
    """One model from scratch, probed on all tasks on its way and at its end."""
    settings, corpus, run = shared
    started = time.perf_counter()
    pools = [corpus.sources[i] for i in cell.members]
    if cell.images_a_source is not None:
        pools = [at_most(pool, cell.images_a_source, cell.seed) for pool in pools]
    pool = mixture(pools)
    taught, family = learner(settings.objective), family_of(settings.objective)
    model = family.build(settings.preset, image_size=pool.image_size, channels=pool.channels, seed=cell.seed)
    indices = ShuffledIndices(len(pool), cell.batch_size, cell.seed)
    stream = taught.stream(pool, model, indices, seed=cell.seed, augment=settings.augment)
    objective = taught.objective(model, seed=cell.seed)
    points = {round(cell.steps * (i + 1) / settings.probe_points) for i in range(settings.probe_points)}
    scores: dict[int, dict[str, Any]] = {}
    if cell.model == SHARED:  # the floor: before anything was learned
        scores[0] = probe_tasks(model, corpus.tasks, settings, cell.seed)

    def on_step(step: int, logs: Mapping[str, float]) -> None:
        if step in points:
            scores[step] = probe_tasks(model, corpus.tasks, settings, cell.seed)

    config = train_config(settings, cell)
    trained = train(objective, stream, config, on_step=on_step)
    result = {
        "model": cell.model,
        "seed": cell.seed,
        "steps": cell.steps,
        "batch_size": cell.batch_size,
        "images": len(pool),
        "losses": thinned(trained.losses),
        "scores": {str(step): value for step, value in sorted(scores.items())},
        "seconds": time.perf_counter() - started,
    }
    if cell.model == SHARED:
        result |= look_inside(settings, objective, corpus.sources, corpus.tasks, cell.seed)
        replace_folder(lambda folder: save_shared(folder, model, objective), shared_model(run, cell.seed))
    return result


def train_config(settings: MeasureSettings, cell: Cell) -> TrainConfig:
    return TrainConfig(
        steps=cell.steps,
        batch_size=cell.batch_size,
        **training(settings.objective, settings.learning_rate),
        warmup_steps=min(settings.warmup_steps, cell.steps // 2),
        seed=cell.seed,
    )


def thinned(losses: Sequence[float], most: int = 60) -> list[list[float]]:
    """At most `most` points (step, loss) of a curve, each the mean of the losses since the last."""
    ends = np.linspace(0, len(losses), min(most, len(losses)) + 1).round().astype(int)
    return [[int(end), float(np.mean(losses[start:end]))] for start, end in pairwise(ends)]


def probe_tasks(
    model: torch.nn.Module, tasks: Sequence[Images], settings: Any, seed: int, features: Callable[..., Tensor] = embed
) -> dict[str, Any]:
    """{task: {probe: {accuracy, choose, report}}} of frozen features."""
    config = ProbeConfig(num_labels=settings.num_labels, num_draws=settings.num_draws)
    return {
        task.name: {
            name: asdict(scores)
            for name, scores in probe(
                features(model, task).numpy(), task.labels.numpy(), task.is_test.numpy(), config, seed
            ).items()
        }
        for task in tasks
    }


def conclude(
    settings: MeasureSettings, corpus: Corpus, cells: Sequence[Cell], results: dict[str, Any]
) -> dict[str, Any]:
    """Scores of all cells -> everything that transfer.json says."""
    sources = [images.name for images in corpus.sources]
    tasks = [task.name for task in corpus.tasks]
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    related = np.mean([results[f"{SHARED}.seed-{seed}"]["relatedness"] for seed in seeds], axis=0)
    own = tuple(int(related[t].argmax()) if named < 0 else named for t, named in enumerate(corpus.own))

    def table(models: Sequence[str], probe_name: str, part: str) -> np.ndarray:
        cell = [[results[f"{model}.seed-{seed}"]["scores"] for model in models] for seed in seeds]
        return np.array([[[list(s.values())[-1][t][probe_name][part] for t in tasks] for s in row] for row in cell])

    def scores(probe_name: str) -> TransferScores:
        without = [f"without-{name}" for name in sources]
        return TransferScores(
            sources=tuple(sources),
            tasks=tuple(tasks),
            own=own,
            **{part: table([*sources, SHARED], probe_name, part) for part in ("accuracy", "choose", "report")},
            without=table(without, probe_name, "accuracy") if settings.leave_one_out else None,
        )

    summaries = {name: summarise(scores(name)) for name in PROBES}
    best = [sources.index(task["best"]) for task in summaries[PRIMARY]["tasks"]]
    return {
        "sources": {images.name: len(images) for images in corpus.sources},
        "test_images": {task.name: int(task.is_test.sum()) for task in corpus.tasks},
        "quarantine": {i.name: len(i.quarantine) for i in (*corpus.sources, *corpus.tasks) if i.quarantine},
        "seeds": settings.seeds,
        "budget": settings.budget,
        "budget_in_words": budget_in_words(settings, cells),
        "primary": f"{PRIMARY} probe, {settings.num_labels} labels, {settings.num_draws} draws",
        **summaries[PRIMARY],
        "knn": summaries["knn"],
        "relatedness": related.tolist(),
        "relatedness_agrees": agreement(related, best),
        "conflict": np.mean([results[f"{SHARED}.seed-{seed}"]["conflict"] for seed in seeds], axis=0).tolist(),
        "curves": curves(results, tasks),
        "seconds": sum(result["seconds"] for result in results.values()),
    }


def budget_in_words(settings: MeasureSettings, cells: Sequence[Cell]) -> str:
    shared = next(cell for cell in cells if cell.model == SHARED)
    alone = [cell for cell in cells if len(cell.members) == 1]
    what = {
        "equal-steps": "every model gets the same number of optimiser steps and images; the shared one divides them",
        "equal-images": "every model learns from equally many different images: composition alone differs",
        "equal-epochs": "every model sees each of its images equally often: the shared one trains longer",
        "equal-exposure": "every image is seen equally often by its own model and the shared one, in as many steps",
    }[settings.budget]
    return (
        f"{settings.budget}: {what} (one source: {span(c.steps for c in alone)} steps of "
        f"{span(c.batch_size for c in alone)} images; shared: {shared.steps} steps of {shared.batch_size})"
    )


def span(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def curves(results: dict[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Accuracy over steps, mean over tasks with its interval over seeds, for every model."""
    models: dict[str, list[dict[str, Any]]] = {}
    for result in results.values():
        models.setdefault(result["model"], []).append(result)
    made = {}
    for name, runs in models.items():
        steps = list(runs[0]["scores"])
        spread = [
            interval([float(np.mean([run["scores"][step][t][PRIMARY]["accuracy"] for t in tasks])) for run in runs])
            for step in steps
        ]
        made[name] = {
            "steps": [int(step) for step in steps],
            "accuracy": [point.as_dict() for point in spread],
            "per_task": {
                t: [float(np.mean([run["scores"][step][t][PRIMARY]["accuracy"] for run in runs])) for step in steps]
                for t in tasks
            },
            "loss": runs[0]["losses"],
        }
    return made
