# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a request to pretrain, said before anything is trained, and with its result, said after."""

from dataclasses import fields
from typing import Any

from anabranch.allocate.clusters.groups import auto_num_clusters
from anabranch.errors import CheckFailed, UsageError
from anabranch.jobs.transfer.corpus import check_names, check_positive
from anabranch.jobs.transfer.settings import PretrainSettings
from anabranch.models import vit_mae
from anabranch.specialize import moce

GATE_ONLY = (
    *("aux_loss_coef", "balance", "entropy_coef", "gate_scale"),
    *("temperature", "noise_std", "cluster_embedding"),
)
BUILD_ONLY = ("preset", "image_size", "channels", "base_steps")
EXPERTS_ONLY = (
    *("experts", "expert_scope", "expert_layers", "expert_learning_rate", "assignment", "init_noise", "distill_coef"),
    *GATE_ONLY,
)
CLUSTERS_ONLY = ("clusters", "clusterer", "mixed_target", "capacity_factor", "min_rank", "fit_images")
SDR_ONLY = (
    *("groups", "split_stages", "split_ratio", "ssl", "paths", "teacher", "heads", "kd_coef"),
    *("kd_schedule", "kd_view", "phase_rate"),
    *("anchor_share", "paths_a_step", "base_share", "progressive"),
)
SHARES = ("split_ratio", "anchor_share", "base_share")
AUTOENCODERS = ("moce", "token-moe", "mae")
"""mae is the control of the other two, and takes their command line as it is."""


def check_settings(settings: PretrainSettings) -> None:
    """Everything that can be wrong is said before anything is trained."""
    check_names(settings.images, "images", 1)
    check_positive(settings, "experts", "steps", "base_steps", "batch_size", "save_every", "min_rank", "fit_images")
    check_positive(settings, "groups", "split_stages", "paths_a_step")
    for name in SHARES:
        if not 0 <= getattr(settings, name) <= 1:
            raise UsageError(f"{name} is no share", expected="from 0 to 1", received=getattr(settings, name))
    if not settings.phase_rate > 0:
        raise UsageError("phase_rate leaves nothing to learn", expected="above 0", received=settings.phase_rate)
    if settings.kd_coef < 0:
        raise UsageError("kd_coef is negative", expected="0 or more", received=settings.kd_coef)
    if settings.clusters != "auto" and not settings.clusters.isdigit():
        raise UsageError("--clusters is no number", expected="a number, or auto", received=settings.clusters)
    if settings.method in AUTOENCODERS:
        check_experts(settings)
    if settings.method == "sdr":
        check_shares(settings)
    refuse_ignored(settings)


def check_shares(settings: PretrainSettings) -> None:
    """Shares of nothing, or of all, that would leave no sub-nets."""
    for name, nothing, why in (
        ("split_ratio", True, "sub-nets need channels in common and channels of their own"),
        ("anchor_share", False, "the sub-nets would have no turn"),
        ("base_share", False, "no step would be left after phase 0"),
    ):
        value = getattr(settings, name)
        if value == 1 or (nothing and value == 0):
            raise UsageError(
                f"{name}={value:g}: {why}",
                expected="above 0 and below 1" if nothing else "below 1",
                received=value,
                hint=f"--set {name}={getattr(PretrainSettings, name)}",
            )


def check_experts(settings: PretrainSettings) -> None:
    """What can be wrong with experts of a masked autoencoder."""
    try:
        config = expert_config(settings)
        if settings.method != "mae" and settings.base is None:
            moce.check_layers(config, vit_mae.depth_of(settings.preset))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if settings.method == "token-moe" and settings.expert_scope != "ffn":
        raise UsageError(
            "token-moe routes single tokens, which share their blocks",
            expected="--expert-scope ffn",
            received=settings.expert_scope,
        )
    if settings.gate_scale == "prob" and settings.expert_scope != "ffn":
        raise UsageError(
            "a gate value cannot be folded into whole blocks, so no plain model could be handed back",
            expected="gate_scale=straight_through",
            received="gate_scale=prob",
        )
    if settings.assignment == "fixed" and settings.batch_size % settings.experts and settings.method == "moce":
        raise UsageError(
            "a batch cannot be divided evenly among the experts",
            expected=f"a batch_size divisible by {settings.experts}",
            received=settings.batch_size,
            hint=f"--set batch_size={settings.experts * max(settings.batch_size // settings.experts, 1)}",
        )


def refuse_ignored(settings: PretrainSettings) -> None:
    """A setting that would do nothing is refused: silence would be taken for an effect."""
    for name, why, hint in ignored(settings):
        if getattr(settings, name) != getattr(PretrainSettings, name):
            raise UsageError(f"{name} would change nothing: {why}", received=getattr(settings, name), hint=hint)


def ignored(settings: PretrainSettings) -> list[tuple[str, str, str]]:
    """(setting, why it does nothing here, what to try) under the other settings."""
    method = settings.method
    found = []
    if method in AUTOENCODERS:
        found += [(name, f"{method} has no sub-nets", "--method sdr") for name in SDR_ONLY]
    else:
        found += [(name, f"{method} has no experts", "--method moce") for name in EXPERTS_ONLY]
        found += [("base_steps", f"{method} counts all its training in steps", "--steps")]
    if method in ("simsiam", "byol"):
        found += [(name, f"{method} has no sub-nets", "--method sdr") for name in SDR_ONLY]
        found += [(name, f"{method} does not divide the images", "--method sdr") for name in CLUSTERS_ONLY]
    if method == "moce" and settings.assignment == "fixed":
        found += [(name, "assignment=fixed has no gate", "--set assignment=gate") for name in GATE_ONLY]
    if settings.base is not None:
        built = [*BUILD_ONLY, "learning_rate"] if method in AUTOENCODERS else BUILD_ONLY
        found += [(name, "the base is given", "leave --base out") for name in built]
    if settings.expert_scope in ("encoder", "autoencoder"):
        found += [("expert_layers", f"the scope is the whole {settings.expert_scope}", "--expert-scope blocks")]
    return found


def check_summary(summary: dict[str, Any]) -> None:
    """What is wrong with a finished run, said after everything was written."""
    if summary.get("dead_experts"):
        raise CheckFailed(
            f"experts without images: {', '.join(summary['dead_experts'])}",
            expected="every expert of every layer serves some cluster",
            hint="--set assignment=fixed, a larger aux_loss_coef, or fewer --experts",
        )
    if summary["untouched"]:
        raise CheckFailed(
            f"{len(summary['untouched'])} tensors were to be trained and are as before",
            received=", ".join(summary["untouched"][:3]),
            hint="more --steps, or fewer --experts: some never saw an image",
        )


def num_clusters(settings: PretrainSettings, num_images: int) -> int:
    count = auto_num_clusters(num_images, settings.experts) if settings.clusters == "auto" else int(settings.clusters)
    if count < settings.experts:
        raise UsageError(
            f"{settings.experts} experts cannot differ on {count} clusters",
            expected=f"at least {settings.experts} clusters",
            received=count,
        )
    if count > num_images:
        raise UsageError("there are fewer images than clusters", expected=f"at least {count}", received=num_images)
    return count


def expert_config(settings: PretrainSettings) -> moce.Config:
    given = {f.name: getattr(settings, f.name) for f in fields(moce.Config) if hasattr(settings, f.name)}
    return moce.Config(**given | {"num_experts": settings.experts})
