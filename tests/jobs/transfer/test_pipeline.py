# SPDX-License-Identifier: Apache-2.0
"""The commands as a person types them, on colour folders that the package has never seen."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from anabranch import cli
from anabranch.allocate.clusters.record import Clustering
from anabranch.data.images import open_images
from anabranch.jobs.transfer.pretrain_experts import load_experts
from anabranch.mixture.context import Context, route
from anabranch.models import vit_mae

ON_A_BASE = ["--steps", "24", "--experts", "2", "--clusters", "4", "--set", "batch_size=16"]
SMALL = [*ON_A_BASE, "--set", "image_size=32"]

WITHOUT_US = """
import sys
class Wall:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "anabranch":
            raise ImportError("anabranch is not to be imported here")
sys.meta_path.insert(0, Wall())
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
folder, pictures, out = sys.argv[1:]
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
import glob
files = sorted(glob.glob(pictures + "/*.png"))[:6]
inputs = processor([Image.open(file) for file in files], return_tensors="pt")
with torch.no_grad():
    tokens = model(**inputs).last_hidden_state
from safetensors.torch import save_file
save_file({"pixels": inputs["pixel_values"], "tokens": tokens}, out)
classifier = AutoModelForImageClassification.from_pretrained(folder, num_labels=2)
assert classifier(**inputs).logits.shape == (6, 2)
assert not any(name.startswith("anabranch") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "moce"
    assert cli.main(["pretrain", "--images", str(folders / "pool"), "--out", str(out), *SMALL]) == 0
    return out


@pytest.fixture(scope="module")
def model(run, folders):
    out = run.parent / "model"
    assert cli.main(["customize", "--run", str(run), "--task", str(folders / "task"), "--out", str(out)]) == 0
    return out


def test_customised_model_opens_without_us_and_equals_the_routed_one(run, model, folders, tmp_path):
    arguments = [str(model), str(folders / "task/stripes"), str(tmp_path / "theirs.safetensors")]
    done = subprocess.run([sys.executable, "-c", WITHOUT_US, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "theirs.safetensors")
    said = json.loads((model / "customize.json").read_text())
    routed = load_experts(run, vit_mae.load(run / "base"), Clustering.load(run / "clusters"))
    ids = torch.full((6,), said["cluster"])
    with torch.no_grad(), route(routed, Context(ids={"cluster": ids})):
        ours = vit_mae.encode(routed, theirs["pixels"])
    assert (ours - theirs["tokens"]).abs().max() <= 1e-6


def test_the_image_processor_sees_what_training_saw(model, folders):
    """Square pictures to half a level of grey; others to less than a pixel's shift, where squeezing is far off."""
    images = open_images(folders / "task", image_size=32, channels=3, labelled=True)
    processor = AutoImageProcessor.from_pretrained(model)
    for i, file in enumerate(images.files):
        picture = Image.open(folders / "task" / file)
        theirs = processor(picture, return_tensors="pt")["pixel_values"]
        off = (theirs - vit_mae.normalise(images.store.read(torch.tensor([i])))).abs().mean()
        if picture.width == picture.height:
            assert off < 0.004
        else:
            squeezed = processor(picture.resize((32, 32)), return_tensors="pt")["pixel_values"]
            assert off < 0.6 * (squeezed - theirs).abs().mean()


def test_what_customize_says(model):
    said = json.loads((model / "customize.json").read_text())
    assert sum(said["histogram"]) == said["task_images"] == 48
    assert 0 < said["coverage"] <= 1
    assert said["largest_difference"] <= 1e-6
    card = (model / "README.md").read_text()
    assert f"{said['parameters']:,}" in card
    assert f"{said['macs']:,}" in card


def test_selection_by_labels_may_answer_the_base(run, folders, tmp_path):
    out = tmp_path / "model"
    arguments = ["--run", str(run), "--task", str(folders / "task"), "--out", str(out), "--select", "knn"]
    assert cli.main(["customize", *arguments]) == 0
    said = json.loads((out / "customize.json").read_text())
    assert said["tried"][0]["path"] is None
    best = max(said["tried"], key=lambda tried: tried["knn"])
    assert said["path"] == (best["path"] or [])


def test_summary_page_and_touch_report(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["dead_experts"] == []
    assert summary["changed"] == summary["named"] > 0
    assert summary["untouched"] == []
    page = (run / "report.html").read_text()
    assert "cluster 0" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_same_command_again_is_refused_and_resume_does_nothing_new(run, folders, capsys):
    arguments = ["pretrain", "--images", str(folders / "pool"), "--out", str(run), *SMALL]
    before = (run / "model" / "model.safetensors").read_bytes()
    assert cli.main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume"]) == 0
    assert (run / "model" / "model.safetensors").read_bytes() == before
    assert cli.main([*arguments, "--resume", "--set", "seed=5"]) == 2
    assert "seed" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["mae", "token-moe"])
def test_the_controls(folders, tmp_path, method, capsys):
    out = tmp_path / "run"
    assert cli.main(["pretrain", "--images", str(folders / "pool"), "--method", method, "--out", str(out), *SMALL]) == 0
    code = cli.main(["customize", "--run", str(out), "--task", str(folders / "task"), "--out", str(tmp_path / "model")])
    if method == "mae":
        assert code == 0
        assert vit_mae.transformers().AutoModel.from_pretrained(tmp_path / "model", add_pooling_layer=False)
    else:
        assert code == 2
        assert "chosen token by token" in capsys.readouterr().err
        assert not (tmp_path / "model").exists()


def test_learned_gate_blocks_and_a_given_base(run, folders, tmp_path):
    options = ["--base", str(run / "base"), "--expert-scope", "blocks", "--set", "assignment=gate", *ON_A_BASE]
    assert cli.main(["pretrain", "--images", str(folders / "pool"), "--out", str(tmp_path / "run"), *options]) == 0
    arguments = ["--run", str(tmp_path / "run"), "--task", str(folders / "task"), "--out", str(tmp_path / "model")]
    assert cli.main(["customize", *arguments]) == 0
    assert not (tmp_path / "run" / "base-training").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--clusters", "1"], "2 experts cannot differ on 1 clusters"),
        (["--clusters", "500"], "fewer images than clusters"),
        (["--clusters", "many"], "no number"),
        (["--set", "batch_size=15"], "divided evenly among the experts"),
        (["--set", "image_size=33"], "divisible by 4"),
        (["--base", "nowhere"], "image_size would change nothing"),
        (["--preset", "huge"], "there is no preset"),
        (["--experts", "0"], "experts is too small"),
        (["--steps", "0"], "steps is too small"),
        (["--set", "expert_layers=[9]"], "expected blocks 0..1, received 9"),
        (["--set", "temperature=0.5"], "temperature would change nothing"),
        (["--set", "assignment=gate", "--set", "temperature=0"], "temperature: expected above 0"),
        (["--set", "gate_scale=prob", "--expert-scope", "blocks"], "cannot be folded"),
    ],
)
def test_wrong_requests_say_what_is_wrong(folders, tmp_path, options, says, capsys):
    arguments = ["pretrain", "--images", str(folders / "pool"), "--out", str(tmp_path / "run"), *SMALL, *options]
    assert cli.main(arguments) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # the corrected command may use the same name


def test_a_base_that_is_missing_or_broken(run, folders, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(run / "base", broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:100])
    for base, says in ((tmp_path / "nowhere", "not a model folder"), (broken, "cannot be loaded")):
        arguments = ["--images", str(folders / "pool"), "--base", str(base), "--out", str(tmp_path / "run"), *ON_A_BASE]
        assert cli.main(["pretrain", *arguments]) == 2
        assert says in capsys.readouterr().err


def test_resuming_on_other_images_is_refused(folders, tmp_path, capsys):
    pool = tmp_path / "pool"
    shutil.copytree(folders / "pool", pool)
    arguments = ["pretrain", "--images", str(pool), "--method", "mae", "--out", str(tmp_path / "run"), *SMALL]
    assert cli.main(arguments) == 0
    shutil.copy(next((folders / "pool/disc").glob("*.png")), pool / "a-first-one.png")
    assert cli.main([*arguments, "--resume"]) == 2
    assert "images 1 (all): not what this run began with" in capsys.readouterr().err


def test_the_page_is_built_again_with_its_clusters(run):
    before = (run / "report.html").read_text()
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.html").read_text() == before


def test_choosing_by_labels_never_reads_the_test_images_of_the_task(run, folders, tmp_path):
    """Half of the labelled images to fit on, half to score on, all of them from train/."""
    for part in ("train", "test"):
        for kind in ("disc", "stripes"):
            (tmp_path / "task" / part / kind).mkdir(parents=True)
            for i, file in enumerate(sorted((folders / "task" / kind).iterdir())):
                if (i % 2 == 0) == (part == "train"):
                    shutil.copy(file, tmp_path / "task" / part / kind)
    out = tmp_path / "model"
    arguments = ["--run", str(run), "--task", str(tmp_path / "task"), "--out", str(out), "--select", "knn"]
    assert cli.main(["customize", *arguments]) == 0
    assert json.loads((out / "customize.json").read_text())["task_images"] == 24


def test_images_that_are_all_alike(folders, tmp_path, capsys):
    (tmp_path / "same").mkdir()
    for i in range(40):
        shutil.copy(next((folders / "pool/disc").glob("*.png")), tmp_path / "same" / f"{i}.png")
    code = cli.main(["pretrain", "--images", str(tmp_path / "same"), "--out", str(tmp_path / "run"), *SMALL])
    assert code in (1, 2)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "distinct" in said or "constant" in said or "collapsed" in said


def test_grey_images_for_a_colour_base_and_the_reverse(run, tmp_path, capsys):
    assert (
        cli.main(
            [
                "pretrain",
                "--images",
                "patchwork:digits",
                "--base",
                str(run / "base"),
                "--out",
                str(tmp_path / "a"),
                *SMALL[:6],
                "--set",
                "batch_size=16",
            ]
        )
        == 0
    )
    grey = tmp_path / "grey"
    vit_mae.build("tiny", image_size=32, channels=1, seed=0).save_pretrained(grey)
    code = cli.main(
        [
            "pretrain",
            "--images",
            "patchwork:digits",
            "--base",
            str(grey),
            "--out",
            str(tmp_path / "b"),
            *SMALL[:2],
            "--method",
            "mae",
        ]
    )
    assert code == 0
    assert capsys.readouterr().err == ""


def test_an_unfinished_run_is_no_run(tmp_path, folders, capsys):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.resolved.yaml").write_text("steps: 3\n")
    assert cli.main(["customize", "--run", str(tmp_path / "half"), "--task", str(folders / "task")]) == 2
    assert "--resume" in capsys.readouterr().err


def test_a_model_folder_with_foreign_files_is_left_alone(run, folders, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    code = cli.main(["customize", "--run", str(run), "--task", str(folders / "task"), "--out", str(tmp_path / "mine")])
    assert code == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert "would be lost" in capsys.readouterr().err


def test_a_base_that_was_swapped_is_noticed(run, folders, tmp_path, capsys):
    swapped = tmp_path / "run"
    shutil.copytree(run, swapped)
    shutil.rmtree(swapped / "base")
    vit_mae.build("tiny", image_size=32, channels=3, seed=9).save_pretrained(swapped / "base")
    assert (
        cli.main(["customize", "--run", str(swapped), "--task", str(folders / "task"), "--out", str(tmp_path / "m")])
        == 2
    )
    assert "not the encoder" in capsys.readouterr().err


def test_a_task_of_one_planted_domain_takes_clusters_of_that_domain(tmp_path):
    """Digits and textures mixed without labels: each finds its own kind among the training images."""
    domains = ("digits", "textures")
    pool = [f"patchwork:{name}" for name in domains]
    options = ["--steps", "150", "--experts", "2", "--clusters", "8", "--out", str(tmp_path / "run")]
    assert cli.main(["pretrain", "--images", *pool, *options]) == 0
    labels = Clustering.load(tmp_path / "run" / "clusters").labels
    sizes = [len(open_images(spec)) for spec in pool]
    domain = torch.repeat_interleave(torch.arange(2), torch.tensor(sizes))
    for i, name in enumerate(domains):
        out = tmp_path / name
        assert cli.main(["customize", "--run", str(tmp_path / "run"), "--task", pool[i], "--out", str(out)]) == 0
        cluster = json.loads((out / "customize.json").read_text())["cluster"]
        assert (domain[labels == cluster] == i).float().mean() > 0.8


def test_a_negative_is_noticed(run, folders, tmp_path, capsys):
    from PIL import ImageOps

    for kind in ("disc", "stripes"):
        (tmp_path / "negative" / kind).mkdir(parents=True)
        for file in (folders / "task" / kind).iterdir():
            black_on_white = ImageOps.invert(Image.open(file)).point(lambda value: min(255, value + 80))
            black_on_white.save(tmp_path / "negative" / kind / file.name)
    arguments = ["--run", str(run), "--task", str(tmp_path / "negative" / "disc"), "--out", str(tmp_path / "model")]
    assert cli.main(["customize", *arguments]) == 0
    assert "another mean" in capsys.readouterr().out
