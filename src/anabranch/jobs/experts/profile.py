# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts profile`: one pass over labelled texts, and what every router and expert did, as sums.

OUT             the statistics, safetensors
OUT.json        what they hold, in words and a few numbers
OUT.part        of a profile that was stopped: what --resume goes on from
"""

import hashlib
import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from anabranch.errors import Stopped, UsageError
from anabranch.jobs.experts.settings import ProfileSettings
from anabranch.jobs.experts.texts import Windows, read_windows
from anabranch.jobs.progress import Progress
from anabranch.jobs.settings import plain_values_of
from anabranch.jobs.together import first_alone, rank, share, summed
from anabranch.measure.experts.merged import merged
from anabranch.measure.experts.ranking import dsmoe, router_lens
from anabranch.measure.experts.ranking.batches import Batch
from anabranch.measure.experts.ranking.seuf import DocumentMeans
from anabranch.measure.experts.ranking.tcess import MaskedLogits
from anabranch.measure.experts.statistics import Collector, ExpertStats, notes_of
from anabranch.models.language.folder import hushed, open_language_model
from anabranch.models.mixtures.fingerprint import fingerprint
from anabranch.models.mixtures.layers import MixtureLayer, open_layers
from anabranch.swap import swap_text
from anabranch.train.processes import launched
from anabranch.train.run_folder import place_for
from anabranch.train.signals import StopFlag

PART_EVERY = 50
"""Batches between two saves of what there is."""


class Everything(DocumentMeans, MaskedLogits):
    """All sums that any ranking takes from one pass without gradients."""


def experts_profile(settings: ProfileSettings) -> ExpertStats:
    """Write settings.out; returns the statistics."""
    refuse_taken(settings)
    with hushed():
        model, tokenizer = open_language_model(settings.model)
    layers = open_layers(model)
    texts = read_windows(
        settings.data, tokenizer, length=settings.length, limit=settings.limit, least=settings.num_folds, part="train"
    )
    stats = passes(settings, model, layers, texts) if settings.collect == "passes" else tuned(settings, model, texts)
    first_alone(lambda: write(settings, stats))
    part_of(settings.out).unlink(missing_ok=True)
    if rank() == 0:
        tell(settings, stats)
    return stats


def write(settings: ProfileSettings, stats: ExpertStats) -> None:
    stats.save(settings.out)
    told = json.dumps(described(settings, stats), indent=1) + "\n"
    swap_text(told, settings.out.with_name(f"{settings.out.name}.json"))


def passes(
    settings: ProfileSettings, model: Any, layers: Sequence[MixtureLayer], texts: Sequence[Windows]
) -> ExpertStats:
    collector = Everything(
        model, layers, [windows.label for windows in texts], num_folds=settings.num_folds,
        outputs=settings.outputs, residual=settings.outputs, fingerprint=fingerprint(model),
    )  # fmt: skip
    read_all(settings, model, collector, texts)
    return merged(collector.stats)


def tuned(settings: ProfileSettings, model: Any, texts: Sequence[Windows]) -> ExpertStats:
    """What takes gradients: of the embeddings, or of a copy's routers."""
    given: dict[str, Any] = {"num_folds": settings.num_folds, "fingerprint": fingerprint(model)}
    if settings.collect == "dsmoe":
        return dsmoe.collect(model, batches_of(settings, texts[:1]), **given)
    labels, batches = [windows.label for windows in texts], in_turn(batches_of(settings, texts))
    lens = router_lens.collect(
        model, batches, labels, epochs=settings.epochs, learning_rate=settings.learning_rate, **given
    )
    return lens.stats


def in_turn(batches: Iterable[Batch]) -> list[Batch]:
    """A batch of each label, then the next of each: what is trained on them must not end with one label."""
    by_label: dict[int, list[Batch]] = {}
    for batch in batches:
        by_label.setdefault(int(batch.labels.flatten()[0]), []).append(batch)
    return [batch for turn in zip_longest(*by_label.values()) for batch in turn if batch is not None]


def batches_of(settings: ProfileSettings, texts: Sequence[Windows]) -> Iterator[Batch]:
    for label, windows in enumerate(texts):
        folds = windows.folds(settings.num_folds)
        for start in range(0, len(folds), settings.batch_size):
            part = slice(start, start + settings.batch_size)
            ids, mask = windows.input_ids[part], windows.attention_mask[part]
            yield Batch(ids, mask, torch.full_like(ids, label), folds[part], answers=mask.bool())


def refuse_taken(settings: ProfileSettings) -> None:
    for name, least in (("length", 2), ("limit", 1), ("batch_size", 1), ("num_folds", 2)):
        if getattr(settings, name) < least:
            raise UsageError(f"{name} cannot be used", expected=f"at least {least}", received=getattr(settings, name))
    if settings.collect != "passes" and (settings.outputs or settings.resume):
        raise UsageError(
            f"--collect {settings.collect} knows neither --outputs nor --resume", expected="neither",
            received="--outputs" if settings.outputs else "--resume",
        )  # fmt: skip
    if settings.collect != "passes" and launched() > 1:
        raise UsageError(
            f"--collect {settings.collect} trains, and is not shared", expected="one process", received=launched()
        )
    if settings.out.exists():
        raise UsageError(f"{settings.out} is there already", expected="a free name", hint="another --out")
    if part_of(settings.out).exists() and not settings.resume:
        raise UsageError(
            f"a profile for {settings.out} was stopped before its end", expected="--resume, or another --out",
            received=part_of(settings.out),
        )  # fmt: skip
    place_for(settings.out)


def part_of(out: Path) -> Path:
    """Of several processes each has its own, and goes on with it in the same number of processes alone."""
    several = f"-{rank() + 1}-of-{launched()}" if launched() > 1 else ""
    return out.with_name(f"{out.name}.part{several}")


def read_all(settings: ProfileSettings, model: Any, collector: Collector, texts: Sequence[Windows]) -> None:
    """Batches of one label each, in their order, of several processes each its share; a stop loses none."""
    batches = [
        (label, windows, start)
        for label, windows in enumerate(texts)
        for start in range(0, len(windows.input_ids), settings.batch_size)
    ]
    if len(batches) < launched():
        raise UsageError("there is too little to share", expected=f"{launched()} batches", received=len(batches))
    digest = digest_of(texts)
    done = going_on(settings, collector, digest) if settings.resume else 0
    mine = share(batches)
    with StopFlag() as stop, Progress("experts profile", len(mine), done) as progress:
        while True:
            told, left = summed(float(stop.is_set), float(len(mine) - done))  # one may have gone on from further behind
            if not left:
                break
            if told:
                save_part(settings, collector.stats, done, digest)
                stop.check(what := f"stopped after {done} of {len(mine)} batches; --resume goes on")
                raise Stopped(f"{what}: another process was told to stop")
            if done < len(mine):
                read_batch(settings, model, collector, *mine[done])
                done += 1
                if done % PART_EVERY == 0:
                    save_part(settings, collector.stats, done, digest)
                progress.advance(mine[done - 1][1].label)


def read_batch(
    settings: ProfileSettings, model: Any, collector: Collector, label: int, windows: Windows, start: int
) -> None:
    part = slice(start, start + settings.batch_size)
    ids, mask = windows.input_ids[part].to(model.device), windows.attention_mask[part].to(model.device)
    labels = torch.full((len(ids), 1), label, device=model.device)
    folds = windows.folds(settings.num_folds)[part].to(model.device)
    with torch.no_grad(), collector.collecting(labels, folds, mask):
        model.get_decoder()(input_ids=ids, attention_mask=mask)


def save_part(settings: ProfileSettings, stats: ExpertStats, done: int, texts: str) -> None:
    """Sums and where they end in one file: a kill between two could count a batch twice."""
    file = part_of(settings.out)
    stats.save(file, json.dumps({"done": done, "settings": plain_values_of(settings), "texts": texts}))


def digest_of(texts: Sequence[Windows]) -> str:
    digest = hashlib.sha256()
    for windows in texts:
        digest.update(windows.label.encode() + windows.input_ids.numpy().tobytes())
    return digest.hexdigest()[:32]


def going_on(settings: ProfileSettings, collector: Collector, texts: str) -> int:
    file = part_of(settings.out)
    if not file.exists():
        return 0
    before, state = ExpertStats.load(file), json.loads(notes_of(file))
    now = json.loads(json.dumps(plain_values_of(settings)))
    changed = [name for name in now if now[name] != state["settings"].get(name)]
    changed += ["model"] if before.header() != collector.stats.header() else []
    changed += ["texts"] if state["texts"] != texts else []
    if changed:
        raise UsageError(
            "a profile goes on only as it began", expected=f"the same {changed[0]}",
            received=now.get(changed[0], "others"), hint="another --out starts anew",
        )  # fmt: skip
    collector.stats = before
    return int(state["done"])


def described(settings: ProfileSettings, stats: ExpertStats) -> dict[str, Any]:
    return {
        **stats.header(), "statistics": sorted(stats.sums), "settings": plain_values_of(settings),
        "tokens": {label: stats.num_tokens(label) for label in stats.labels},
        "windows": {label: float(stats.documents[i].sum()) for i, label in enumerate(stats.labels)},
    }  # fmt: skip


def tell(settings: ProfileSettings, stats: ExpertStats) -> None:
    """Each label's busiest experts, a layer a row."""
    width = max(map(len, stats.labels))
    print(f"{len(stats.layers)} layers of {stats.num_experts} experts, {stats.top_k} a token; share of the choices, %")
    print(" " * width + "".join(f"{i:>22}" for i in range(len(stats.layers))))
    for label in stats.labels:
        load_LN = stats.of("count", label) / stats.num_tokens(label) / stats.top_k
        cells = []
        for load_N in load_LN:
            best = load_N.argsort(descending=True)[:3].tolist()
            cells.append("  ".join(f"{e}:{100 * load_N[e]:.0f}" for e in best))
        print(f"{label:<{width}}" + "".join(f"{cell:>22}" for cell in cells))
    print(f"\nprofile  {settings.out}")
    print(f"next     anabranch experts rank --stats {settings.out} --target {shlex.quote(stats.labels[0])}")
