# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts tune`: only the experts that a task uses learn it; everything else stays bit for bit.

OUT/                the tuned experts alone, which many of can be served over one base
OUT/experts.json    the losses by label before and after, and what was touched; written last
OUT/training        checkpoints and metrics.jsonl: what a stopped run goes on from; control-0, ... are of controls
MERGED/             with --merged the whole checkpoint, opened by transformers alone
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from anabranch.errors import CheckFailed, UsageError
from anabranch.jobs.experts.card import experts_card
from anabranch.jobs.experts.rank import RANDOM, chosen, module
from anabranch.jobs.experts.settings import TuneSettings
from anabranch.jobs.experts.texts import Windows
from anabranch.jobs.experts.tune_control import Experts, controlled
from anabranch.jobs.experts.tune_text import WindowBatches, to_learn_and_ask
from anabranch.jobs.experts.written import (
    RESULT,
    Changed,
    Losses,
    change,
    check_controls,
    losses_by_label,
    own_stats,
    tell_losses,
    write_checkpoint,
)
from anabranch.jobs.progress import say
from anabranch.jobs.resumed import fingerprint_of, same_as_before
from anabranch.jobs.settings import plain_values_of
from anabranch.jobs.together import first_alone
from anabranch.measure.experts.statistics import ExpertStats
from anabranch.models.language.folder import hushed, open_language_model
from anabranch.models.mixtures.adapter import MANIFEST
from anabranch.specialize import ceft, esft
from anabranch.specialize.expert_tuning import Kept, Tuned, digest_by_slice, loop_config, touched, tune
from anabranch.train.processes import processes
from anabranch.train.publish import install, refuse_other_results
from anabranch.train.run_folder import RunFolder
from anabranch.train.signals import StopFlag
from anabranch.train.touch import TouchReport

TRAINING, SEEN = "training", "seen.json"


@dataclass(frozen=True, eq=False)
class Task:
    """What every training of the command has in common."""

    settings: TuneSettings
    model: Any
    layers: tuple[str, ...]
    scores_LN: Tensor
    learnt: Windows
    texts: list[Windows]
    """Asked before and after."""

    @property
    def stream(self) -> WindowBatches:
        return WindowBatches(self.learnt, self.settings.batch_size, seed=self.settings.seed)

    def ask(self) -> Losses:
        return losses_by_label(self.model, self.texts)

    def seen(self, base: str) -> dict[str, str]:
        """What a run that goes on has to see again."""
        numbers = {"statistics": self.scores_LN, "text": self.learnt.input_ids}
        return {"model": base} | {name: fingerprint_of(value.tolist()) for name, value in numbers.items()}


def experts_tune(settings: TuneSettings) -> dict[str, Any]:
    """Write settings.out, and settings.merged if given; returns what experts.json holds.

    Raises:
        CheckFailed: a chosen expert is as it was, or anything else is not; or, after everything is written, held-out
            windows of what was learnt are not foreseen better.
    """
    processes()  # connected, they notice at once where the first one refuses
    if settings.merged is not None:
        refuse_other_results(settings.merged, RESULT)
    with hushed():
        model, tokenizer = open_language_model(settings.model)
    stats, config = own_stats(settings.stats, model), method_config(settings)
    task = Task(settings, model, stats.layers, scores_of(settings, stats), *to_learn_and_ask(settings, tokenizer))
    with StopFlag(), RunFolder.open(settings.out, kept_values(settings), settings.resume) as run:
        folder = run.path / TRAINING
        same_as_before(folder / SEEN, task.seen(stats.model))
        before, digests = task.ask(), digest_by_slice(model)
        control = controlled_rows(task, config, before, folder)
        tuned = train(task, config, folder)
        report = touched(digests, digest_by_slice(model), tuned.adapter.experts)
        told = described(task, tuned, report, {settings.by: changes(before, task.ask()), **control})
        first_alone(lambda: write(task, tokenizer, run.path, tuned, told))
        if processes().is_main_process:
            tell(settings, told, tuned, before)
    refuse_nothing_learnt(settings.by, task.learnt.label, told["losses"][settings.by][task.learnt.label])
    return told


def kept_values(settings: TuneSettings) -> dict[str, Any]:
    """A run that goes on may write its checkpoint elsewhere."""
    return {name: value for name, value in plain_values_of(settings).items() if name != "merged"}


def scores_of(settings: TuneSettings, stats: ExpertStats) -> Tensor:
    """(L, N) by the ranking that is asked for.

    Raises:
        UsageError: no such label or ranking, or one that the statistics do not allow.
    """
    stats.index(settings.target)
    chosen([settings.by], stats)
    others = [label for label in stats.labels if label != settings.target]
    more = {"seed": settings.seed} if settings.by == RANDOM else {}
    scores: Tensor = module(settings.by).rank(stats, settings.target, others, **more)
    return scores


# train, look, write


def method_config(settings: TuneSettings) -> esft.Config | ceft.Config:
    config: esft.Config | ceft.Config
    check_controls(settings.controls)
    shared = {"steps": settings.steps, "learning_rate": settings.learning_rate, "weight_decay": settings.weight_decay}
    try:
        if settings.num:
            config = ceft.Config(num_experts=settings.num, **shared)
        else:
            config = esft.Config(p=settings.p, **shared)
        loop_config(config, kept(settings, settings.out), settings.steps, settings.batch_size)  # before anything long
        return config
    except ValueError as error:
        raise UsageError(str(error)) from None


def kept(settings: TuneSettings, folder: Path) -> Kept:
    return Kept(
        folder=folder, resume=(folder / "checkpoints").exists(), seed=settings.seed, save_every=settings.save_every,
        tracker=settings.tracker, sharding=settings.sharding, report=say,
    )  # fmt: skip


def train(task: Task, config: esft.Config | ceft.Config, folder: Path) -> Tuned:
    given = (task.model, task.scores_LN, task.layers, task.stream)
    if isinstance(config, ceft.Config):
        return ceft.train(*given, config, kept=kept(task.settings, folder))
    return esft.train(*given, config, kept=kept(task.settings, folder))


def controlled_rows(
    task: Task, config: esft.Config | ceft.Config, before: Losses, folder: Path
) -> dict[str, dict[str, Changed]]:
    """Of as many random experts, before the model learns for good."""
    if isinstance(config, ceft.Config):
        mask_LN = ceft.select(task.scores_LN, config.num_experts)
    else:
        mask_LN = esft.select(task.scores_LN, config.p)

    def learn(draw: int, experts: Experts) -> dict[str, Changed]:
        own = replace(kept(task.settings, folder / f"control-{draw}"), tracker="none")
        tune(task.model, experts, task.stream, config, kept=own)
        return changes(before, task.ask())

    num, seed = task.settings.controls, task.settings.seed
    return controlled(task.model, mask_LN, task.layers, learn, num=num, seed=seed)


def changes(before: Losses, after: Losses) -> dict[str, Changed]:
    return {name: change(before[name], after[name]) for name in before}


def described(task: Task, tuned: Tuned, report: TouchReport, rows: dict[str, dict[str, Changed]]) -> dict[str, Any]:
    """Stacked tensors count as touched, whichever of their experts learnt; `slices` counts these one by one."""
    names, experts = task.model.state_dict().keys(), tuned.adapter.experts
    changed = {name if name in names else name.rpartition(".")[0] for name in report.changed}
    return {
        "by": task.settings.by, "target": task.settings.target, "experts": {n: list(e) for n, e in experts.items()},
        "losses": rows, "tuned_weights": sum(value.numel() for value in tuned.adapter.tensors.values()),
        "weights": sum(value.numel() for value in task.model.parameters()),
        "touched": sorted(changed), "left_alone": len(names) - len(changed),
        "slices": {"changed": len(report.changed), "left_alone": len(report.left_alone)},
    }  # fmt: skip


def write(task: Task, tokenizer: Any, folder: Path, tuned: Tuned, told: dict[str, Any]) -> None:
    settings = task.settings
    write_adapter(settings, folder, tuned, told)
    if settings.merged is not None:
        write_checkpoint(task.model, tokenizer, settings.merged, told, experts_card("tuned", told, settings))


def write_adapter(settings: TuneSettings, out: Path, tuned: Tuned, told: dict[str, Any]) -> None:
    """Into a folder of its own first."""
    staged = out / ".adapter"
    shutil.rmtree(staged, ignore_errors=True)
    tuned.adapter.save(staged)
    both = json.loads((staged / MANIFEST).read_text(encoding="utf-8")) | told  # one file has both
    (staged / RESULT).write_text(json.dumps(both, indent=1) + "\n", encoding="utf-8")
    (staged / "README.md").write_text(experts_card("tuned", told, settings, adapter=True), encoding="utf-8")
    install(staged, out, last=RESULT)


def refuse_nothing_learnt(by: str, label: str, found: Changed) -> None:
    """What was learnt by heart and not better foreseen where it was not seen is no success."""
    if found["high"] is None or found["high"] >= 0:
        raise CheckFailed(
            f"{label} is not shown to be better foreseen than before", expected="a change below 0 on windows held out",
            received=f"{found['change']:+.3f} [{found['low']}, {found['high']}] nats a token, experts by {by}",
            hint="a smaller --learning-rate, fewer --steps, more text",
        )  # fmt: skip


def tell(settings: TuneSettings, told: dict[str, Any], tuned: Tuned, before: Losses) -> None:
    counts = [len(experts) for experts in tuned.adapter.experts.values()]
    slices = told["slices"]
    share = 100 * told["tuned_weights"] / told["weights"]
    print(f"{sum(counts)} experts in {len(counts)} layers learnt, {told['tuned_weights']:,} weights ({share:.1f} %)")
    print(f"{slices['changed']} slices of tensors changed, {slices['left_alone']} slices and tensors as before\n")
    tell_losses(told["losses"], before)
    print(f"\nadapter     {settings.out}")
    if settings.merged is not None:
        print(f"checkpoint  {settings.merged}    (transformers opens it alone)")
