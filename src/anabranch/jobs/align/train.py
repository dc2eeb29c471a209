# SPDX-License-Identifier: Apache-2.0
"""`anabranch align train`: from a language model and its own chains to one expert a step.

OUT/training     checkpoints and metrics.jsonl: what a stopped run goes on from
OUT/NAME         a stock LoRA adapter an expert; OUT/mote.json, written last, makes the folder a mixture
"""

import json
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anabranch.errors import CheckFailed, UsageError
from anabranch.jobs.align.settings import TrainSettings
from anabranch.jobs.progress import say
from anabranch.jobs.resumed import fingerprint_of, same_as_before
from anabranch.jobs.settings import plain_values_of
from anabranch.jobs.together import first_alone
from anabranch.mixture.lora import lora_layers
from anabranch.models.language.folder import open_language_model
from anabranch.specialize.mote.card import mixture_card
from anabranch.specialize.mote.collate import ChainBatches, Row, StepSpanCollator, chain_row, fitting
from anabranch.specialize.mote.folder import MANIFEST, base_tensors, fingerprint, save
from anabranch.specialize.mote.mote import ChainLoss, Config, MoTE, build
from anabranch.specialize.mote.skip import Skip, check_attention
from anabranch.specialize.mote.steps import Steps
from anabranch.train.loop import TrainConfig, train
from anabranch.train.publish import install
from anabranch.train.run_folder import RunFolder
from anabranch.train.touch import digest

TRAINING, SEEN = "training", "seen.json"


def align_train(settings: TrainSettings) -> dict[str, Any]:
    """Train and write `settings.out`; returns what mote.json holds beside the mixture itself."""
    config, skip = mixture_config(settings), skip_of(settings)
    chains = read_chains(settings.chains, config.steps)
    base, tokenizer = open_language_model(settings.model)
    if skip.mode != "none":
        check_attention(base.config._attn_implementation)
    mote = build(base, tokenizer, config, seed=settings.seed)
    rows, dropped = fitting(rows_of(mote, chains), settings.max_length)
    if not rows:
        raise UsageError(
            "no chain fits", expected=f"chains of at most {settings.max_length} tokens", received=f"{dropped} longer",
            hint="--set max_length=2048",
        )  # fmt: skip
    plan = training_config(settings, len(rows))
    for warning in warnings_for(rows, dropped):
        say(f"warning: {warning}")
    with RunFolder.open(settings.out, plain_values_of(settings), settings.resume) as run:
        folder = run.path / TRAINING
        same_as_before(folder / SEEN, {"model": fingerprint(base), "chains": fingerprint_of(chains)})
        before = digest_of_base(mote)
        facts = run_training(settings, plan, mote, rows, skip, folder)
        if changed := [name for name, value in digest_of_base(mote).items() if before[name] != value]:
            raise CheckFailed("tensors of the base model changed", received=", ".join(changed[:5]))
        facts |= {"model": str(settings.model), "rows": len(rows), "dropped": dropped, "shapes": shapes(rows)}
        facts |= {"skip": asdict(skip), "seed": settings.seed, "base_tensors": len(before)}
        first_alone(lambda: write(mote, run.path, facts))
    tell(settings, facts)
    return facts


def mixture_config(settings: TrainSettings) -> Config:
    targets = settings.targets if settings.targets == "all-linear" else tuple(settings.targets.split(","))
    return Config(
        r=settings.r, alpha=settings.alpha, lora_alpha=settings.lora_alpha, dropout=settings.dropout,
        shared=settings.shared and settings.assign != "one", targets=targets, question=settings.question,
        assign=settings.assign,
    )  # fmt: skip


def skip_of(settings: TrainSettings) -> Skip:
    return Skip(mode=settings.skip, rate=settings.skip_rate, reposition=settings.reposition)


def training_config(settings: TrainSettings, num_rows: int) -> TrainConfig:
    if settings.steps is None and not settings.epochs > 0:
        raise UsageError("epochs are too few", expected="a number above 0", received=settings.epochs)
    steps = settings.steps or max(1, round(settings.epochs * num_rows / settings.batch_size))
    return TrainConfig(
        steps=steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=min(settings.warmup_steps, steps // 2),
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        mixed_precision=settings.mixed_precision,
        sharding=settings.sharding,
        tracker=settings.tracker,
        save_every=settings.save_every,
        seed=settings.seed,
    )


# the data


def read_chains(path: Path, steps: Steps) -> list[dict[str, Any]]:
    """Rows {"question": text or messages, "chain": {step: text}}, each with an answer.

    Raises:
        UsageError: no such file, no rows, a line that is no row, an unknown step, or a chain without an answer.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold other ends of lines
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read", expected="the chains.jsonl of anabranch align chain", received=error.strerror
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is no text", expected="UTF-8", received=f"byte {error.start}: {error.reason}"
        ) from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            chain, question = dict(row["chain"]), row["question"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(
                f"{path}:{number} is no chain",
                expected='{"question": ..., "chain": {"answer": ...}}',
                received=f"{type(error).__name__}: {error}",
            ) from error
        for name in chain:
            steps.index(name)
        if steps.answer not in chain:
            raise UsageError(
                f"{path}:{number} has no answer", expected=steps.answer, received=", ".join(chain) or "nothing"
            )
        rows.append({"question": question, "chain": chain})
    if not rows:
        raise UsageError(f"{path} holds no chains", expected="a row or more", received="an empty file")
    return rows


def rows_of(mote: MoTE, chains: list[dict[str, Any]]) -> list[Row]:
    return [chain_row(mote.tokenizer, mote.tokens, row["question"], row["chain"]) for row in chains]


def shapes(rows: list[Row]) -> dict[str, int]:
    """How many chains walk which steps."""
    return dict(Counter("+".join(span.step for span in row.step_spans) for row in rows))


def warnings_for(rows: list[Row], dropped: int) -> list[str]:
    warnings = []
    if dropped:
        warnings.append(f"{dropped} of {len(rows) + dropped} chains are longer than max_length and were left out")
    found = shapes(rows)
    if len(found) == 1 and next(iter(found)) == "answer":
        warnings.append("every chain is an answer alone: the experts of the other steps learn nothing")
    return warnings


# train, look, write


def run_training(
    settings: TrainSettings, plan: TrainConfig, mote: MoTE, rows: list[Row], skip: Skip, folder: Path
) -> dict[str, Any]:
    collator = StepSpanCollator(
        mote.tokens, mote.tokenizer.pad_token_id, skip=skip, seed=settings.seed,
        additive=mote.config._attn_implementation == "eager",
    )  # fmt: skip
    if settings.checkpointing:
        model = mote.model.get_base_model()
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    before = norms(mote)
    stream = ChainBatches(rows, collator, settings.batch_size, seed=settings.seed)
    objective = ChainLoss(mote, step_mean=settings.step_mean)
    result = train(objective, stream, plan, folder, resume=(folder / "checkpoints").exists(), report=say)
    mote.eval()
    after = norms(mote)
    present, steps = {span.step for row in rows for span in row.step_spans}, mote.settings.steps.names
    if still := [name for name in after if after[name] == before[name] and (name in present or name not in steps)]:
        raise CheckFailed(
            f"training left the expert {still[0]!r} as it was",
            expected="experts that moved",
            received=f"the same after {result.step} steps",
            hint="a higher learning_rate, or alpha away from its ends",
        )
    return {"trained_steps": result.step, "loss": result.losses[-1] if result.losses else None, "norms": after}


def norms(mote: MoTE) -> dict[str, float]:
    """Length of s B A over all layers, by adapter: an expert that stays small next to the others does nothing."""
    found = {}
    for name in mote.settings.adapters:
        squares = []
        for layer in lora_layers(mote.model).values():
            A, B = (part[name].weight.detach().float() for part in (layer.lora_A, layer.lora_B))
            squares.append(float((layer.scaling[name] * B @ A).square().sum()))
        found[name] = round(sum(squares) ** 0.5, 6)
    return found


def digest_of_base(mote: MoTE) -> dict[str, str]:
    kept = set(base_tensors(mote.model))
    return {
        name: value
        for name, value in digest(mote.model).items()
        if name.removeprefix("base_model.model.").replace(".base_layer.", ".") in kept
    }


def write(mote: MoTE, out: Path, facts: dict[str, Any]) -> None:
    """Into a folder of its own first."""
    staged = out / ".mixture"
    shutil.rmtree(staged, ignore_errors=True)
    save(mote, staged, facts=facts)
    (staged / "README.md").write_text(mixture_card(mote, facts), encoding="utf-8")
    install(staged, out, last=MANIFEST)


def tell(settings: TrainSettings, facts: dict[str, Any]) -> None:
    say(f"{facts['rows']} chains: " + ", ".join(f"{count} {shape}" for shape, count in facts["shapes"].items()))
    say(
        "length of what each expert adds: " + ", ".join(f"{name} {value:.3g}" for name, value in facts["norms"].items())
    )
    say(f"\nexperts  {settings.out}")
    say(f"next     anabranch align chat --model {settings.model} --experts {settings.out} --prompt '...'")
