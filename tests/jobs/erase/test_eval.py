import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import anabranch
from anabranch import cli
from anabranch.data.streams import derived_seed
from anabranch.errors import CheckFailed, UsageError
from anabranch.jobs.erase import eval as job
from anabranch.jobs.erase.arms import Judges, Subject, account, corrected, look
from anabranch.jobs.erase.attacks import Plan
from anabranch.jobs.erase.diagnose import chance_in_place, frame, middles, positive_control
from anabranch.jobs.erase.features import open_features, plain_features
from anabranch.jobs.erase.sample import Sampling, draw
from anabranch.jobs.erase.settings import EvalSettings
from anabranch.jobs.erase.study import Study, floor_of, judged, study_after, study_before, study_never
from anabranch.measure.concept_ratio import wilson
from anabranch.measure.judge import Calibration
from anabranch.models.diffusion.family import open_pipeline, save_pipeline
from anabranch.suppress.detectors.protocol import Detection
from anabranch.suppress.geom_erasing.adapter import apply, fingerprint, hashes, save_adapter
from anabranch.suppress.geom_erasing.bins import Grid
from anabranch.suppress.geom_erasing.erase import Config, prepare
from anabranch.suppress.geom_erasing.words import Vocabulary
from tests.diffusion_pipelines import tiny

VOCABULARY = Vocabulary(name="<mark>", grid=Grid(3, 3))
PROMPTS = ["a dress", "a bag", "a photo of a coat"]
SEEDS = [derived_seed("picture", 0, i) % 2**32 for i in range(24)]
HOW = Sampling(scale=2.0, steps=2, batch_size=16)


class CornerDetector:
    """Fires where the upper left corner is bright, in each of its corners of `side` pixels."""

    version = "1"

    def __init__(self, threshold=0.5, side=9, name="corner"):
        self.threshold, self.side, self.name = threshold, side, name

    def detect(self, images, files=None):
        corners = [image[: self.side, : self.side].mean() / 255 for image in images]
        return [[Detection(float(corner), (0, 0, self.side, self.side))] for corner in corners]


def middle_brightness(pipe, samples=24):
    """A threshold that half of the model's pictures pass."""
    pixels = draw(pipe, [PROMPTS[i % 3] for i in range(samples)], [""] * samples, SEEDS[:samples], HOW)
    found = CornerDetector().detect(list(pixels.permute(0, 2, 3, 1).numpy()))
    return float(np.median([several[0].score for several in found]))


def darkened(folder, model, by):
    """An adapter whose denoiser makes every picture darker, so that no corner is bright: an eraser that works."""
    pipe = open_pipeline(model)
    base = fingerprint(pipe)
    config = Config(trained="denoiser")
    boxes = [[(0, 0, 9, 9)], None, [(0, 0, 9, 9)], None]
    prepared = prepare(
        pipe, VOCABULARY, config, torch.zeros(4, 1, 28, 28), ["a dress"] * 4, boxes, size=28, word="mark"
    )
    with torch.no_grad():
        pipe.transformer.proj_out.bias += by  # the latents are the pixels, and the velocity points to the noise
    facts = {"trained": "denoiser", "base": base, "policy": "name", "concept": "mark"}
    folder.mkdir()
    save_adapter(pipe, folder, VOCABULARY, prepared.attached, [b for b in prepared.bins if b], facts)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, an adapter that erases, one that does nothing, clean pictures, prompts, and a detector."""
    root = tmp_path_factory.mktemp("erase-eval")
    save_pipeline(tiny("stable_diffusion_3"), root / "model")
    darkened(root / "adapter", root / "model", 0.6)
    darkened(root / "idle", root / "model", 0.0)
    never = open_pipeline(root / "model")
    never.transformer.proj_out.bias += 0.6
    save_pipeline(never, root / "never")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    (root / "clean").mkdir()
    generator = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(generator.integers(0, 60, (30, 28), dtype=np.uint8)).save(root / "clean" / f"{i}.png")
    threshold = middle_brightness(open_pipeline(root / "model"))
    return root, threshold


@pytest.fixture
def settings(world, monkeypatch):
    root, threshold = world
    opened = lambda spec, **given: CornerDetector(threshold, 7 if spec == "small" else 9, spec)  # noqa: E731
    monkeypatch.setattr(job, "open_detector", opened)
    given = {
        "model": root / "model", "adapter": root / "adapter", "prompts": root / "prompts.txt", "clean": root / "clean",
        "detector": "corner", "second_detector": "small", "samples": 24, "guidance": 2.0, "steps": 2, "batch_size": 16,
        "attack_steps": 2, "attack_samples": 6, "attack_images": 4,
    }  # fmt: skip
    return lambda **more: EvalSettings(**(given | more))


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_eraser_that_works_from_beginning_to_end(settings, world, tmp_path, capsys):
    root, _ = world
    before = files_of(root / "adapter")
    result = job.erase_eval(settings(out=tmp_path / "run", never=root / "never"))
    arms = result["arms"]
    assert arms["before"]["icr"]["hits"] == arms["no-op"]["icr"]["hits"] == 12
    assert arms["erased"]["icr"]["hits"] == 0
    assert arms["erased"]["minus_before"]["verdict"] == "negative"
    assert arms["no-op"]["minus_before"]["difference"] == 0
    assert arms["never"]["icr"]["hits"] == 0
    assert set(result["policies"]) == {"none", "name", "sampled", "prior", "all", "detected"}
    assert result["policies"]["name"] == arms["erased"]
    assert result["verdict"]["level"] == "suppressed"
    assert not result["verdict"]["void"]
    assert not any("was not tried" in reason for reason in result["verdict"]["reasons"])
    assert {"adversarial_prompt/2", "prompt_search"} < set(result["attacks"])
    assert {"erased", "before", "never"} == set(result["attacks"]["compression/int4"])
    assert all(row["erased"]["count"] == 6 for row in result["attacks"].values())
    curve = result["curves"]["erased"]["relearn"][0]
    assert [step for step, _ in curve] == [0, 1, 2]
    assert result["d2"]["word, before"]["count"] == 12
    assert result["positive_control"]["drawn"]["count"] == 24
    assert set(result["arms"]["before"]["quality"]) >= {"frechet", "kid", "feature_space"}
    assert result["arms"]["before"]["corrected"].startswith("not corrected: no labelled pictures")
    assert files_of(root / "adapter") == before
    written = json.loads((tmp_path / "run/eval.json").read_text())
    assert written["verdict"] == result["verdict"]
    assert anabranch.results(tmp_path / "run").table() == result.table()
    assert "| erased | 24 | 0.0 [0.0, 13.8] | −50.0" in result.table()
    page = (tmp_path / "run/report.html").read_text()
    assert "Is “mark” gone?" in page
    assert "not asked for" not in page
    assert len(list((tmp_path / "run/pictures/erased").glob("*.png"))) == 8
    assert (tmp_path / "run/config.resolved.yaml").is_file()
    said = capsys.readouterr().out
    assert re.search(r"before +24  50\.0 \[31\.4, 68\.6\]", said)
    assert re.search(r"erased +24  0\.0 \[0\.0, 13\.8\] +-50\.0", said)
    assert "report.html" in said


def test_an_eraser_that_does_nothing_fails_after_everything_was_written(settings, world, tmp_path):
    with pytest.raises(CheckFailed, match="nothing erased") as caught:
        job.erase_eval(settings(adapter=world[0] / "idle", out=tmp_path / "run", attacks="none", policy="none"))
    assert caught.value.exit_code == 3
    result = json.loads((tmp_path / "run/eval.json").read_text())
    assert result["verdict"]["level"] == "nothing erased"
    assert not result["verdict"]["void"]
    assert result["arms"]["erased"]["icr"]["hits"] == result["arms"]["before"]["icr"]["hits"]
    assert "paraphrase" not in result["attacks"]
    assert "Nothing was shown to be erased" in (tmp_path / "run/report.html").read_text()


def test_a_model_without_an_eraser_is_measured_as_it_is(settings, tmp_path):
    given = settings(adapter=None, concept="mark", out=tmp_path / "run", attacks="int8", clean=None)
    result = job.erase_eval(given)
    assert result["verdict"] is None
    assert list(result["arms"]) == ["before", "word", "no-op"]
    assert result["not_measured"]["after"].startswith("no --adapter")
    assert result["not_measured"]["quality"].startswith("no --clean")
    assert list(result["attacks"]) == ["compression/int8"]


def test_a_baked_lora_is_judged_without_a_negative_prompt(settings, world, tmp_path):
    from anabranch.suppress.lora import add_lora, save_lora

    pipe = open_pipeline(world[0] / "model")
    base = fingerprint(pipe)
    for name, parameter in add_lora(pipe, 2, 0).items():
        parameter.data.add_(0.05 if "lora_B" in name else 0.0)
    folder = tmp_path / "baked"
    folder.mkdir()
    save_lora(pipe, folder)
    config = {
        "format": 1, "family": "stable_diffusion_3", "name": "<mark>", "new_name": True, "grid": [3, 3], "base": base,
        "concept": "mark", "trained": "baked", "policy": "none", "training_bins": [], "training_counts": [],
    }  # fmt: skip
    (folder / "geom_config.json").write_text(json.dumps(config))
    given = settings(adapter=folder, out=tmp_path / "run", attacks="int4,paraphrase", guidance=1.0)
    with pytest.raises(CheckFailed):
        job.erase_eval(given)
    result = json.loads((tmp_path / "run/eval.json").read_text())
    assert list(result["policies"]) == ["none"]
    assert result["unfit_policies"]["name"].startswith("a baked adapter")
    assert "word" not in result["arms"]
    assert "positive control, and D1 and D2 of the learnt words" in result["not_measured"]
    assert set(result["attacks"]) >= {"compression/int4", "paraphrase/named"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"detector": ""}, "nobody looks for the concept"),
        ({"samples": 19}, "samples are too few"),
        ({"guidance": 1.0}, "does nothing without guidance"),
        ({"attacks": "invertion"}, "did you mean inversion?"),
        ({"prompts": None}, "no prompts were given"),
        ({"adapter": None}, "the concept has no name"),
    ],
)
def test_wrong_usage_writes_nothing(change, says, settings, tmp_path):
    with pytest.raises(UsageError, match=re.escape(says)):
        job.erase_eval(settings(out=tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_base_is_refused_before_anything_is_drawn(settings, tmp_path):
    save_pipeline(tiny("stable_diffusion_3", seed=1), tmp_path / "other")
    with pytest.raises(UsageError, match="another base model"):
        job.erase_eval(settings(model=tmp_path / "other", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_prompts_that_ask_for_it_are_said():
    assert job.word_in_prompts(["a dress", "a Mark on a bag"], "mark").startswith("1 of 2 prompts ask for 'mark'")
    assert job.word_in_prompts(["a dress"], "mark") is None


def test_the_command_line_has_twelve_flags(capsys):
    assert cli.main(["erase", "eval", "--detektor", "qr"]) == 2
    assert "did you mean --detector?" in capsys.readouterr().err


# without files


def test_the_parts_work_on_pipelines_and_leave_them_as_they_were(world):
    root, threshold = world
    pipe = open_pipeline(root / "model")
    hashed = hashes(pipe)
    judges = Judges(detector=CornerDetector(threshold))
    study = Study(
        concept="mark", prompts=[PROMPTS[i % 3] for i in range(24)], seeds=SEEDS, how=HOW, judges=judges,
        attacks=["paraphrase", "int8", "partial"], attack_samples=4, attack_images=3, plan=Plan(steps=1), ladder=False,
    )  # fmt: skip
    before = study_before(study, pipe)
    never = study_never(study, open_pipeline(root / "model"), before)  # its own floor: then there is nothing to erase
    assert np.array_equal(never.arm.seen.hits, before.arms["before"].seen.hits)
    assert before.arms["before"].seen.rate.hits == 12
    assert before.material.source.startswith("the model's own pictures")
    assert hashes(pipe) == hashed
    applied = apply(pipe, root / "adapter")
    within = hashes(pipe)
    after = study_after(study, applied, before)
    assert hashes(pipe) == within
    assert set(after.arms) == {"erased", "name", "none"}
    assert set(after.attacked.arms) == set(before.attacked.arms)
    found = judged(study, before, after, None, floor_of(study, None, (0, 100)))
    assert found.level == "suppressed"
    assert not found.void
    assert study.skipped["floor"].startswith("no --never")
    assert judged(study, before, after, never, floor_of(study, never, None)).void


def test_the_positive_control_asks_for_places_and_counts_what_lies_there(world):
    root, _ = world
    applied = apply(open_pipeline(root / "model"), root / "idle")
    unasked = np.zeros(6, dtype=bool)
    judges = Judges(detector=CornerDetector(0.0))
    control = positive_control(applied, unasked, PROMPTS * 2, list(range(6)), HOW, judges)
    assert control.drawn == wilson(6, 6)
    assert control.in_place == wilson(6, 6)  # every training box was the corner
    assert control.chance == 1.0
    assert control.words.verdict == "explicit"
    assert control.asked[0] == frame([(0, 0)], Grid(3, 3), 28)


def test_chance_is_what_other_pictures_places_give():
    here, there = ([(0, 0)], [(0, 0)]), ([(1, 1)], [(1, 1)])
    assert chance_in_place([here, there]) == 0.0
    assert chance_in_place([here, here]) == 1.0
    assert chance_in_place([here, here, there]) == pytest.approx(2 / 6)
    assert chance_in_place([]) == 0.0


def test_a_detectors_boxes_lie_in_the_bins_of_their_middles(world):
    judges = Judges(detector=CornerDetector(0.0, side=20))
    arm = judges.arm(torch.full((2, 1, 28, 28), 200, dtype=torch.uint8), ["", ""])
    assert middles(arm, 28, Grid(3, 3)) == [[(1, 1)], [(1, 1)]]
    assert arm.seen.hits.all()
    assert look(CornerDetector(0.9), arm.pixels).rate == wilson(0, 2)


def test_a_rate_is_corrected_by_what_the_detector_does_on_known_cases():
    rate = wilson(55, 100)
    assert corrected(rate, Calibration((90, 100), (70, 100)))["rate"] == pytest.approx(0.4167, abs=1e-4)
    assert corrected(rate, "nobody knows") == "not corrected: nobody knows"
    assert corrected(rate, Calibration((9, 10), (70, 100))).startswith("not corrected: sensitivity rests on too few")


def test_an_arm_is_accounted_for_against_before(world):
    judges = Judges(detector=CornerDetector(0.5), features=open_features(None))
    bright, dark = (torch.full((8, 1, 28, 28), value, dtype=torch.uint8) for value in (200, 20))
    noise = torch.randint(0, 20, bright.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, after = (judges.arm(p + noise, [""] * 8, quality=True) for p in (bright, dark))
    reference = plain_features(dark + noise)
    told = [account(arm, before, reference, ["unknown"], "plain") for arm in (before, after)]
    assert told[0]["quality"]["frechet"] > told[1]["quality"]["frechet"] == pytest.approx(0, abs=1e-6)
    assert told[1]["minus_before"]["difference"] == -1.0
    assert reference.shape == (8, 96)


def test_a_models_feature_space_is_read_from_a_folder(tmp_path):
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    space = open_features(tmp_path / "vit")
    pixels = torch.randint(0, 255, (3, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert space.images(pixels).shape == (3, 16)
    assert space.agreement is None
    assert space.name.startswith("vit")


def test_a_subject_draws_as_the_command_does(world):
    pipe = open_pipeline(world[0] / "model")
    subject = Subject(pipe=pipe, how=HOW, negative="mark")
    assert torch.equal(subject.draw(PROMPTS, [1, 2, 3]), draw(pipe, PROMPTS, ["mark"] * 3, [1, 2, 3], HOW))
    shutil.rmtree(world[0] / "nothing", ignore_errors=True)
