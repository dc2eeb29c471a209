# SPDX-License-Identifier: Apache-2.0
"""The commands as a person types them, on photographs that the package has never seen, for every family."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from anabranch import cli
from tests.diffusion_pipelines import FAMILIES
from tests.jobs.erase.world import config_of, everything, photographs, saved

SMALL = ["--steps", "3", "--grid", "3", "--set", "batch_size=4", "--set", "learning_rate=0.02"]
POLICIES = {
    "data": ("none", "name", "sampled", "prior", "all", "detected"),
    "words": ("none", "name", "prior", "all"),
}
ADAPTER = {"geom_config.json", "geom_tokens.safetensors", "negative.safetensors", "README.md", "config.resolved.yaml"}


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What `data icd` and `erase scan` make of 24 photographs."""
    root = tmp_path_factory.mktemp("erasing")
    photographs(root / "photographs", 24, (150, 120))
    made = ["--out", root / "icd", "--kind", "qr", "--ratio", "0.6", "--set", "size=[0.45,0.6]"]
    assert run("data", "icd", "--images", root / "photographs", *made) == 0
    images = root / "icd" / "images"
    looked = ["--detector", "qr", "--concept", "mark", "--known", images / "metadata.jsonl"]
    assert run("erase", "scan", "--images", images, "--out", root / "labels.jsonl", *looked) == 0
    (root / "prompts.txt").write_text("a dress\na bag\n")
    return root


@pytest.fixture(scope="module")
def world(data):
    """An adapter of each kind for each family: FAMILY/model, FAMILY/data, FAMILY/words, FAMILY/baked."""
    for name in FAMILIES:
        root = data / name
        model = saved(root / "model", name)
        common = ["--model", model, "--labels", data / "labels.jsonl", *SMALL]
        assert run("erase", "train", *common, "--out", root / "data", "--set", "r=2") == 0
        assert run("erase", "train", *common, "--out", root / "words", "--mode", "model") == 0
        bake = ["--prompts", data / "prompts.txt", "--steps", "3", "--set", "sample_steps=2", "--set", "num_latents=4"]
        bake += ["--set", "learning_rate=0.02", "--set", "batch_size=4"]
        assert run("erase", "bake", "--model", model, "--adapter", root / "data", "--out", root / "baked", *bake) == 0
    return data


def test_the_scan_finds_what_was_put_there(data):
    found = [json.loads(line) for line in (data / "labels.jsonl").read_text().splitlines()]
    truth = {
        row["file_name"]: row["has_concept"]
        for row in map(json.loads, (data / "icd" / "images" / "metadata.jsonl").read_text().splitlines())
    }
    right = sum(row["has_concept"] == truth[row["file"]] for row in found)
    assert right >= 21
    assert not any(row["has_concept"] and not truth[row["file"]] for row in found)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_training_and_baking_leave_behind(world, name):
    for kind, policy, trained in (("data", "name", "lora"), ("words", "all", "tokens")):
        folder = world / name / kind
        files = set(everything(folder))
        assert files >= ADAPTER
        assert ("pytorch_lora_weights.safetensors" in files) == (kind == "data")
        facts = config_of(folder)
        assert (facts["policy"], facts["trained"], facts["concept"], facts["name"]) == (
            policy,
            trained,
            "mark",
            "<mark>",
        )
        assert facts["detector"] == "qr"
        assert sum(facts["training_counts"]) == facts["with_concept"] > 8
        assert facts["base"] == config_of(world / name / "data")["base"]
        assert "steps: 3" in (folder / "config.resolved.yaml").read_text()
    baked = config_of(world / name / "baked")
    assert (baked["trained"], baked["policy"], baked["baked_policy"]) == ("baked", "none", "name")
    assert "geom_tokens.safetensors" not in everything(world / name / "baked")


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_under_every_policy_by_seed(world, name, tmp_path):
    root = world / name
    common = ["--model", root / "model", "--prompt", "a dress", "a bag", "--count", "2", "--steps", "2"]
    made = {}
    for kind in ("data", "words"):
        for policy in POLICIES[kind]:
            out = tmp_path / f"{kind}-{policy}"
            options = ["--adapter", root / kind, "--policy", policy, "--out", out]
            options += ["--detector", "qr"] if policy == "detected" else []
            assert run("erase", "sample", *common, *options) == 0
            made[kind, policy] = pictures(out)
            rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
            assert [row["text"] for row in rows] == ["a dress"] * 2 + ["a bag"] * 2
            assert {row["policy"] for row in rows} == {policy}
        different = [made[kind, policy].tobytes() for policy in ("none", "name", "prior", "all")]
        assert len(set(different)) == 4, kind
    assert run("erase", "sample", *common, "--out", tmp_path / "plain") == 0
    assert (made["words", "none"] == pictures(tmp_path / "plain")).all(), "words that are not named change nothing"
    assert (made["data", "none"] != pictures(tmp_path / "plain")).any()
    assert run("erase", "sample", *common, "--adapter", root / "baked", "--out", tmp_path / "baked") == 0
    assert (pictures(tmp_path / "baked") != pictures(tmp_path / "plain")).any()
    again = ["--adapter", root / "data", "--policy", "sampled"]
    assert run("erase", "sample", *common, *again, "--out", tmp_path / "again") == 0
    assert (made["data", "sampled"] == pictures(tmp_path / "again")).all()
    assert run("erase", "sample", *common, *again, "--out", tmp_path / "again", "--seed", "1") == 0
    assert (made["data", "sampled"] != pictures(tmp_path / "again")).any()


def pictures(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def test_the_same_command_makes_the_same_files(world, tmp_path):
    root = world / "stable_diffusion"
    common = ["--model", root / "model", "--labels", world / "labels.jsonl", *SMALL, "--set", "r=2"]
    assert run("erase", "train", *common, "--out", tmp_path / "data") == 0
    before, after = everything(root / "data"), everything(tmp_path / "data")
    assert before.keys() == after.keys()
    for file in before:
        if not file.startswith("training/"):
            assert before[file] == after[file], file
    assert run("erase", "train", *common, "--out", tmp_path / "other", "--seed", "1") == 0
    assert everything(tmp_path / "other")["geom_tokens.safetensors"] != before["geom_tokens.safetensors"]


SNIPPETS = """
import sys
class Wall:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "anabranch":
            raise ImportError("anabranch is walled off")
sys.meta_path.insert(0, Wall())
import json, torch
import numpy as np
from safetensors.torch import save_file
given, out = sys.argv[1:3]
made = {}
for name, code in json.load(open(given)).items():
    torch.manual_seed(0)
    space = {}
    exec(code, space)
    made[name] = torch.from_numpy(np.array(space["image"]))
save_file(made, out)
assert "anabranch" not in sys.modules
"""


def snippets(folder):
    """The blocks of code in a README, with the folder that they speak of and fewer steps."""
    text = (folder / "README.md").read_text().replace("path/to/this/folder", str(folder))
    text = text.replace("path/to/the/base", str(folder.parent / "model"))
    text = text.replace(").images[0]", ", num_inference_steps=4).images[0]")
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


def test_the_code_of_every_readme_runs_without_this_package_and_makes_the_same_picture_as_with_it(world, tmp_path):
    folders = {f"{name}/{kind}": world / name / kind for name in FAMILIES for kind in ("data", "words", "baked")}
    stock = {name: snippets(folder)[0] for name, folder in folders.items()}
    (tmp_path / "given.json").write_text(json.dumps(stock))
    command = [sys.executable, "-c", SNIPPETS, str(tmp_path / "given.json"), str(tmp_path / "made.safetensors")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    made = load_file(tmp_path / "made.safetensors")
    for name, folder in folders.items():
        assert made[name].float().std() > 0
        for code in snippets(folder)[1:]:
            torch.manual_seed(0)
            space = {}
            exec(code, space)
            assert (np.array(space["image"]) == made[name].numpy()).all(), name


ALONE = """
import sys
def wall(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        raise RuntimeError(f"the network was asked: {event} {arguments}")
sys.addaudithook(wall)
import json
from anabranch import cli
sys.exit(max(cli.main(command) for command in json.loads(sys.argv[1])))
"""


def test_nothing_is_asked_of_the_network_where_no_switch_forbids_it(world, tmp_path):
    root = world / "stable_diffusion"
    model, prompts = ["--model", root / "model"], ["--prompts", world / "prompts.txt"]
    few = ["--set", "num_latents=4", "--set", "sample_steps=2"]
    commands = [
        ["erase", "scan", "--images", world / "icd" / "images", "--detector", "qr", "--out", tmp_path / "labels.jsonl"],
        ["erase", "train", *model, "--labels", world / "labels.jsonl", *SMALL, "--out", tmp_path / "adapter"],
        ["erase", "sample", *model, "--prompt", "a bag", "--adapter", tmp_path / "adapter", "--out", tmp_path / "seen"],
        ["erase", "bake", *model, *prompts, "--adapter", tmp_path / "adapter", "--out", tmp_path / "baked", *few],
        ["erase", "eval", *model, *prompts, "--detector", "qr", "--concept", "mark", "--out", tmp_path / "measured",
         "--samples", "20", "--set", "steps=2", "--set", "attacks=none"],
    ]  # fmt: skip
    free = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    given = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", ALONE, given], cwd=tmp_path, env=free, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "measured" / "eval.json").is_file()


def test_the_stock_pipeline_takes_no_second_negative_prompt(world):
    (code,) = [part for part in snippets(world / "stable_diffusion" / "data") if "anabranch" in part]
    with pytest.raises(ValueError, match="both `negative_prompt`"):
        exec(code.replace("**negative", '**negative, negative_prompt="blurry"'), {})


def test_wrong_use_ends_with_code_2_and_says_what_to_try(world, tmp_path, capsys):
    root = world / "stable_diffusion"
    train = ["train", "--labels", world / "labels.jsonl", "--out", tmp_path / "out"]
    for arguments, says in (
        ([*train, "--model", root / "modl"], "no such folder"),
        ([*train, "--model", root / "model", "--labls", "x"], "did you mean --labels?"),
        ([*train, "--model", root / "model", "--set", "polcy=all"], "did you mean policy?"),
        ([*train, "--model", root / "model", "--set", "flip=true"], "is another thing in a mirror"),
        (["sample", "--model", root / "model", "--prompt"], "nothing to draw"),
        (["sample", "--model", root / "model", "--prompt", "a bag", "--set", "policy=nmae"], "policy cannot be used"),
        (["bake", "--model", root / "model", "--adapter", root / "data"], "no prompts were given"),
    ):
        assert run("erase", *arguments) == 2
        said = capsys.readouterr().err
        assert says in said
    assert not (tmp_path / "out").exists()
