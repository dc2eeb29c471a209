# SPDX-License-Identifier: Apache-2.0
"""One training loop for everything that is trained by gradient.

A step is a function of (parameters, optimiser state, step number): the batch is `stream.batch(step)`, the learning
rate a formula of the step, and torch's default generators are seeded from (seed, step, rank) for the length of the
step. Hence a resumed run is bitwise the uninterrupted one on the same machine with the same number of threads, and
there is no generator to store.

Under a launcher (`torchrun --nproc_per_node N`) each process takes its contiguous share of the rows of the global
batch; the loss must be a mean over rows. Buffers follow the first process. One small reduction a step carries the loss,
and makes all processes stop, or refuse a step, together. With `sharding: full` each keeps its part of parameters,
gradients and moments (sharded.py). A process that is lost ends the others with an error that says so.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors.torch import save_file
from torch import Tensor, nn

from anabranch.errors import AnabranchError, Stopped, UsageError
from anabranch.swap import DISK_ERRORS, clean_leftovers
from anabranch.train.checkpoint import (
    Checkpoint,
    checkpoint_steps,
    load_checkpoint,
    require_space,
    save_checkpoint,
    storable,
)
from anabranch.train.config import TrainConfig
from anabranch.train.metrics import MeanWindow, MetricsWriter
from anabranch.train.nonfinite import first_non_finite
from anabranch.train.optimizer import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors
from anabranch.train.processes import launched, naming_the_lost, on_cpu, processes
from anabranch.train.run_folder import differing_keys, exclusive, writing_to
from anabranch.train.seeding import deterministic_algorithms, seeded, step_seed
from anabranch.train.sharded import Shards
from anabranch.train.signals import StopFlag
from anabranch.train.trackers import open_tracker

__all__ = ["Stream", "TrainConfig", "TrainResult", "local_rows", "train"]

METRICS = "metrics.jsonl"
RECORDING_ONLY = ("save_every", "log_every", "tracker", "sharding")
"""Fields that may differ when a run is resumed: they change no number, or none beyond the order of sums."""


class Stream(Protocol):
    def batch(self, step: int) -> dict[str, Tensor]:
        """The global batch of the step after `step` finished ones: a pure function, rows first in every tensor."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    step: int
    """Steps that are finished, counting those before a resume."""
    losses: list[float]
    """Of the steps of this call, as are `seconds` and `images_seen`."""
    seconds: float
    images_seen: int


def train(
    objective: nn.Module,
    stream: Stream,
    config: TrainConfig,
    run: Path | None = None,
    *,
    resume: bool = False,
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> TrainResult:
    """Minimise `objective(batch)["loss"]` over the parameters that require a gradient.

    run      a folder for checkpoints and metrics.jsonl; without it nothing is written.
    on_step  called in every process after each step with the number of finished steps and the step's scalars.
    report   called in the first process with lines for people.
    """
    if run is None and config.tracker != "none":
        raise UsageError("a tracker would hear nothing: without a run folder nothing is written", expected="a run")
    accelerator = _accelerator(config)
    origin = next(objective.parameters()).device
    with ExitStack() as stack:
        stop = stack.enter_context(StopFlag())
        stack.enter_context(deterministic_algorithms(config.deterministic))
        stack.enter_context(naming_the_lost("the same command with --resume" if run is not None else None))
        loop = _Loop(objective, config, accelerator, run, report or (lambda line: None))
        loop.open(stack, resume)
        losses: list[float] = []
        started = time.perf_counter()
        while loop.step < config.steps:
            logs = loop.advance(stream.batch(loop.step), stop)
            losses.append(logs["loss"])
            if on_step is not None:
                on_step(loop.step, logs)
            loop.record()
            if loop.stopping:
                loop.raise_stopped()
        accelerator.wait_for_everyone()  # the last checkpoint exists before any process goes on
        loop.make_whole()
    objective.to(origin)  # the caller's other tensors are where they were, and so is the model again
    images_seen = len(losses) * config.batch_size
    return TrainResult(step=loop.step, losses=losses, seconds=time.perf_counter() - started, images_seen=images_seen)


def local_rows(batch: Mapping[str, Tensor], batch_size: int, rank: int, world: int) -> dict[str, Tensor]:
    """The contiguous rows of one process."""
    share = batch_size // world
    for name, tensor in batch.items():
        if tensor.ndim == 0 or len(tensor) != batch_size:
            raise AnabranchError(
                f"the batch entry {name!r} has the wrong number of rows",
                expected=f"{batch_size} (batch_size)",
                received=str(tuple(tensor.shape)),
            )
    return {name: tensor[rank * share : (rank + 1) * share] for name, tensor in batch.items()}


class _Loop:
    """What the steps of one run share."""

    def __init__(
        self,
        objective: nn.Module,
        config: TrainConfig,
        accelerator: Any,
        run: Path | None,
        report: Callable[[str], None],
    ):
        self.objective, self.config, self.accelerator, self.run = objective, config, accelerator, run
        self.is_main: bool = accelerator.is_main_process
        self.report = report if self.is_main else lambda line: None
        self.device: torch.device = accelerator.device
        self.metrics: MetricsWriter | None = None
        self.origin = next(objective.parameters()).device
        objective.zero_grad(set_to_none=True)
        self.shards: Shards | None = None
        if config.sharding == "full" and accelerator.num_processes > 1:
            self.shards = Shards(objective, self.device)  # never the whole model on the device
        else:
            objective.to(self.device)
        self.optimizer = build_optimizer(objective, config)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.window = MeanWindow()
        self.step, self.stopping = 0, False

    # Opening and resuming ------------------------------------------------------------------------------------------

    def make_whole(self) -> None:
        """The objective as it came, with what it learned; all processes call this together."""
        if self.shards is not None:
            self.shards.restore(self.origin)
            self.shards = None

    def open(self, stack: ExitStack, resume: bool) -> None:
        """Own the folder, go back to the newest good checkpoint, and only then wrap the model for several processes."""
        if self.run is not None:
            checkpoints = self.run / "checkpoints"
            if self.is_main:
                with writing_to(self.run):
                    checkpoints.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(exclusive(checkpoints / ".lock", f"the run {self.run}"))
                    clean_leftovers(checkpoints)
                if not resume and (checkpoint_steps(self.run) or (self.run / METRICS).exists()):
                    raise UsageError(f"{self.run} already holds a run", hint="--resume to go on, or another --out")
            self.accelerator.wait_for_everyone()
            self.restore(self.run)
            if self.is_main:
                require_space(checkpoints, self.estimated_bytes())
                tracker = open_tracker(self.config.tracker, self.run, after_step=self.step)
                writer = MetricsWriter(self.run / METRICS, after_step=self.step, tracker=tracker)
                self.metrics = stack.enter_context(writer)
        self.model = self.objective if self.shards else self.accelerator.prepare_model(self.objective)
        self.last_line = (self.step, time.perf_counter())

    def restore(self, run: Path) -> None:
        if self.shards is None:
            loaded = load_checkpoint(run)
        else:
            loaded = _sharded_checkpoint().load_sharded(run, self.objective)
        if loaded is None:
            self.report("starting at step 0")
            return
        for path, reason in loaded.skipped:
            self.report(f"skipped {path.name}: {reason}")
        checkpoint = loaded.checkpoint
        _check_same_config(checkpoint.config, _config_values(self.config))
        if self.shards is None:
            _load_model(self.objective, checkpoint.model)
        load_optimizer_tensors(self.objective, self.optimizer, checkpoint.optimizer)
        self.window = MeanWindow(checkpoint.extra["window"])
        self.step = checkpoint.step
        self.report(f"resumed from {loaded.path.name}")

    def estimated_bytes(self) -> int:
        """Size of a checkpoint once AdamW keeps two moments of every parameter."""
        moments = [parameter for parameter in self.parameters for _ in range(2)]
        return sum(tensor.nbytes for tensor in [*self.objective.state_dict().values(), *moments])

    # One step ------------------------------------------------------------------------------------------------------

    def advance(self, batch: dict[str, Tensor], stop: StopFlag) -> dict[str, float]:
        """Forward, backward, agree, update. Raises before the update if the loss or the gradient is not finite."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        rows = local_rows(batch, self.config.batch_size, rank, world)
        rows = {name: tensor.to(self.device, non_blocking=True) for name, tensor in rows.items()}
        if self.shards is not None:
            self.shards.follow_first()
        if not self.objective.training:  # on_step may have evaluated
            self.objective.train()
        seed = step_seed(self.config.seed, self.step, rank)
        with seeded(seed, self.device):
            outputs = self.forward(self.model, rows)
            self.accelerator.backward(outputs["loss"])
        logs, norm = self.agree(outputs, stop)
        if not (math.isfinite(logs["loss"]) and math.isfinite(logs["grad_norm"])):
            self.refuse(batch, rows, seed, logs["loss"])
        self.update(norm)
        self.step += 1
        self.window.add(logs)
        return logs

    def agree(self, scalars: dict[str, Tensor], stop: StopFlag) -> tuple[dict[str, float], Tensor]:
        """The step's scalars, averaged over the processes, in `stopping` whether any was told to stop; and the norm.

        The one read from the device in a step: an update with NaN could not be taken back.
        """
        world, shards = self.accelerator.num_processes, self.shards
        norm = self.norm_or_square()
        scalars = scalars | {"grad_norm": norm}
        names = sorted(scalars)
        values = torch.stack([scalars[name].detach().to(self.device).float().reshape(()) for name in names])
        self.stopping = stop.is_set
        if world == 1:
            return dict(zip(names, values.tolist(), strict=True)), norm
        flag = values.new_tensor([float(stop.is_set)])
        used = values.new_empty(0) if shards is None else shards.usage(self.device)
        found = self.accelerator.reduce(torch.cat([values, flag, used]), reduction="mean").tolist()
        logs = dict(zip(names, found[: len(names)], strict=True))
        self.stopping = found[len(names)] > 0
        if shards is not None:
            shards.forget_unused(found[len(names) + 1 :])
            logs["grad_norm"] = math.sqrt(logs["grad_norm"] * world)
            norm = values.new_tensor(logs["grad_norm"])
        return logs, norm

    def norm_or_square(self) -> Tensor:
        """The norm of the gradient; where it is sharded, this process's part of its square."""
        if self.shards is not None:
            self.shards.finish_backward()
            return self.shards.square()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return nn.utils.get_total_norm(gradients, foreach=True)

    def forward(self, module: nn.Module, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        bf16 = self.config.mixed_precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            outputs: dict[str, Tensor] = module(rows)
        return outputs

    def update(self, norm: Tensor) -> None:
        if self.shards is not None and self.config.max_grad_norm is not None:
            self.shards.clip(self.config.max_grad_norm, float(norm))
        elif self.config.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        self.optimizer.step()
        # None, not zero: AdamW skips a parameter without a gradient, but would decay one whose gradient is zero.
        self.optimizer.zero_grad(set_to_none=True)

    def refuse(self, batch: dict[str, Tensor], rows: dict[str, Tensor], seed: int, loss: float) -> NoReturn:
        """Keep the batch for a replay and say where the first non-finite value is."""

        def forward_again() -> None:
            with seeded(seed, self.device):
                self.forward(self.objective, rows)

        cause = first_non_finite(self.objective, batch, forward_again)
        self.make_whole()
        step, hint = self.step + 1, "look at the named place, else a lower learning rate or a longer warm-up"
        if self.run is not None and self.is_main:
            replay = self.run / f"replay-step-{step}.safetensors"
            with suppress(*DISK_ERRORS):
                save_file(storable(batch), replay)
                hint = f"{hint}; the batch is in {replay}"
        raise AnabranchError(
            f"step {step}: the loss or its gradient is not finite; the step was not applied",
            received=f"loss {loss}; first in {cause}",
            hint=hint,
        )

    # Recording -----------------------------------------------------------------------------------------------------

    def record(self) -> None:
        """Write the line and the checkpoint that are due after this step."""
        last = self.step == self.config.steps
        if last or self.step % self.config.log_every == 0:
            self.log()
        if last or self.stopping or self.step % self.config.save_every == 0:
            self.save()

    def log(self) -> None:
        means = self.window.close()
        step_before, time_before = self.last_line
        self.last_line = (self.step, time.perf_counter())
        rate = (self.step - step_before) * self.config.batch_size / max(1e-9, self.last_line[1] - time_before)
        lr = learning_rate(self.step - 1, self.config)
        if self.metrics is not None:
            ours = {"learning_rate": lr, "images_per_second": round(rate, 1)}
            self.metrics.write(self.step, **(means | ours))
        line = f"step {self.step}/{self.config.steps}  loss {means['loss']:.4f}  lr {lr:.2e}  {rate:.0f} rows/s"
        self.report(line)

    def save(self) -> None:
        if self.run is None or not (self.is_main or self.shards):
            return
        if self.shards is not None:
            self.shards.follow_first()
        checkpoint = Checkpoint(
            step=self.step,
            model=self.objective.state_dict(),
            optimizer=optimizer_tensors(self.objective, self.optimizer),
            config=_config_values(self.config),
            world_size=self.accelerator.num_processes,
            extra={"window": self.window.to_json()},
        )
        save = save_checkpoint if self.shards is None else _sharded_checkpoint().save_sharded
        save(self.run, checkpoint)

    def raise_stopped(self) -> NoReturn:
        self.make_whole()
        saved = "nothing was saved: there is no run folder" if self.run is None else "its checkpoint is complete"
        hint = None if self.run is None else "the same command with --resume"
        raise Stopped(f"stopped on request after step {self.step} of {self.config.steps}; {saved}", hint=hint)


def _accelerator(config: TrainConfig) -> Any:
    """One process, or data-parallel ones. Autocast is our own: accelerate's would stay on the objective's forward."""
    processes()  # connects, with our time limit
    accelerator = Accelerator(
        cpu=on_cpu(),
        mixed_precision="no",
        gradient_accumulation_steps=1,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    kind, world = accelerator.distributed_type.value, accelerator.num_processes
    if world != launched() or (kind != "NO" and not kind.startswith("MULTI_")):
        raise UsageError(
            "cannot train with these processes",
            expected="one, or several that share the data (torchrun --nproc_per_node N)",
            received=f"{launched()} started, {world} connected, as {kind}",
        )
    if config.batch_size % world:
        raise UsageError(
            "batch_size cannot be shared out",
            expected=f"a multiple of the {world} processes",
            received=config.batch_size,
        )
    return accelerator


def _sharded_checkpoint() -> Any:
    from anabranch.train import sharded_checkpoint  # torch's part of it takes two seconds to import

    return sharded_checkpoint


def _config_values(config: TrainConfig) -> dict[str, Any]:
    """As JSON gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def _check_same_config(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    keys = [key for key in differing_keys(before, now) if key not in RECORDING_ONLY]
    if keys:
        raise UsageError(
            "the checkpoint was trained with another configuration",
            expected="; ".join(f"{key}: {before.get(key)!r}" for key in keys[:3]),
            received="; ".join(f"{key}: {now.get(key)!r}" for key in keys[:3]),
            hint="the earlier values, or another --out",
        )


def _load_model(objective: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    before, now = ({name: (t.dtype, t.shape) for name, t in s.items()} for s in (tensors, objective.state_dict()))
    names = differing_keys(before, now)
    if names:
        raise UsageError("the checkpoint is of another model", received=f"differing tensors: {', '.join(names[:3])}")
    objective.load_state_dict(dict(tensors))
