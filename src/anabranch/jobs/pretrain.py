# SPDX-License-Identifier: Apache-2.0
"""Learn from folders of images: a base, clusters of its features, and experts for the clusters.

RUN/base        the masked autoencoder that the experts start from, a transformers folder
RUN/clusters    centroids, labels and health of the clustering
RUN/checkpoints, metrics.jsonl   of the stage named by --method (a base trained here has its own in RUN/base-training)
RUN/model       what was learned: model.safetensors with experts.json, or a transformers folder for --method mae
RUN/summary.json, report.html    what a person reads
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anabranch.allocate.clusters import kmeans, sinkhorn
from anabranch.allocate.clusters.groups import group_clusters
from anabranch.allocate.clusters.record import Clustering
from anabranch.data.images import Images, write_quarantine
from anabranch.data.streams import ShuffledIndices, StratifiedIndices, derived_seed
from anabranch.errors import CheckFailed, UsageError
from anabranch.jobs.checks import check_settings, check_summary, expert_config, num_clusters
from anabranch.jobs.corpus import at_most, check_same_images, mixture, open_together
from anabranch.jobs.embed import embed
from anabranch.jobs.measure import write_json
from anabranch.jobs.settings import PretrainSettings
from anabranch.measure.clusters.stability import stability
from anabranch.models import vit_mae
from anabranch.specialize import moce, token_moe
from anabranch.specialize.mae import MaskedAutoencoding, masked_images
from anabranch.train.loop import TrainConfig, train
from anabranch.train.processes import processes
from anabranch.train.publish import replace_folder
from anabranch.train.run_folder import RunFolder
from anabranch.train.signals import StopFlag
from anabranch.train.touch import digest

EXPERTS = "experts.json"
TOUCHED = "touched.json"
STABILITY_IMAGES = 2000
STABILITY_RESAMPLES = 5
COLLAPSED = 0.8
COLLAPSE_HINT = "try a larger aux_loss_coef, more noise_std, or assignment=fixed"
LOOK_IMAGES = 2000


def say(line: str) -> None:
    if processes().is_main_process:
        print(line, flush=True)


def pretrain(settings: PretrainSettings) -> dict[str, Any]:
    """Run all stages, those that are finished are skipped on resume; returns what summary.json holds."""
    check_settings(settings)
    images = open_pool(settings)
    if settings.method != "mae":
        num_clusters(settings, len(images))
    with StopFlag() as stop, RunFolder.open(settings.out, _plain(settings), settings.resume) as run:
        note_images(images, run.path)
        base = obtain_base(settings, images, run.path)
        if settings.method == "mae":
            trained, summary = train_plain(settings, base, images, run.path)
            publish(run.path / "model", lambda folder: trained.save_pretrained(folder))
        else:
            stop.check("stopped before clustering")
            clusters = obtain_clusters(settings, base, images, run.path)
            config, groups = expert_config(settings), expert_groups(settings, clusters)
            trained, summary = train_experts(settings, config, base, images, clusters, groups, run.path)
            publish(run.path / "model", lambda folder: save_experts(folder, trained, config, groups))
            summary |= describe_experts(settings, trained, clusters)
        finish(run.path, settings, images, summary)
    check_summary(summary)
    say(f"\nrun   {settings.out}\npage  {settings.out / 'report.html'}")
    return summary


def _plain(settings: PretrainSettings) -> dict[str, Any]:
    values = {name: value for name, value in asdict(settings).items() if name not in ("out", "resume")}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return plain | {"base": None if settings.base is None else str(settings.base)}


def open_pool(settings: PretrainSettings) -> Images:
    """All images of all folders at the model's size."""
    size, channels = settings.image_size, settings.channels
    if settings.base is not None:
        config = vit_mae.load(settings.base).config
        size, channels = config.image_size, config.num_channels
    preset = None if settings.base is not None else settings.preset
    images = mixture(open_together(settings.images, [False] * len(settings.images), size, channels, preset))
    say(f"{len(images):,} images of {images.channels} x {images.image_size} x {images.image_size}")
    return images


def note_images(images: Images, run: Path) -> None:
    """Unreadable images are listed in quarantine.jsonl; a resumed run has to see the images that it began with."""
    with processes().main_process_first():
        check_same_images(run, [images])
    if processes().is_main_process and images.quarantine:
        write_quarantine(run / "quarantine.jsonl", images.quarantine)
        say(f"{len(images.quarantine)} unreadable images are listed in {run / 'quarantine.jsonl'}")


def obtain_base(settings: PretrainSettings, images: Images, run: Path) -> nn.Module:
    """The model that the stage starts from: given, finished before, or trained now."""
    if settings.base is not None:
        base = vit_mae.load(settings.base)
        with processes().main_process_first():
            if not (run / "base").exists():
                replace_folder(base.save_pretrained, run / "base")
        return base
    if (run / "base").exists():
        return vit_mae.load(run / "base")
    base = vit_mae.build(settings.preset, image_size=images.image_size, channels=images.channels, seed=settings.seed)
    if settings.method == "mae":
        return base
    say("base: a masked autoencoder of all images")
    steps = settings.base_steps or settings.steps
    train_stage(
        settings,
        MaskedAutoencoding(base),
        plain_stream(settings, images, base, settings.seed),
        steps,
        run / "base-training",
    )
    publish(run / "base", lambda folder: base.eval().save_pretrained(folder))
    return base


def second_stage(settings: PretrainSettings) -> int:
    """Seed of the batches and masks after the base: others than it has seen."""
    return derived_seed("second stage", settings.seed)


def plain_stream(settings: PretrainSettings, images: Images, model: nn.Module, seed: int) -> Any:
    indices = ShuffledIndices(len(images), settings.batch_size, seed)
    return masked_images(images, model, indices, seed=seed, augment=settings.augment)


def train_stage(
    settings: PretrainSettings, objective: nn.Module, stream: Any, steps: int, folder: Path, rate: float | None = None
) -> dict[str, Any]:
    """Train, or go on training, in a folder of its own; fails if training left every named tensor as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(
        steps=steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate if rate is None else rate,
        warmup_steps=min(settings.warmup_steps, steps // 2),
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        save_every=settings.save_every,
        mixed_precision=settings.mixed_precision,
    )
    before, trainable = digest(objective), [n for n, p in objective.named_parameters() if p.requires_grad]
    result = train(objective, stream, config, folder, resume=(folder / "checkpoints").exists(), report=say)
    if result.losses and processes().is_main_process:
        write_json(folder / TOUCHED, touched(before, digest(objective), trainable))
    processes().wait_for_everyone()
    facts = json.loads((folder / TOUCHED).read_text(encoding="utf-8"))
    say(f"{facts['named']} tensors named, {facts['changed']} changed, {len(facts['untouched'])} of the named as before")
    return {"steps": result.step, "images_seen": result.step * settings.batch_size, **facts}


def touched(before: dict[str, str], after: dict[str, str], trainable: list[str]) -> dict[str, Any]:
    """What training named and changed; raises if it changed a tensor that it did not name."""
    changed = {name for name in before if before[name] != after[name]}
    if strangers := changed - set(trainable):
        raise CheckFailed("tensors changed that were not to change", received=", ".join(sorted(strangers)[:5]))
    untouched = [name for name in trainable if name not in changed]
    return {"named": len(trainable), "changed": len(changed), "untouched": untouched}


def train_plain(
    settings: PretrainSettings, model: nn.Module, images: Images, run: Path
) -> tuple[nn.Module, dict[str, Any]]:
    rate = settings.learning_rate if settings.base is None else settings.expert_learning_rate
    stream = plain_stream(settings, images, model, settings.seed if settings.base is None else second_stage(settings))
    summary = train_stage(settings, MaskedAutoencoding(model), stream, settings.steps, run, rate)
    return model.eval(), summary


def obtain_clusters(settings: PretrainSettings, base: nn.Module, images: Images, run: Path) -> Clustering:
    """Clusters of the base's features, fitted by the first process and read by all."""
    with processes().main_process_first():
        if not (run / "clusters").exists():
            clusters = fit_clusters(settings, base, images)
            replace_folder(clusters.save, run / "clusters")
        clusters = Clustering.load(run / "clusters")
    say(f"clusters: {clusters.health_line}")
    for warning in clusters.health.get("warnings", []):
        say(f"  warning: {warning}")
    return clusters


def fit_clusters(settings: PretrainSettings, base: nn.Module, images: Images) -> Clustering:
    count = num_clusters(settings, len(images))
    features = embed(base, images)
    generator = torch.Generator().manual_seed(settings.seed)
    fitted = clusterer(settings, count)(features, generator)
    few = features[torch.randperm(len(features), generator=generator)[:STABILITY_IMAGES]]
    again = clusterer(settings, min(count, len(few) // 2))
    stable = stability(few, lambda rows, g: again(rows, g).labels, generator, num_resamples=STABILITY_RESAMPLES)
    distance = fitted.assign(features).distance
    health = fitted.health | {
        "stability": stable.mean,
        "stability_error": stable.standard_error,
        "distance_p95": float(np.quantile(distance.numpy(), 0.95)),
    }
    if stable.warning:
        health["warnings"] = [*health.get("warnings", []), stable.warning]
    name = "mean of the patch tokens, unmasked"
    return replace(fitted, health=health, feature_name=name, encoder_sha256=fingerprint(base))


def clusterer(settings: PretrainSettings, count: int) -> Callable[[Tensor, torch.Generator], Clustering]:
    if settings.clusterer == "kmeans":
        config = kmeans.Config(num_clusters=count, sample_size=settings.fit_images, min_rank=settings.min_rank)
        return lambda features, generator: kmeans.fit(features, config, generator)
    balanced = sinkhorn.Config(
        num_clusters=count,
        sample_size=settings.fit_images,
        target_alpha=settings.mixed_target,
        capacity_factor=settings.capacity_factor,
        min_rank=settings.min_rank,
    )
    return lambda features, generator: sinkhorn.fit(features, balanced, generator)


def fingerprint(model: nn.Module) -> str:
    """sha-256 over all tensors of the encoder."""
    return hashlib.sha256("".join(sorted(digest(model.vit).values())).encode()).hexdigest()


def expert_groups(settings: PretrainSettings, clusters: Clustering) -> Tensor:
    generator = torch.Generator().manual_seed(settings.seed)
    return group_clusters(clusters.centroids, clusters.sizes, settings.experts, generator)


def train_experts(
    settings: PretrainSettings,
    config: moce.Config,
    base: nn.Module,
    images: Images,
    clusters: Clustering,
    groups: Tensor,
    run: Path,
) -> tuple[nn.Module, dict[str, Any]]:
    generator = torch.Generator().manual_seed(settings.seed)
    model = vit_mae.copy_of(base)
    ids = {"cluster": clusters.labels}
    seed = second_stage(settings)
    indices: Any = ShuffledIndices(len(images), settings.batch_size, seed)
    if settings.method == "token-moe":
        token_moe.insert(model, config, generator)
        objective: nn.Module = token_moe.TokenRouted(model, config, seed=settings.seed, batch_size=settings.batch_size)
    else:
        moce.insert(model, clusters.centroids, groups, config, generator)
        objective = moce.ClusterConditional(
            model, config, seed=settings.seed, batch_size=settings.batch_size, base=base
        )
        if config.assignment == "fixed":
            indices = StratifiedIndices(groups[clusters.labels], settings.batch_size, seed)
    stream = masked_images(images, base, indices, seed=seed, augment=settings.augment, **ids)
    say(f"{settings.method}: {config.num_experts} experts in {', '.join(moce.expert_modules(base, config))}")
    summary = train_stage(settings, objective, stream, settings.steps, run, settings.expert_learning_rate)
    return model.eval(), summary


def publish(folder: Path, write: Callable[[Path], Any]) -> None:
    """The first process writes; nobody goes on before it is there."""
    if processes().is_main_process:
        replace_folder(write, folder)
    processes().wait_for_everyone()


def save_experts(folder: Path, model: nn.Module, config: moce.Config, groups: Tensor) -> None:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    write_json(folder / EXPERTS, {"config": asdict(config), "groups": groups.tolist()})


def load_experts(run: Path, base: nn.Module, clusters: Clustering) -> nn.Module:
    """The model with its experts, as `pretrain --method moce` left it in RUN/model."""
    file = run / "model" / EXPERTS
    if not file.is_file():
        raise UsageError(f"{run} holds no finished model with experts", hint="pretrain --method moce, or --resume it")
    facts = json.loads(file.read_text(encoding="utf-8"))
    layers = facts["config"]["expert_layers"]
    config = moce.Config(**facts["config"] | {"expert_layers": None if layers is None else tuple(layers)})
    model = vit_mae.copy_of(base)
    generator = torch.Generator().manual_seed(0)
    moce.insert(model, clusters.centroids, torch.tensor(facts["groups"]), config, generator)
    model.load_state_dict(load_file(run / "model" / "model.safetensors"))
    return model.eval()


def describe_experts(settings: PretrainSettings, model: nn.Module, clusters: Clustering) -> dict[str, Any]:
    """Routes, load and dead experts of a cluster-routed model; what the clusters are like for both."""
    summary: dict[str, Any] = {
        "clusters": {
            "count": len(clusters),
            "sizes": clusters.sizes.tolist(),
            "health": clusters.health,
            "line": clusters.health_line,
        }
    }
    if settings.method != "moce":
        return summary
    table = moce.routes(model)
    load = torch.stack(
        [torch.bincount(row, weights=clusters.sizes.double(), minlength=settings.experts) for row in table]
    )
    names = moce.expert_modules(model, expert_config(settings))
    dead = [f"{names[l]} expert {e}" for l, e in (load == 0).nonzero().tolist()]
    share = load / load.sum(1, keepdim=True)
    warnings = summary["clusters"]["health"].setdefault("warnings", [])
    for layer, expert in (share > COLLAPSED).nonzero().tolist() if settings.experts > 1 else []:
        served = f"{names[layer]} expert {expert} serves {share[layer, expert]:.0%} of the images"
        warnings.append(f"{served}; {COLLAPSE_HINT}")
        say(f"  warning: {warnings[-1]}")
    return summary | {"routes": table.tolist(), "load": share.tolist(), "dead_experts": dead}


def pixel_statistics(images: Images) -> dict[str, list[float]]:
    """Mean and standard deviation of every channel, in [0, 1], over a sample."""
    few = at_most(images, LOOK_IMAGES, seed=0)
    pixels = few.store.read(torch.arange(len(few))).float() / 255
    return {"pixel_mean": pixels.mean((0, 2, 3)).tolist(), "pixel_std": pixels.std((0, 2, 3)).tolist()}


def finish(run: Path, settings: PretrainSettings, images: Images, summary: dict[str, Any]) -> None:
    if not processes().is_main_process:
        return
    summary |= {"method": settings.method, "images": len(images), "quarantine": len(images.quarantine)}
    summary |= pixel_statistics(images)
    write_json(run / "summary.json", summary)
    from anabranch.jobs.pretrain_page import write_pretrain_page

    write_pretrain_page(run, images)
