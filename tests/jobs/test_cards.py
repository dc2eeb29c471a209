# SPDX-License-Identifier: Apache-2.0
"""Every folder that a command hands over has a README whose head hubs can read, and which says what it must."""

import ast
import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from anabranch import cli
from anabranch.errors import UsageError
from anabranch.jobs.experts.text_mixture import save_mixture, untrained_mixture
from anabranch.jobs.transfer.run_model import RunModel
from anabranch.measure.experts.statistics import ExpertStats
from anabranch.mixture.context import Context, route
from anabranch.models import vit_mae
from anabranch.models.hub.card import RELATIONS, base_name, front_matter
from anabranch.models.language.folder import open_language_model
from anabranch.models.mixtures.adapter import ExpertAdapter, merge
from anabranch.reuse.steer.recipe import Recipe
from anabranch.specialize.mote.folder import load
from anabranch.specialize.mote.mote import MoTE
from anabranch.suppress.geom_erasing.adapter_folder import Adapter
from tests.jobs.align.test_commands import FAST, chains_file, model_folder
from tests.jobs.erase.world import baked
from tests.jobs.experts.test_commands import SMALL as MIXTURE
from tests.jobs.transfer.test_pipeline import SMALL

LIBRARIES = {"transformers", "diffusers", "peft", "anabranch"}
TASKS = {"text-generation", "text-to-image", "image-feature-extraction"}


def run(*words):
    assert cli.main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts-cards")
    save_mixture(untrained_mixture(0, **MIXTURE), root / "model", torch.float32)
    (root / "model" / "README.md").write_text("---\nlicense: mit\n---\n# A mixture\n")
    (root / "ab.txt").write_text("".join(f"aab{i} ab ba. " for i in range(300)))
    asked = ["--model", root / "model", "--data", f"ab={root / 'ab.txt'}"]
    few, stats = ["--set", "length=32", "--set", "limit=40"], ["--stats", root / "stats.safetensors", "--target", "ab"]
    run("experts", "profile", *asked, "--length", "32", "--limit", "40", "--out", stats[1], "--outputs")
    run("experts", "tune", *asked, *few, *stats, "--p", "0.3", "--steps", "8", "--learning-rate", "1e-3", "--out",
        root / "tuned", "--merged", root / "whole")  # fmt: skip
    run("experts", "prune", *asked, *few, *stats, "--keep", "6", "--out", root / "pruned")
    run("experts", "merge", *asked, *few, "--keep", "4", "--out", root / "merged")
    by_hand = ["--by", "manual", "--experts", "0.1", "--kind", "scale", "--amount", "2"]
    run("experts", "steer", "--stats", stats[1], *by_hand, "--out", root / "steer.json")
    run("experts", "generate", "--model", root / "model", "--steer", root / "steer.json", "--export", root / "steered")
    Recipe.load(root / "steer.json").save_pretrained(root / "recipe")
    ExpertStats.load(stats[1]).save_pretrained(root / "stats")
    return root


@pytest.fixture(scope="module")
def align(tmp_path_factory):
    root = tmp_path_factory.mktemp("align-cards")
    model_folder(root / "model")
    run("align", "train", "--model", root / "model", "--chains", chains_file(root / "chains.jsonl"), "--out",
        root / "mote", *FAST)  # fmt: skip
    run("align", "export", "--model", root / "model", "--experts", root / "mote", "--out", root / "fused")
    return root


@pytest.fixture(scope="module")
def erase(tmp_path_factory):
    return baked(tmp_path_factory.mktemp("erase-cards"))


@pytest.fixture(scope="module")
def images(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("image-cards")
    run("pretrain", "--images", folders / "pool", "--out", root / "run", *SMALL)
    run("customize", "--run", root / "run", "--task", folders / "task", "--out", root / "task")
    RunModel.from_pretrained(root / "run").save_pretrained(root / "shared")
    return root


FOLDERS = {
    ("images", "task"): ("transformers", None),
    ("images", "shared"): ("anabranch", None),
    ("erase", "adapter"): ("diffusers", "adapter"),
    ("erase", "baked"): ("diffusers", "adapter"),
    ("align", "mote"): ("peft", "adapter"),
    ("align", "fused"): ("peft", "adapter"),
    ("experts", "tuned"): ("anabranch", "adapter"),
    ("experts", "whole"): ("transformers", "finetune"),
    ("experts", "pruned"): ("transformers", "finetune"),
    ("experts", "merged"): ("transformers", "finetune"),
    ("experts", "steered"): ("transformers", "finetune"),
    ("experts", "recipe"): ("anabranch", None),
    ("experts", "stats"): ("anabranch", None),
}
"""Job and folder: the library that opens it, and how it comes from its base."""


@pytest.mark.parametrize("job", ["images", "erase", "align", "experts"])
def test_hubs_can_read_what_is_handed_over(job, request):
    root = request.getfixturevalue(job)
    for (own, folder), (library, relation) in FOLDERS.items():
        if own != job:
            continue
        text = (root / folder / "README.md").read_text()
        card = ModelCard(text)  # raises where the head is no YAML
        data = card.data.to_dict()
        assert data["library_name"] == library in LIBRARIES, folder
        assert "anabranch" in data["tags"]
        assert all(isinstance(tag, str) and tag == tag.strip() for tag in data["tags"])
        assert data.get("base_model_relation") == relation
        assert ("base_model" in data) == (relation is not None)
        if relation:
            assert relation in RELATIONS
            validate_repo_id(data["base_model"])
        assert data.get("pipeline_tag") in {None, *TASKS}
        assert data.get("license") == ("mit" if job == "experts" and relation else None), "a licence that is not known"
        assert str(root) not in text, "a place on somebody's machine"
        assert card.text.strip().startswith("# ")
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            ast.parse(code)


def test_they_say_what_was_asked_what_it_costs_and_what_was_touched(experts, align, erase, images):
    tuned, pruned = ((experts / name / "README.md").read_text() for name in ("tuned", "pruned"))
    told = json.loads((experts / "tuned" / "experts.json").read_text())
    assert f"{len(told['touched'])} tensors changed" in tuned
    assert f"{told['left_alone']} are as before" in tuned
    assert "| learning_rate | 0.001 |" in tuned
    assert "random, mean of 3" in pruned, "the control"
    assert "random groups, mean of 3" in (experts / "merged" / "README.md").read_text()
    steered = (experts / "steered" / "README.md").read_text()
    assert "1 tensors changed: `model.layers.0.mlp.experts.down_proj`" in steered
    assert "own tensors are as before, bit for bit" in (align / "mote" / "README.md").read_text().replace("\n", " ")
    for name in ("adapter", "baked"):
        found = json.loads((erase / name / "geom_config.json").read_text())["touched"]
        assert found["new"] > 0 == found["changed"]
        assert f"{found['as_before']} of them as before" in (erase / name / "README.md").read_text()
    assert "its features are those of the routed model" in (images / "task" / "README.md").read_text()
    for folder in (align / "mote", erase / "adapter", images / "shared", images / "task"):
        said = (folder / "README.md").read_text()
        assert "not measured" in said or "What the answers are worth is not in here" in said


# what was handed over comes back by the same three words, wherever it is


def test_the_adapter_of_a_command_can_be_merged(experts):
    """The folder says what the command says of it, and is still an adapter."""
    model, _ = open_language_model(experts / "model")
    whole, _ = open_language_model(experts / "whole")
    merge(model, ExpertAdapter.from_pretrained(experts / "tuned"))
    after = whole.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_step_experts_come_back_from_where_they_were_saved_again(align, tmp_path):
    base, _ = open_language_model(align / "model")
    first = load(base, align / "mote")
    ids, steps = torch.tensor([[39, 5, 6, 7]]), torch.tensor([[0, 0, 1, 2]])
    expected = first(ids, steps).logits
    first.save_pretrained(tmp_path / "again")
    base, _ = open_language_model(align / "model")
    again = MoTE.from_pretrained(tmp_path / "again", base=base)
    assert torch.equal(again(ids, steps).logits, expected)
    assert again.facts["rows"] == 12, "what its maker knew of it goes along"
    assert "12 chains" in (tmp_path / "again" / "README.md").read_text()
    names = {path.name for path in (tmp_path / "again").iterdir()}
    manifest = json.loads((tmp_path / "again" / "mote.json").read_text())
    manifest["adapters"].append("fourth")
    (tmp_path / "again" / "mote.json").write_text(json.dumps(manifest))
    (tmp_path / "again" / "fourth").mkdir()
    (tmp_path / "again" / "chat_template.jinja").write_text("of another tokenizer")
    first.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == names, "nothing of an earlier one is left"


def test_step_experts_that_lead_out_of_their_folder_are_refused(align, tmp_path):
    shutil.copytree(align / "mote", tmp_path / "mote", ignore=shutil.ignore_patterns("training", ".lock"))
    manifest = json.loads((tmp_path / "mote" / "mote.json").read_text())
    base, _ = open_language_model(align / "model")
    for name in ("../../secret", "/etc", "analysis/../..", ".."):
        manifest["steps"]["names"][0] = name
        (tmp_path / "mote" / "mote.json").write_text(json.dumps(manifest))
        with pytest.raises(UsageError, match="names an expert"):
            MoTE.from_pretrained(tmp_path / "mote", base=base)


def test_an_eraser_is_copied_without_its_training(erase, tmp_path):
    Adapter.from_pretrained(erase / "adapter").save_pretrained(tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {"geom_config.json", "geom_tokens.safetensors", "negative.safetensors", "README.md",
                     "pytorch_lora_weights.safetensors"}  # fmt: skip
    again = Adapter.from_pretrained(tmp_path / "copy")
    assert again.config == Adapter.from_pretrained(erase / "adapter").config
    assert (tmp_path / "copy" / "README.md").read_text() == (erase / "adapter" / "README.md").read_text()
    (tmp_path / "copy" / "denoiser").mkdir()  # of an earlier one, that was trained whole
    Adapter.from_pretrained(erase / "adapter").save_pretrained(tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == names
    (tmp_path / "copy" / "checkpoints").mkdir()
    again.save_pretrained(tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {*names, "checkpoints"}
    assert Adapter.from_pretrained(tmp_path / "copy").config == again.config


@torch.no_grad()
def test_experts_of_clusters_are_shared_without_saying_where_an_image_fell(images, folders, tmp_path):
    whole, shared = (RunModel.from_pretrained(images / name) for name in ("run", "shared"))
    pixels = torch.rand(2, 3, 32, 32)
    with route(whole.model, Context(ids={"cluster": torch.tensor([0, 3])})):
        expected = vit_mae.encode(whole.model, pixels)
    with route(shared.model, Context(ids={"cluster": torch.tensor([0, 3])})):
        assert torch.equal(vit_mae.encode(shared.model, pixels), expected)
    assert len(whole.clusters.labels) == 120
    assert len(shared.clusters.labels) == 0
    run("customize", "--run", images / "shared", "--task", folders / "task", "--out", tmp_path / "task")
    one, other = ((place / "model.safetensors").read_bytes() for place in (images / "task", tmp_path / "task"))
    assert one == other
    (images / "shared" / "model" / "old.safetensors").write_bytes(b"of an earlier model")
    whole.save_pretrained(images / "shared")
    assert not (images / "shared" / "model" / "old.safetensors").exists()
    with pytest.raises(UsageError, match="the run itself"):
        whole.save_pretrained(images / "run")


# the head


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("hub/models--allenai--OLMoE-1B-7B/snapshots/abc", "allenai/OLMoE-1B-7B"),
        ("models/my model", "my-model"),
        ("olmoe", "olmoe"),
    ],
)
def test_a_base_is_called_as_a_hub_calls_it_where_that_is_known(tmp_path, path, name):
    assert base_name(tmp_path / path) == name


def test_a_base_may_say_its_own_name_and_words_of_yaml_are_quoted(tmp_path):
    (tmp_path / "config.json").write_text('{"_name_or_path": "owner/model"}')
    assert base_name(tmp_path) == "owner/model"
    (tmp_path / "README.md").write_text("---\nlicense: 'no: such'\n---\n")
    head = front_matter(library_name="peft", tags=["a: b", "a: b", "yes"], base=tmp_path, relation="adapter")
    data = ModelCard(f"{head}# Text\n").data.to_dict()
    assert data["tags"] == ["anabranch", "a: b", "yes"]
    assert data["license"] == "no: such"
