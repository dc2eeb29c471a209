"""The small world in which erasing is studied, its arms, and (slow) what the arms must show."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import anabranch
from anabranch.data.images import open_images
from anabranch.data.marks import glyph
from anabranch.jobs.erase.garment_arms import ARMS
from anabranch.jobs.erase.garment_bench import Bench, Regime
from anabranch.jobs.erase.garment_judges import train_judges
from anabranch.jobs.erase.garment_scores import draw_policies, place_control, score
from anabranch.jobs.erase.marked_garments import (
    GRID,
    KNOWN,
    MARK,
    PLATE,
    bin_word,
    clean_world,
    jittered,
    shuffled,
    with_known,
    with_mark,
)
from anabranch.measure.concept_ratio import mcnemar
from anabranch.suppress.detectors import detect_checked, open_detector
from anabranch.suppress.geom_erasing.bins import covered_bins

BASE = Path(anabranch.__file__).parent / "data" / "garment_base"


@pytest.fixture(scope="module")
def garments():
    images = open_images("patchwork:garments", labelled=True)
    return images.take(~images.is_test)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    file = tmp_path_factory.mktemp("mark") / "mark.png"
    Image.fromarray((glyph("plate-x", PLATE).value * 255).astype(np.uint8)).save(file)
    return open_detector(f"template:{file}")


def test_the_detector_finds_every_mark_at_its_box_and_none_in_clean_pictures_or_known_objects(garments, detector):
    world = with_known(with_mark(clean_world(garments.take(torch.arange(300))), 0.5, seed=1), 0.5, 1, "unlike")
    seen = detect_checked(detector, list(world.pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()))
    found = [[d.box for d in ds if d.score > detector.threshold] for ds in seen]
    assert [bool(boxes) for boxes in found] == world.marked.tolist()
    for boxes, true in zip(found, world.boxes, strict=True):
        assert [tuple(map(round, box)) for box in boxes] == true


def test_captions_name_the_known_object_with_its_bins_and_never_the_mark(garments):
    clean = clean_world(garments.take(torch.arange(200)))
    world = with_known(with_mark(clean, 0.8, seed=2), 0.5, 2, "alike")
    assert int(world.marked.sum()) == 160
    assert not any(MARK in caption.split() for caption in world.captions)
    named = [caption.split() for caption in world.captions if KNOWN["alike"] in caption.split()]
    assert len(named) == 100
    assert all(words[-4:] == [bin_word(place) for place in square(words[-4:])] for words in named)
    outside = [
        i for i, boxes in enumerate(world.boxes) if not boxes and KNOWN["alike"] not in world.captions[i].split()
    ]
    assert torch.equal(world.pixels[outside], clean.pixels[outside])


def square(words):
    """The four bins of a plate whose first word is the first of `words`."""
    m, n = int(words[0][1]), int(words[0][2])
    return covered_bins([(4 * m, 4 * n, 4 * m + PLATE, 4 * n + PLATE)], 28, 28, GRID)


def test_shuffling_deals_the_same_boxes_to_the_same_pictures_in_another_order():
    boxes = [[(i, 0, i + 8, 8)] if i % 3 else None for i in range(30)]
    dealt = shuffled(boxes, seed=0)
    assert [found is None for found in dealt] == [found is None for found in boxes]
    assert sorted(found for found in dealt if found) == sorted(found for found in boxes if found)
    assert dealt != boxes


@pytest.mark.parametrize("iou", [0.1, 0.4, 0.8])
def test_jitter_leaves_the_overlap_that_was_asked_for_inside_the_picture(iou):
    boxes = [[(x, y, x + 8, y + 8)] for x in (0, 10, 20) for y in (0, 9, 20)]
    for (before,), (after,) in zip(boxes, jittered(boxes, iou, seed=0), strict=True):
        width = min(before[2], after[2]) - max(before[0], after[0])
        height = min(before[3], after[3]) - max(before[1], after[1])
        assert width * height / (128 - width * height) == pytest.approx(iou)
        assert min(after) >= 0
        assert max(after) <= 28


def bench(garments, detector, folder, samples, base=BASE, seed=0, **regime):
    judges = train_judges(garments, folder, steps=3 if samples < 50 else 600)
    return Bench(
        base=base, images=garments, judges=judges, detector=detector, regime=Regime(**regime), seed=seed,
        samples=samples,
    )  # fmt: skip


@pytest.mark.parametrize("arm", ["plain", "boxes", "new places", "model: boxes", "SLD", "UCE", "ESD-x", "baked"])
def test_every_kind_of_arm_runs_and_is_drawn_from_the_same_seeds(arm, garments, detector, tmp_path):
    small = {"images": 40, "steps": 2, "long_steps": 2, "short_steps": 2, "eraser_steps": 1, "batch_size": 4}
    made_on = bench(garments, detector, tmp_path, 4, sample_steps=2, **small)
    drawn = draw_policies(made_on, ARMS[arm](made_on), ("none", "name", "detected", "strong"))
    assert drawn
    for pixels in drawn.values():
        assert pixels.shape == (4, 1, 28, 28)
        assert len(score(made_on, pixels).hits) == 4


BASES = {0: BASE, **{seed: Path(__file__).parents[3] / "recipes/geom_erasing/bases" / str(seed) for seed in (1, 3)}}


@pytest.mark.slow
@pytest.mark.parametrize("seed", BASES)
def test_true_places_beat_the_name_alone_and_shuffled_places(seed, garments, detector, tmp_path):
    """The ladder on every base: place control first, then paired pictures with the name as negative."""
    made_on = bench(garments, detector, tmp_path, 400, BASES[seed], seed, images=2000)
    hits, right = {}, {}
    for arm, policy in (
        ("plain", "none"),
        ("plain", "word"),
        ("name", "name"),
        ("shuffled", "name"),
        ("boxes", "name"),
    ):
        made = ARMS[arm](made_on)
        scored = score(made_on, draw_policies(made_on, made, (policy,))[policy])
        hits[arm, policy], right[arm, policy] = scored.hits.numpy(), scored.right.float().mean().item()
        if arm == "boxes":
            control = place_control(made_on, made)
            assert control["drawn"] >= 0.9
            assert control["in_place"] >= 0.9
    boxes = hits["boxes", "name"]
    for control in ("name", "shuffled"):
        assert boxes.mean() < 0.8 * hits[control, "name"].mean()
        assert mcnemar(hits[control, "name"], boxes) < 0.01
    assert hits["plain", "word"].mean() > hits["plain", "none"].mean() - 0.06
    assert right["boxes", "name"] > right["plain", "none"] - 0.05
