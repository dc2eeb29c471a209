# SPDX-License-Identifier: Apache-2.0
"""A base, clusters of its features, and experts for the clusters; or experts by token, the control."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anabranch.allocate.clusters.groups import group_clusters
from anabranch.allocate.clusters.record import Clustering
from anabranch.data.images import Images
from anabranch.data.streams import ShuffledIndices, StratifiedIndices
from anabranch.errors import UsageError
from anabranch.jobs.progress import say
from anabranch.jobs.transfer.checks import expert_config, num_clusters
from anabranch.jobs.transfer.clusters import described, obtain_clusters
from anabranch.jobs.transfer.settings import PretrainSettings
from anabranch.jobs.transfer.stages import finish, obtain_base, open_pool, open_run, publish, second_stage, train_stage
from anabranch.models import vit_mae
from anabranch.specialize import moce, token_moe
from anabranch.specialize.mae import masked_images
from anabranch.train.publish import write_json
from anabranch.train.signals import StopFlag

EXPERTS = "experts.json"
COLLAPSED = 0.8
COLLAPSE_HINT = "try a larger aux_loss_coef, more noise_std, or assignment=fixed"


def pretrain(settings: PretrainSettings) -> dict[str, Any]:
    images = open_pool(settings)
    count = num_clusters(settings, len(images))
    with StopFlag() as stop, open_run(settings, images) as run:
        base = obtain_base(settings, images, run, settings.base_steps or settings.steps)
        stop.check("stopped before clustering")
        clusters = obtain_clusters(settings, base, images, run, count)
        config, groups = expert_config(settings), expert_groups(settings, clusters)
        trained, summary = train_experts(settings, config, base, images, clusters, groups, run)
        publish(run / "model", lambda folder: save_experts(folder, trained, config, groups))
        summary |= describe_experts(settings, trained, clusters)
        finish(run, settings, images, summary)
    return summary


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
    summary = described(clusters)
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
