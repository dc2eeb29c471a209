# SPDX-License-Identifier: Apache-2.0
"""Arms against each other from the base of all sources, without the transfer matrix that `measure` trains first."""

from collections.abc import Sequence
from dataclasses import asdict

from anabranch import __version__
from anabranch.jobs.settings import plain_values_of
from anabranch.jobs.transfer.arms import Arm, ArmSettings, Bench, run_arm
from anabranch.jobs.transfer.corpus import check_same_images
from anabranch.jobs.transfer.effects import Results, by_arm
from anabranch.jobs.transfer.measure import open_corpus, plan, run_cells, train_and_probe
from anabranch.jobs.transfer.settings import MeasureSettings
from anabranch.measure.transfer import SHARED
from anabranch.train.run_folder import RunFolder
from anabranch.train.signals import StopFlag


def contest(settings: MeasureSettings, arms: ArmSettings, wanted: Sequence[tuple[str, str]]) -> Results:
    """Train the base of every seed, then the wanted (arm, scope) pairs from it: {arm: {seed: result}}."""
    corpus = open_corpus(settings)
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    made_with = {"measure": plain_values_of(settings), "version": __version__}
    with StopFlag() as stop, RunFolder.open(settings.out, plain_values_of(settings), settings.resume) as run:
        check_same_images(run.path, [*corpus.sources, *corpus.tasks])
        bases = [cell for cell in plan(settings, corpus) if cell.model == SHARED]
        shared = (settings, corpus, run.path)
        run_cells(run.path / "models", bases, train_and_probe, shared, made_with, settings.workers, stop)
        cells = [Arm(name, seed, scope) for seed in seeds for name, scope in wanted]
        made_with = {"arms": asdict(arms), **made_with}
        bench = Bench(arms, corpus, run.path)
        return by_arm(run_cells(run.path / "arms", cells, run_arm, bench, made_with, settings.workers, stop))
