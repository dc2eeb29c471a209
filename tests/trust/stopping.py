# SPDX-License-Identifier: Apache-2.0
"""Five loops of ours that a signal may reach at any moment, and what each had done by then.

A unit is what a loop keeps as a whole: a step, a batch, a model. `units` is where each of them is begun.
"""

import contextlib
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from anabranch.jobs.align import chain as chain_job
from anabranch.jobs.align import generate as generate_job
from anabranch.jobs.align.settings import ChainSettings, GenerateSettings
from anabranch.jobs.experts import profile as profile_job
from anabranch.jobs.experts.settings import ProfileSettings
from anabranch.jobs.experts.text_mixture import save_mixture, untrained_mixture
from anabranch.jobs.transfer import measure as measure_job
from anabranch.jobs.transfer.settings import MeasureSettings
from anabranch.measure.experts.statistics import ExpertStats
from anabranch.train.checkpoint import load_checkpoint
from anabranch.train.loop import TrainConfig, train
from anabranch.train.signals import StopFlag
from tests.specialize.mote.tiny import base, tokenizer

PROMPTS = {
    "analysis": "{question} w30", "answer_after_analysis": "{question} {analysis}",
    "guidance": "{question} {analysis} w31", "answer_after_guidance": "{question} {analysis} {guidance}",
    "check": "{question} w9 {answer}", "yes": "w1", "no": "w2",
}  # fmt: skip
BUDGET = {"analysis": 3, "guidance": 3, "answer": 4}
MIXTURE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "moe_intermediate_size": 16, "intermediate_size": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Loop:
    run: Callable[[Path, bool], object]
    """Do it all into a folder, or with True go on with what is there."""
    result: Callable[[Path], object]
    """What can be compared with ==."""
    units: tuple[object, str]
    """The object and the name of its function that is called once a unit."""


class Ended(BaseException):
    """What the system does with a signal that nobody asked for: nothing more is done."""


class Moments:
    """Every look at a flag is counted, and at the chosen one the signal comes."""

    def __init__(self, patch, moment=None):
        self.looks, self.moment, check = 0, moment, StopFlag.check

        def is_set(flag):
            self.look()
            return flag.received is not None

        def checked(flag, what):
            self.look()
            check(flag, what)

        patch.setattr(StopFlag, "is_set", property(is_set))
        patch.setattr(StopFlag, "check", checked)

    def look(self):
        self.looks += 1
        if self.looks == self.moment:
            signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def counting(loop):
    """How many units are begun."""
    owner, name = loop.units
    plain, begun = getattr(owner, name), []

    def counted(*given, **more):
        begun.append(None)
        return plain(*given, **more)

    setattr(owner, name, counted)
    try:
        yield begun
    finally:
        setattr(owner, name, plain)


def without_protection(patch):
    """Nobody handles the signal."""

    def end(number, frame):
        raise Ended

    patch.setattr(StopFlag, "_handle", lambda flag, number, frame: end(number, frame))


def training(tiny):
    config = TrainConfig(steps=24, batch_size=8, learning_rate=1e-2, warmup_steps=5, save_every=1000, log_every=5)

    def run(folder, resume):
        train(tiny.TinyObjective(), tiny.TinyStream(), config, folder / "run", resume=resume)

    def result(folder):
        checkpoint = load_checkpoint(folder / "run").checkpoint
        tensors = checkpoint.model | {f"optimizer/{name}": t for name, t in checkpoint.optimizer.items()}
        return checkpoint.step, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}

    return Loop(run, result, (tiny.TinyStream, "batch"))


def evaluating(folders):
    """A transfer matrix: models, each of them trained and probed on a task."""

    def run(folder, resume):
        measure_job.measure(
            MeasureSettings(
                sources=(str(folders / "pool/stripes"), str(folders / "pool/disc")), tasks=(str(folders / "task"),),
                steps=6, seeds=1, batch_size=8, workers=1, num_labels=16, num_draws=1, probe_points=1, image_size=32,
                warmup_steps=1, out=folder / "run", resume=resume,
            )
        )  # fmt: skip

    def result(folder):
        return json.loads((folder / "run" / "transfer.json").read_text())["matrix"]

    return Loop(run, result, (measure_job, "train_and_probe"))


def profiling(root):
    if not root.exists():
        save_mixture(untrained_mixture(0, **MIXTURE), root / "model", torch.float32)
        (root / "ab.txt").write_text("".join(f"aab{i} ab ba. " for i in range(300)))

    def run(folder, resume):
        profile_job.experts_profile(
            ProfileSettings(
                model=root / "model", data=(f"ab={root / 'ab.txt'}",), length=16, limit=96, batch_size=4,
                out=folder / "stats.safetensors", resume=resume,
            )
        )  # fmt: skip

    def result(folder):
        stats = ExpertStats.load(folder / "stats.safetensors")
        return {name: tensor.numpy().tobytes() for name, tensor in stats.sums.items()}

    return Loop(run, result, (profile_job, "read_batch"))


def speaking_model(root, count):
    if not root.exists():
        model = base()
        model.generation_config.eos_token_id = 38
        model.save_pretrained(root / "model")
        tokenizer().save_pretrained(root / "model")
        (root / "prompts.json").write_text(json.dumps(PROMPTS))
        rows = [{"question": f"w{i} w{i + 1}"} for i in range(count)]
        (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": root / "model", "questions": root / "questions.jsonl"}


def chains(root):
    given = speaking_model(root, 10)

    def run(folder, resume):
        chain_job.align_chain(
            ChainSettings(
                **given, prompts_file=root / "prompts.json", batch_size=2, budget=BUDGET, threshold=0.49,
                out=folder / "chains.jsonl", resume=resume,
            )
        )  # fmt: skip

    def result(folder):
        return (folder / "chains.jsonl").read_bytes(), (folder / "chain_report.json").read_bytes()

    return Loop(run, result, (chain_job, "build_chains"))


def sampling(root):
    """Answers of a model, drawn at a temperature."""
    given = speaking_model(root, 24)

    def run(folder, resume):
        generate_job.align_generate(
            GenerateSettings(
                **given,
                batch_size=1,
                budget={"answer": 5},
                temperature=0.9,
                out=folder / "answers.jsonl",
                resume=resume,
            )
        )

    def result(folder):
        return (folder / "answers.jsonl").read_bytes()

    return Loop(run, result, (generate_job.Speaker, "answer"))
