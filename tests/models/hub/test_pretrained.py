# SPDX-License-Identifier: Apache-2.0
"""Ways in and out of a hub, without one: its cache, a server on this machine, and what may not come in."""

import base64
import errno
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from huggingface_hub import HfApi, constants

from anabranch.errors import AnabranchError, UsageError
from anabranch.measure.experts.statistics import ExpertStats
from anabranch.models.hub.pretrained import PORTABLE, RUNS_CODE, Pretrained
from anabranch.models.mixtures.adapter import ExpertAdapter, difference
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import mixture_layers
from anabranch.reuse.steer.recipe import Recipe, Step

RECIPE = Recipe(steps=(Step(kind="scale", experts=(("model.layers.0.mlp", 3),), amount=0.5),), made_by="hand")


def statistics():
    stats = ExpertStats(("law", "code"), ("model.layers.0.mlp",), 4, 2, num_folds=2, model="abc")
    stats.sums["count"] = torch.arange(16.0).double().view(2, 2, 1, 4)
    return stats


def adapter():
    base, tuned = tiny("Qwen2-MoE"), tiny("Qwen2-MoE")
    with torch.no_grad():
        mixture_layers(tuned)[0].experts.down_proj[2] += 1
    return difference(base, tuned)


def test_a_recipe_statistics_and_tuned_experts_come_back_as_they_went(tmp_path):
    RECIPE.save_pretrained(tmp_path / "recipe")
    assert Recipe.from_pretrained(tmp_path / "recipe") == RECIPE
    stats = statistics()
    stats.save_pretrained(tmp_path / "stats")
    back = ExpertStats.from_pretrained(str(tmp_path / "stats"))
    assert back.header() == stats.header()
    assert torch.equal(back["count"], stats["count"])
    tuned = adapter()
    tuned.save_pretrained(tmp_path / "tuned")
    back = ExpertAdapter.from_pretrained(tmp_path / "tuned")
    assert back.experts == tuned.experts
    assert all(torch.equal(back.tensors[name], value) for name, value in tuned.tensors.items())


def test_saving_spares_what_is_there_and_replaces_its_own(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.md").write_text("mine")
    with pytest.raises(UsageError, match="holds something else"):
        RECIPE.save_pretrained(tmp_path / "notes")
    with pytest.raises(UsageError, match="is a file"):
        RECIPE.save_pretrained(tmp_path / "notes" / "diary.md")
    assert (tmp_path / "notes" / "diary.md").read_text() == "mine"
    RECIPE.save_pretrained(tmp_path / "recipe")
    RECIPE.save_pretrained(tmp_path / "recipe", card="another card")
    assert (tmp_path / "recipe" / "README.md").read_text() == "another card"


def test_a_full_disk_in_mid_save_costs_nothing(tmp_path, monkeypatch):
    old, new = adapter(), adapter()
    new.tensors.update({name: value + 1 for name, value in new.tensors.items()})
    old.save_pretrained(tmp_path / "tuned", card="old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "tuned").iterdir()}

    def full(self, *arguments, **options):  # the weights are written, their manifest is not
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(AnabranchError, match=r"could not write(.|\n)*make room"):
            new.save_pretrained(tmp_path / "tuned", card="new")
    assert {path.name: path.read_bytes() for path in (tmp_path / "tuned").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]
    new.save_pretrained(tmp_path / "tuned")
    found = ExpertAdapter.from_pretrained(tmp_path / "tuned").tensors
    assert all(torch.equal(found[name], value) for name, value in new.tensors.items())


def dying_at(call, save):
    """Run `save` in a child that ends, as a killed one does, instead of its call-th call that changes files."""
    child = os.fork()
    if child == 0:
        try:
            left = iter(range(call))
            for name in ("mkdir", "rename", "link", "fsync", "unlink", "rmdir"):
                real = getattr(os, name)
                wrapped = lambda *a, real=real, **o: real(*a, **o) if next(left, None) is not None else os._exit(9)  # noqa: E731
                setattr(os, name, wrapped)
            save()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_dying_anywhere_in_a_save_leaves_the_old_one_or_the_new_one(tmp_path):
    other = Recipe(steps=(Step(kind="empty", experts=(("model.layers.0.mlp", 1),)),), made_by="hand")
    code, call, found = 9, 0, []
    while code == 9:
        folder = tmp_path / str(call) / "recipe"
        RECIPE.save_pretrained(folder)
        (folder / "LICENSE").write_text("mine")
        code = dying_at(call, lambda folder=folder: other.save_pretrained(folder))
        found.append(Recipe.from_pretrained(folder))
        assert (folder / "LICENSE").read_text() == "mine"
        call += 1
    assert code == 0
    assert all(recipe in (RECIPE, other) for recipe in found)
    assert found == sorted(found, key=lambda recipe: recipe == other), "from some call on it is the new one"
    assert (found[0], found[-1]) == (RECIPE, other)


def test_what_else_is_in_the_folder_stays_and_what_is_no_folder_of_its_own_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "clone"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")
    RECIPE.save_pretrained(folder)
    (folder / "LICENSE").write_text("mine")
    (folder / "latest").symlink_to("steer.json")
    (tmp_path / "link").symlink_to(folder)
    RECIPE.save_pretrained(tmp_path / "link", card="again")
    assert {path.name for path in folder.iterdir()} == {".git", "LICENSE", "latest", "steer.json", "README.md"}
    assert (folder / ".git" / "HEAD").read_text() == "ref: refs/heads/main"
    assert (folder / "README.md").read_text() == "again"
    assert (tmp_path / "link").is_symlink()
    assert (folder / "latest").is_symlink()
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match="the folder that this process is in"):
        RECIPE.save_pretrained(".")


# in: nothing is downloaded unless asked, nothing strange is opened


def cached(root, recipe, name="models--owner--steering"):
    """As huggingface_hub lays a repository out: links into a store."""
    repository, revision = root / name, "a" * 40
    snapshot = repository / "snapshots" / revision
    recipe.save_pretrained(root / "made")
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for file in (root / "made").iterdir():
        os.rename(file, repository / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    return snapshot


def test_a_name_of_a_hub_is_found_in_its_cache_and_not_downloaded(tmp_path):
    snapshot = cached(tmp_path, RECIPE)
    assert Recipe.from_pretrained("owner/steering", cache_dir=tmp_path) == RECIPE
    assert Recipe.from_pretrained(snapshot) == RECIPE
    with pytest.raises(UsageError, match=r"neither a folder here nor in the hub's cache(.|\n)*local_files_only=False"):
        Recipe.from_pretrained("owner/unheard-of", cache_dir=tmp_path)
    with pytest.raises(AnabranchError, match="HF_HUB_OFFLINE"):
        Recipe.from_pretrained("owner/unheard-of", cache_dir=tmp_path, local_files_only=False)
    with pytest.raises(UsageError, match="there is no folder"):
        Recipe.from_pretrained(tmp_path / "no" / "such" / "folder")


def test_a_link_out_of_the_folder_is_refused_in_a_cache_as_well(tmp_path):
    RECIPE.save_pretrained(tmp_path / "recipe")
    outside = tmp_path / "secret.json"
    os.rename(tmp_path / "recipe" / "steer.json", outside)
    (tmp_path / "recipe" / "steer.json").symlink_to(outside)
    with pytest.raises(UsageError, match=r"holds a link: steer\.json"):
        Recipe.from_pretrained(tmp_path / "recipe")
    snapshot = cached(tmp_path / "cache", RECIPE)
    (snapshot / "steer.json").unlink()
    (snapshot / "steer.json").symlink_to(outside)
    with pytest.raises(UsageError, match=r"holds a link: steer\.json"):
        Recipe.from_pretrained("owner/steering", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "extra/weights.PT", "modeling_steer.py", "state.pkl"])
def test_what_runs_code_when_it_is_opened_is_refused(tmp_path, name):
    RECIPE.save_pretrained(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match="may run code"):
        Recipe.from_pretrained(tmp_path)
    assert not any(pattern.removeprefix("*") in RUNS_CODE for pattern in PORTABLE)


def test_a_pipe_and_another_kind_of_folder_are_refused(tmp_path):
    RECIPE.save_pretrained(tmp_path / "recipe")
    with pytest.raises(UsageError, match=r"no ExpertStats(.|\n)*statistics.safetensors"):
        ExpertStats.from_pretrained(tmp_path / "recipe")
    os.mkfifo(tmp_path / "recipe" / "pipe.json")  # whoever opens it waits for ever
    with pytest.raises(UsageError, match=r"no file: pipe\.json"):
        Recipe.from_pretrained(tmp_path / "recipe")


# out: a server on this machine that speaks as much of the hub's language as a push needs


class Hub(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, status, told):
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        server = self.server
        server.asked.append((self.path, self.headers.get("Authorization")))
        if self.headers.get("Authorization") != "Bearer good":
            self.answer(403, {"error": "this token may not write"})
        elif self.path == "/api/repos/create":
            server.made = json.loads(body)
            self.answer(200, {"url": f"{server.url}/owner/steering", "id": "1", "name": "owner/steering"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path.endswith("/commit/main"):
            server.commit = [json.loads(line) for line in body.splitlines()]
            url = f"{server.url}/owner/steering/commit/{'c' * 40}"
            self.answer(200, {"commitOid": "c" * 40, "commitUrl": url, "hookOutput": "", "success": True})
        else:
            self.answer(404, {"error": self.path})

    def do_GET(self):
        stored, _, name = self.path.partition("/resolve/")
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        if self.path.startswith("/api/models/owner/steering/tree/"):
            files = [(name, len(content)) for name, content in self.server.files.items()]
            self.answer(200, [{"type": "file", "path": name, "size": size, "oid": name} for name, size in files])
        elif self.path.startswith("/api/models/owner/steering"):
            names = [{"rfilename": name} for name in self.server.files]
            self.answer(200, {"id": "owner/steering", "sha": "a" * 40, "siblings": names})
        elif stored == "/owner/steering" and (content := self.server.files.get(name.partition("/")[2])) is not None:
            self.send_response(200)
            for header, value in (
                ("ETag", f'"{hash(content)}"'),
                ("X-Repo-Commit", "a" * 40),
                ("Content-Length", len(content)),
            ):
                self.send_header(header, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)
        else:
            self.answer(404, {"error": self.path})

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.asked, server.made, server.commit = f"http://127.0.0.1:{server.server_port}", [], None, None
    server.files = {}
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # this hub is a thread of ours
    yield server
    server.shutdown()
    server.server_close()


def test_a_push_makes_the_repository_and_uploads_what_is_saved(hub, tmp_path):
    address = RECIPE.push_to_hub("owner/steering", private=True, api=HfApi(endpoint=hub.url, token="good"))
    assert address.endswith("c" * 40)
    assert hub.made == {"name": "steering", "organization": "owner", "visibility": "private", "type": "model"}
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in hub.commit
        if line["key"] == "file"
    }
    assert set(sent) == {"steer.json", "README.md"}
    (tmp_path / "steer.json").write_bytes(sent["steer.json"])
    assert Recipe.from_pretrained(tmp_path) == RECIPE


def test_a_hub_that_says_no_is_said_and_nothing_was_committed(hub):
    with pytest.raises(AnabranchError, match=r"was not pushed(.|\n)*hf auth login"):
        RECIPE.push_to_hub("owner/steering", api=HfApi(endpoint=hub.url, token="bad"))
    assert hub.commit is None


def test_what_can_not_be_pushed_is_refused_before_anything_is_sent():
    with pytest.raises(UsageError, match="no name of a repository"):
        RECIPE.push_to_hub("owner/with/too/much")
    assert constants.HF_HUB_OFFLINE, "tests run offline"
    with pytest.raises(UsageError, match="offline"):
        RECIPE.push_to_hub("owner/steering")


# in, through the same server


def test_what_is_asked_for_is_downloaded_and_of_it_only_what_is_read(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    RECIPE.save_pretrained(tmp_path / "made")
    hub.files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    hub.files |= {"pytorch_model.bin": b"evil", "modeling_steer.py": b"evil"}
    with pytest.raises(UsageError, match="has to be asked for"):
        Recipe.from_pretrained("owner/steering", cache_dir=tmp_path)
    assert not hub.asked, "nothing is asked of a hub unless it is said"
    assert Recipe.from_pretrained("owner/steering", cache_dir=tmp_path, local_files_only=False) == RECIPE
    assert not [path for path, _ in hub.asked if "evil" in path or path.endswith((".bin", ".py"))]
    asked = len(hub.asked)
    assert Recipe.from_pretrained("owner/steering", cache_dir=tmp_path) == RECIPE
    assert len(hub.asked) == asked, "from here on it is in the cache"
    with pytest.raises(AnabranchError, match="could not be downloaded"):
        Recipe.from_pretrained("owner/unheard-of", cache_dir=tmp_path, local_files_only=False)


class InFolders(Pretrained):
    """A kind with its weights in a subfolder."""

    MARK = "kind.json"

    def __init__(self, parts):
        self.parts = parts

    def write_files(self, folder):
        (folder / "kind.json").write_text("{}")
        (folder / "shared").mkdir()
        for name in self.parts:
            (folder / "shared" / name).write_text(name)

    def card(self):
        return "card"


def test_of_a_subfolder_that_is_written_again_notes_stay_and_weights_do_not(tmp_path):
    folder = tmp_path / "kind"
    InFolders(["1.safetensors", "2.safetensors"]).save_pretrained(folder)
    (folder / "shared" / "NOTES.md").write_text("mine")
    (folder / "shared" / "pictures").mkdir()
    (folder / "shared" / "pictures" / "a.png").write_text("mine")
    folder.chmod(0o700)
    InFolders(["1.safetensors"]).save_pretrained(folder)
    kept = {path.relative_to(folder / "shared").as_posix() for path in (folder / "shared").rglob("*")}
    assert kept == {"1.safetensors", "NOTES.md", "pictures", "pictures/a.png"}
    assert folder.stat().st_mode & 0o777 == 0o700, "who may open it has not changed"


def test_a_folder_whose_parent_cannot_be_written_is_refused_in_words(tmp_path, monkeypatch):
    RECIPE.save_pretrained(tmp_path / "recipe")
    before = (tmp_path / "recipe" / "steer.json").read_bytes()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UsageError, match="which is not to be written"):
        RECIPE.save_pretrained(tmp_path / "recipe")
    assert (tmp_path / "recipe" / "steer.json").read_bytes() == before
