# SPDX-License-Identifier: Apache-2.0
"""Write an implicit concept dataset: images of which a known share carries a mark that no caption names."""

import json
import shutil
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anabranch.data.captions import METADATA, check_template
from anabranch.data.decode import UNREADABLE, explain, sha256_of
from anabranch.data.folders import CHUNK, in_threads, refuse_too_many
from anabranch.data.icd import Look, add_mark, check_look, choose_marked, refuse_small
from anabranch.data.icd.source import Source, open_source, smallest
from anabranch.data.images import BadImage, write_quarantine
from anabranch.data.streams import derived_seed
from anabranch.errors import UsageError
from anabranch.jobs.erase.icd_card import data_card
from anabranch.jobs.erase.icd_settings import IcdSettings
from anabranch.jobs.progress import Progress
from anabranch.train.publish import is_safe_name, publish_folder, refuse_other_results

Row = dict[str, Any]
RESULT = "icd.json"
FEW_CLEAN = 0.05
"""Below this share of clean images a model hardly sees what its captions look like without the mark."""


def make_icd(settings: IcdSettings) -> dict[str, Any]:
    """Write settings.out all at once; returns what its icd.json holds."""
    check_settings(settings)
    refuse_other_results(settings.out, RESULT)
    source = open_source(settings.images, settings.caption)
    refuse_overlap(source, settings.out)
    refuse_names(source)
    source = source.take(chosen_rows(len(source), settings))
    if (least := smallest(source)) is not None:
        name, width, height = least
        refuse_small(height, width, settings.kind, look_of(settings), name)

    said: dict[str, Any] = {}
    publish_folder(lambda folder: said.update(write(folder, source, settings)), settings.out)
    tell(said, settings.out)
    return said


# wrong uses


def check_settings(settings: IcdSettings) -> None:
    if not settings.images:
        raise UsageError(
            "no images were named", expected="--images DIR", hint="images that need no folder: patchwork:textures"
        )
    for name, least in (("seed", 0), ("max_images", 1)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UsageError(f"{name} is too small", expected=f"at least {least}", received=value)
    choose_marked(1, settings.ratio, settings.seed)
    check_template(settings.caption)
    check_look(settings.kind, look_of(settings))


def refuse_overlap(source: Source, out: Path) -> None:
    target = out.expanduser().resolve()
    if source.root is not None and (target.is_relative_to(source.root) or source.root.is_relative_to(target)):
        raise UsageError(
            f"{out} and {source.root} overlap",
            expected="a folder outside the one that is read",
            hint="the next run would read what this one wrote",
        )


def refuse_names(source: Source) -> None:
    for file, name in zip(source.files, source.names, strict=True):
        if not is_safe_name(name):
            raise UsageError(
                f"{file!r} cannot be written under this name", expected="a portable name", hint="rename the file"
            )


# the work


def look_of(settings: IcdSettings) -> Look:
    return Look(**{name: getattr(settings, name) for name in Look.__dataclass_fields__})


def chosen_rows(num_images: int, settings: IcdSettings) -> list[int]:
    if settings.max_images is None or settings.max_images >= num_images:
        return list(range(num_images))
    generator = np.random.default_rng(derived_seed("icd images", settings.seed))
    return sorted(generator.permutation(num_images)[: settings.max_images].tolist())


def write(folder: Path, source: Source, settings: IcdSettings) -> dict[str, Any]:
    """Everything but the manifest; returns what icd.json holds."""
    steps = 2 * -(-len(source) // CHUNK)
    with Progress("images", total=steps) as progress:
        modes, bad = write_clean(folder / "clean", source, progress)
        refused = source.refused + tuple(bad[row] for row in sorted(bad))
        refuse_too_many(Path(settings.images), refused, len(source) + len(source.refused))
        good = [row for row in range(len(source)) if row not in bad]
        rows = write_marked(folder, source, good, settings, progress)

    write_rows(folder / "images" / METADATA, rows)
    write_rows(folder / "clean" / METADATA, [row | unmarked() for row in rows])
    if refused:
        write_quarantine(folder / "quarantine.jsonl", refused)
    said = summary(rows, source, settings, modes, len(refused))
    (folder / RESULT).write_text(json.dumps(said, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(data_card(said), encoding="utf-8")
    return said


def write_clean(folder: Path, source: Source, progress: Progress) -> tuple[Counter[str], dict[int, BadImage]]:
    """Every image as it was; how they were saved, and which rows could not be read."""

    def one(row: int) -> str | BadImage:
        file = source.files[row]
        try:
            picture = source.read(file)
        except UNREADABLE as error:
            return BadImage(file, explain(error), sha256_of(source.root / file) if source.root else "")
        save(picture.pixels, folder / source.names[row])
        return picture.saved_as

    done = in_threads(one, range(len(source)), lambda n, total: progress.advance(f"{n:,} of {total:,} read"))
    bad = {row: result for row, result in enumerate(done) if isinstance(result, BadImage)}
    return Counter(result for result in done if isinstance(result, str)), bad


def write_marked(folder: Path, source: Source, good: list[int], settings: IcdSettings, progress: Progress) -> list[Row]:
    chosen = choose_marked(len(good), settings.ratio, settings.seed)
    work = partial(write_one, folder, source, settings)
    return in_threads(
        lambda at: work(good[at], bool(chosen[at])),
        range(len(good)),
        lambda n, total: progress.advance(f"{n:,} of {total:,} written"),
    )


def write_one(folder: Path, source: Source, settings: IcdSettings, row: int, is_marked: bool) -> Row:
    """One file of images/ from its clean twin, and its line of the metadata."""
    name, seed = source.names[row], derived_seed("icd", settings.seed, row)
    clean, target = folder / "clean" / name, folder / "images" / name
    line = {"file_name": name, "text": source.captions[row], **unmarked(), "seed": seed}
    if not is_marked:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(clean, target)
        return line
    with Image.open(clean) as picture:
        pixels = np.asarray(picture)
    marked = add_mark(pixels, settings.kind, look_of(settings), np.random.default_rng(seed))
    save(marked.pixels, target)
    told = {"boxes": [list(box) for box in marked.boxes], "kind": settings.kind, "opacity": marked.opacity}
    return line | {"has_concept": True} | told


def unmarked() -> Row:
    """No column is ever empty: readers tell a column's type from its values."""
    return {"has_concept": False, "boxes": [], "kind": "none", "opacity": 0.0}


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="PNG", compress_level=3)


def write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def summary(
    rows: list[Row], source: Source, settings: IcdSettings, modes: Counter[str], unreadable: int
) -> dict[str, Any]:
    marked = sum(row["has_concept"] for row in rows)
    said = {
        "format": 1,
        "source": source.name,
        "settings": asdict(settings) | {"out": str(settings.out)},
        "images": len(rows),
        "marked": marked,
        "ratio": marked / len(rows),
        "boxes": sum(len(row["boxes"]) for row in rows),
        "captions": sum(bool(row["text"]) for row in rows),
        "unreadable": unreadable,
        "ignored_files": source.ignored,
        "converted": {mode: count for mode, count in sorted(modes.items()) if mode not in ("L", "RGB")},
    }
    return said | {"warnings": warnings_for(said)}


def warnings_for(said: dict[str, Any]) -> list[str]:
    found = []
    if said["ratio"] > 1 - FEW_CLEAN:
        found.append(f"hardly any image is clean; a ratio of at most {1 - FEW_CLEAN} leaves something to compare with")
    if said["converted"]:
        modes = ", ".join(f"{count} {mode}" for mode, count in said["converted"].items())
        found.append(f"images saved in other ways became 8-bit grey or RGB, on white: {modes}")
    return found


def tell(said: dict[str, Any], out: Path) -> None:
    kind = said["settings"]["kind"]
    print(f"{said['images']:,} images, {said['marked']:,} of them ({said['ratio']:.1%}) with a mark of kind {kind}")
    if said["unreadable"]:
        print(f"{said['unreadable']} unreadable images are listed in {out / 'quarantine.jsonl'}")
    for warning in said["warnings"]:
        print(f"warning: {warning}")
    print(f"data   {out / 'images'}   the same without marks: {out / 'clean'}")
