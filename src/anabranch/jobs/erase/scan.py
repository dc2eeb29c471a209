# SPDX-License-Identifier: Apache-2.0
"""Look through a folder of images with a detector, and say how far its answers can be trusted.

Every image is read once, in threads, at its own size and upright, and handed to both detectors. Nothing is written
before the end, and then all at once: a scan that is stopped leaves no half of it.
"""

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, floor
from pathlib import Path
from typing import Any

from anabranch.data.boxes import Box
from anabranch.data.folders import Listing, list_folder, refuse_too_many
from anabranch.data.images import BadImage
from anabranch.data.labels import Label, header_path, is_inside, refuse_strangers, write_labels
from anabranch.data.originals import Original, read_originals
from anabranch.errors import UsageError
from anabranch.jobs.erase.scan_settings import ScanSettings
from anabranch.jobs.progress import Progress
from anabranch.measure.concept_ratio import Rate, ratio
from anabranch.measure.judge import Agreement, Corrected, agreement, correct
from anabranch.suppress.detectors import Detection, Detector, contains, detect_checked, open_detector
from anabranch.suppress.detectors.on_disk import BoxesOnDisk, Entry, MasksOnDisk, read_jsonl
from anabranch.suppress.detectors.overlap import best_overlaps

STEPS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Scanned:
    """Both detectors' answers on one folder."""

    rows: list[Label]
    bad: tuple[BadImage, ...]
    converted: dict[str, int]
    seconds: float
    detector_seconds: float


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What was measured of the detector; None where there was nothing to measure it on."""

    false_alarms: Rate | None = None
    clean_is: str = ""
    second_false_alarms: Rate | None = None
    recall: Rate | None = None
    mean_iou: float | None = None
    num_true_boxes: int = 0
    unlisted: int = 0
    corrected: Corrected | None = None
    not_corrected: str = ""
    """Why the share of images that contain the concept could not be corrected for the detector's errors."""
    agreement: Agreement | None = None


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a scan found, as it was written."""

    out: Path
    detector: Detector
    second: Detector | None
    scanned: Scanned
    trust: Trust
    ignored: dict[str, int] = field(default_factory=dict)


def scan(settings: ScanSettings) -> Scan:
    """Scan, write `settings.out` and the `.json` beside it, print what was found."""
    if settings.images is None or not settings.detector:
        what = "images" if settings.images is None else "detector"
        raise UsageError(
            f"nothing to scan: --{what} is missing", expected="anabranch erase scan --images DIR --detector qr"
        )
    if settings.batch_size < 1 or settings.grid < 1:
        raise UsageError("batch_size and grid cannot be used", expected="at least 1")
    refuse_strangers(settings.out)
    listing = listed(settings.images)
    clean = None if settings.clean is None else listed(settings.clean)
    known = None if settings.known is None else known_truth(settings.known, listing)
    detector, second = open_detectors(settings)
    if clean is not None and looks_names_up(detector):
        raise UsageError(
            f"{detector.name} looks images up by name, so it knows nothing of the clean images",
            expected="a detector that looks at pixels, or no --clean",
            hint="--known measures false alarms on the images themselves",
        )

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd metadata; what matters is raised
        scanned = look_through(listing, detector, second, settings.batch_size, "images")
        refuse_too_many(listing.root, scanned.bad, len(listing.files) + len(listing.refused))
        scanned_clean = None
        if clean is not None:
            other = None if looks_names_up(second) else second
            scanned_clean = look_through(clean, detector, other, settings.batch_size, "clean images")
            refuse_too_many(clean.root, scanned_clean.bad, len(clean.files) + len(clean.refused))
    trust = measure_trust(scanned, scanned_clean, known)
    found = Scan(
        out=settings.out, detector=detector, second=second, scanned=scanned, trust=trust, ignored=listing.ignored
    )
    write_labels(settings.out, scanned.rows, header(found, settings, listing))
    print("\n".join(summary(found, listing.root)))
    return found


# 1. what to look at, and who looks


def listed(folder: Path) -> Listing:
    listing = list_folder(folder)
    unsafe = [file for file in listing.files if not is_inside(file)]
    if unsafe:
        raise UsageError(
            f"{folder}: {len(unsafe)} names that labels cannot hold, the first is {unsafe[0]!r}",
            expected="printable names without backslashes, up to 1024 characters",
            hint="rename the files",
        )
    return listing


def known_truth(path: Path, listing: Listing) -> dict[str, Entry]:
    if not path.is_file():
        raise UsageError(f"{path} cannot be read", expected="a metadata.jsonl with has_concept and boxes")
    truth = read_jsonl(path)
    if not truth.keys() & set(listing.files):
        raise UsageError(
            f"{path} names none of the images in {listing.root}",
            expected=f"names relative to that folder, such as {listing.files[0]!r}",
            received=", ".join(map(repr, list(truth)[:3])) or "no lines",
        )
    return truth


def open_detectors(settings: ScanSettings) -> tuple[Detector, Detector | None]:
    options: dict[str, Any] = {"concept": settings.concept, "geometry": settings.geometry, "grid": settings.grid}
    first = open_detector(settings.detector, threshold=settings.threshold, **options)
    if not settings.second_detector:
        return first, None
    if settings.second_detector == settings.detector:
        raise UsageError(
            "both detectors are the same, so they agree whatever they find",
            expected="a second detector of another kind",
            received=settings.second_detector,
        )
    return first, open_detector(settings.second_detector, threshold=settings.second_threshold, **options)


def looks_names_up(detector: Detector | None) -> bool:
    return isinstance(detector, BoxesOnDisk | MasksOnDisk)


# 2. look


def look_through(listing: Listing, detector: Detector, second: Detector | None, batch_size: int, what: str) -> Scanned:
    """Both detectors on every image that can be read."""
    rows: list[Label] = []
    bad = list(listing.refused)
    converted: Counter[str] = Counter()
    started, detector_seconds = time.perf_counter(), 0.0
    total = len(listing.files)
    marks = [round(total * step / STEPS_SHOWN) for step in range(1, STEPS_SHOWN + 1)]
    with Progress(what, total=STEPS_SHOWN) as progress:
        for batch in batches(read_originals(listing.root, listing.files), batch_size):
            bad += [item for item in batch if isinstance(item, BadImage)]
            originals = [item for item in batch if isinstance(item, Original)]
            begun = time.perf_counter()
            firsts = answers(detector, originals)
            seconds = answers(second, originals) if second is not None else [None] * len(originals)
            detector_seconds += time.perf_counter() - begun
            for original, first, other in zip(originals, firsts, seconds, strict=True):
                rows.append(label(original, first, detector.threshold, other, second))
                converted[original.converted] += bool(original.converted)
            done = len(rows) + len(bad) - len(listing.refused)
            while progress.done < STEPS_SHOWN and done >= marks[progress.done]:
                progress.advance(f"{sum(row.has_concept for row in rows):,} of {len(rows):,} contain it")
    return Scanned(
        rows=rows,
        bad=tuple(bad),
        converted={mode: count for mode, count in sorted(converted.items()) if count},
        seconds=time.perf_counter() - started,
        detector_seconds=detector_seconds,
    )


def batches(items: Iterator[Original | BadImage], size: int) -> Iterator[list[Original | BadImage]]:
    batch: list[Original | BadImage] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def answers(detector: Detector, originals: Sequence[Original]) -> list[list[Detection]]:
    if not originals:
        return []
    return detect_checked(detector, [o.pixels for o in originals], [o.file for o in originals])


def label(
    original: Original, first: list[Detection], threshold: float, other: list[Detection] | None, second: Detector | None
) -> Label:
    """What both say of one image; boxes and scores are those above the threshold, the best first."""
    above = sorted((d for d in first if d.score > threshold and d.box is not None), key=lambda d: -d.score)
    height, width = original.pixels.shape[:2]
    return Label(
        file=original.file,
        width=width,
        height=height,
        boxes=tuple(outwards(d.box) for d in above),
        score=round(best(first), 6),
        has_concept=contains(first, threshold),
        sha256=original.sha256,
        scores=tuple(round(d.score, 6) for d in above),
        second_score=None if other is None else round(best(other), 6),
        second_has_concept=None if other is None or second is None else contains(other, second.threshold),
    )


def outwards(box: Box) -> Box:
    """Hundredths of a pixel, rounded so that no box becomes empty or leaves its image."""
    x1, y1, x2, y2 = box
    return (floor(x1 * 100) / 100, floor(y1 * 100) / 100, ceil(x2 * 100) / 100, ceil(y2 * 100) / 100)


def best(detections: Sequence[Detection]) -> float:
    return max((detection.score for detection in detections), default=0.0)


# 3. trust


def measure_trust(scanned: Scanned, clean: Scanned | None, known: dict[str, Entry] | None) -> Trust:
    rows = scanned.rows
    spotless: list[Label] = [] if clean is None else clean.rows
    clean_is = "" if clean is None else "the clean images"
    facts: dict[str, Any] = {}
    if known is not None:
        judged = [(row, known[row.file]) for row in rows if row.file in known]
        containing = [(row, truth) for row, truth in judged if truth.has_concept]
        if clean is None:
            spotless = [row for row, truth in judged if not truth.has_concept]
            clean_is = "the images known to be clean"
        overlaps = [x for row, truth in containing if row.has_concept for x in best_overlaps(truth.boxes, row.boxes)]
        facts = {
            "recall": rate([row.has_concept for row, _ in containing]),
            "mean_iou": sum(overlaps) / len(overlaps) if overlaps else None,
            "num_true_boxes": len(overlaps),
            "unlisted": len(rows) - len(judged),
        }
    if rows[0].second_has_concept is not None:
        facts["agreement"] = agreement([row.has_concept for row in rows], [row.second_has_concept for row in rows])
        facts["second_false_alarms"] = rate(
            [row.second_has_concept for row in spotless if row.second_has_concept is not None]
        )
    false_alarms = rate([row.has_concept for row in spotless])
    facts |= corrected(rows, facts.get("recall"), false_alarms)
    return Trust(false_alarms=false_alarms, clean_is=clean_is, **facts)


def rate(answers: Sequence[bool | None]) -> Rate | None:
    return ratio(answers) if answers else None


def corrected(rows: Sequence[Label], recall: Rate | None, false_alarms: Rate | None) -> dict[str, Any]:
    """The share of images that contain the concept as a detector without errors would count it."""
    if recall is None or false_alarms is None:
        return {}
    flagged = sum(row.has_concept for row in rows) / len(rows)
    specificity = (false_alarms.count - false_alarms.hits, false_alarms.count)
    try:
        return {"corrected": correct(flagged, len(rows), (recall.hits, recall.count), specificity)}
    except UsageError as error:  # too few known images, or a detector that knows too little
        return {"not_corrected": error.what}


# 4. say


def header(found: Scan, settings: ScanSettings, listing: Listing) -> dict[str, Any]:
    """What stands beside the labels."""
    rows, trust = found.scanned.rows, found.trust
    agreed = None if trust.agreement is None else without_nan(asdict(trust.agreement))
    return {
        "images": str(listing.root),
        "concept": settings.concept,
        "detector": described(found.detector, settings.detector),
        "second_detector": None if found.second is None else described(found.second, settings.second_detector),
        "counts": {
            "images": len(rows),
            "containing": sum(row.has_concept for row in rows),
            "boxes": sum(len(row.boxes) for row in rows),
            "unreadable": len(found.scanned.bad),
        },
        "highest_score": max((row.score for row in rows), default=0.0),
        "unreadable": [asdict(bad) for bad in found.scanned.bad],
        "converted": found.scanned.converted,
        "ignored": found.ignored,
        "false_positive_rate": None if trust.false_alarms is None else asdict(trust.false_alarms),
        "false_positive_rate_on": trust.clean_is,
        "second_false_positive_rate": None if trust.second_false_alarms is None else asdict(trust.second_false_alarms),
        "recall": None if trust.recall is None else asdict(trust.recall),
        "mean_iou": trust.mean_iou,
        "corrected_share": None if trust.corrected is None else asdict(trust.corrected),
        "agreement": agreed,
    }


def described(detector: Detector, spec: str) -> dict[str, Any]:
    return {"name": detector.name, "version": detector.version, "threshold": detector.threshold, "spec": spec}


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value != value else value for name, value in values.items()}


def summary(found: Scan, root: Path) -> list[str]:
    """The lines that a person reads."""
    rows, trust, detector = found.scanned.rows, found.trust, found.detector
    containing = sum(row.has_concept for row in rows)
    lines = [
        f"{len(rows):,} images of {root}",
        f"detector       {detector.name} ({detector.version}), threshold {detector.threshold:g}",
        f"contain it     {ratio([row.has_concept for row in rows])}, {sum(len(row.boxes) for row in rows):,} boxes",
        f"false alarms   {_or_not(trust.false_alarms, trust.clean_is, 'give --clean, a folder of images without it')}",
        f"recall         {_or_not(trust.recall, 'the images known to contain it', 'give --known, a metadata.jsonl')}",
    ]
    if trust.corrected is not None:
        lines.append(f"corrected      {trust.corrected}: the share without the detector's errors")
    elif trust.not_corrected:
        lines.append(f"not corrected  {trust.not_corrected}")
    if trust.mean_iou is not None:
        lines.append(
            f"boxes          mean IoU {trust.mean_iou:.2f} with {trust.num_true_boxes:,} true boxes of found images"
        )
    if trust.unlisted:
        lines.append(f"unknown truth  {trust.unlisted:,} images are not in the file of known truth")
    lines += said_by_second(found)
    lines += warned(found, containing)
    bad = found.scanned.bad
    if bad:
        lines.append(f"unreadable     {len(bad):,}: " + "; ".join(f"{b.path!r} ({b.reason})" for b in bad[:5]))
    if found.scanned.converted:
        modes = ", ".join(f"{count:,} {mode}" for mode, count in found.scanned.converted.items())
        lines.append(f"converted      to 8-bit colour: {modes}")
    if found.ignored:
        lines.append("not images     " + ", ".join(f"{count:,} {kind}" for kind, count in found.ignored.items()))
    seconds, asked = found.scanned.seconds, found.scanned.detector_seconds
    lines.append(
        f"speed          {len(rows) / seconds:.1f} images a second, {asked / seconds:.0%} of the time in detectors"
    )
    return [*lines, f"wrote          {found.out} and {header_path(found.out)}"]


def _or_not(rate: Rate | None, where: str, hint: str) -> str:
    return f"not measured: {hint}" if rate is None else f"{rate} of {where}"


def said_by_second(found: Scan) -> list[str]:
    if found.second is None or found.trust.agreement is None:
        return []
    rows, agreed = found.scanned.rows, found.trust.agreement
    second = f"{found.second.name} ({found.second.version}), threshold {found.second.threshold:g}"
    kappa = "undefined (both give one answer to all)" if agreed.kappa != agreed.kappa else f"{agreed.kappa:.2f}"
    return [
        f"second         {second}",
        f"  contain it   {ratio([row.second_has_concept for row in rows])}",
        f"  false alarms {_or_not(found.trust.second_false_alarms, found.trust.clean_is, 'give --clean')}",
        f"  agreement    {agreed.agreement:.1%}, kappa {kappa}, PABAK {agreed.pabak:.2f}",
    ]


def warned(found: Scan, containing: int) -> list[str]:
    rows = found.scanned.rows
    if containing == 0:
        highest, threshold = max(row.score for row in rows), found.detector.threshold
        return [f"nothing to erase at threshold {threshold:g}; the highest score was {highest:.3f}"]
    if containing == len(rows):
        return [
            "warning: every image contains it, so captions with and without it cannot be told apart; "
            "add clean images, at least 5 %"
        ]
    without = sum(row.has_concept and not row.boxes for row in rows)
    return (
        [f"warning: {without:,} images contain it without a place; only its name is learned from them"]
        if without
        else []
    )
