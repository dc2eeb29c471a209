# SPDX-License-Identifier: Apache-2.0
"""File names that come out of a file lead nowhere but into its folder, and no file keeps anybody waiting."""

import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from anabranch.data.folders import list_folder
from anabranch.errors import AnabranchError
from tests.trust.loaders import sign

UP = ["../x", "../../x", "a/../../x", "./../x", "a/b/../../../x", "..", "../", "x/..", "../../../../../../etc/passwd"]
ABSOLUTE = ["/etc/passwd", "//server/x", "/", "/proc/self/environ", "/dev/zero", "file:///etc/passwd"]
WINDOWS = [
    "C:\\x", "C:x", "c:/x", "\\\\server\\share\\x", "..\\x", "a\\..\\..\\x", "\\x", "x:stream", "CON", "con.json",
    "PRN", "AUX.safetensors", "NUL", "COM1", "LPT9.bin", "x.", "x ", "x*", "x?", "<x>", 'x"y', "x|y",
]  # fmt: skip
ODD = ["", ".", "x\x00y", "\x00", "x\n", "\x1b[31mx", "x\u202ey", "a//b", "a/", "a" * 256, "a" * 5000, "a/" * 600 + "x"]
NAMES = UP + ABSOLUTE + WINDOWS + ODD
SECONDS = 20


@contextmanager
def opened_outside(folder):
    """Files that Python opens inside the surroundings of the folder, but not in it, or that belong to the system."""
    seen, active = [], [True]
    around = folder.resolve().parent.parent.parent

    def watch(event, arguments):
        if not active[0] or event != "open" or not isinstance(arguments[0], str | bytes):
            return
        path = Path(os.path.realpath(os.fsdecode(arguments[0])))
        stranger = path.is_relative_to(around) and not path.is_relative_to(folder.resolve())
        if stranger or str(path) in ("/etc/passwd", "/dev/zero") or str(path).endswith("/environ"):
            seen.append(str(path))

    sys.addaudithook(watch)
    try:
        yield seen
    finally:
        active[0] = False  # a hook stays for good


@contextmanager
def time_limit():
    def ring(number, frame):
        raise TimeoutError("it waits for ever")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def in_manifest(folder, name):
    file = folder / "checkpoints" / "step-000001" / "manifest.json"
    document = json.loads(file.read_text())
    document["files"] = {name: document["files"]["state.json"], **document["files"]}
    file.write_text(json.dumps(document))


def in_lines(file, key):
    def put(folder, name):
        first, *others = (folder / file).read_text().splitlines()
        (folder / file).write_text("\n".join([json.dumps(json.loads(first) | {key: name}), *others]) + "\n")

    return put


def in_a_line_more(file, key):
    """Beside the rows that are right, so that nothing but the name can be wrong."""

    def put(folder, name):
        first = (folder / file).read_text().splitlines()[0]
        with (folder / file).open("a") as lines:
            lines.write(json.dumps(json.loads(first) | {key: name}) + "\n")

    return put


def in_index(weights):
    """A sharded checkpoint of the libraries: which file holds which tensor."""

    def put(folder, name):
        from safetensors import safe_open

        with safe_open(folder / weights, "pt") as file:
            index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(file.keys(), name)}
        for place in (folder.parent, folder.parent.parent):
            shutil.copy(folder / weights, place / "x")
        (folder / weights).unlink()
        (folder / f"{weights}.index.json").write_text(json.dumps(index))

    return put


def in_steps(folder, name):
    """Whole experts lie where the names lead."""
    manifest = json.loads((folder / "mote.json").read_text())
    for place in (folder.parent, folder.parent.parent, folder):
        shutil.copytree(folder / manifest["adapters"][0], place / "x", dirs_exist_ok=True)
    manifest["adapters"][0] = manifest["steps"]["names"][0] = name
    (folder / "mote.json").write_text(json.dumps(manifest))


PLACES = {
    "checkpoint": [in_manifest],
    "labels": [in_lines("labels.jsonl", "file")],
    "captions": [in_a_line_more("metadata.jsonl", "file_name")],
    "vit": [in_index("model.safetensors")],
    "language": [in_index("model.safetensors")],
    "classifier": [in_index("model.safetensors")],
    "pipeline": [in_index("transformer/diffusion_pytorch_model.safetensors")],
    "steps": [in_steps],
}


def escapes(loader, put, names, folder):
    """Which names were followed, and what came out that is no AnabranchError."""
    followed, raw = [], []
    for name in names:
        shutil.rmtree(folder, ignore_errors=True)
        inside = folder / "deep" / "inside"
        shutil.copytree(loader.folder, inside)
        put(inside, name)
        with opened_outside(inside) as seen, time_limit():
            try:
                loader.open(inside)
                opened = loader.name != "captions"  # a caption of no image is passed over, and opens nothing
            except AnabranchError:
                opened = False
            except Exception as error:
                raw.append(f"{loader.name}, {name[:40]!r}: {type(error).__name__} {error}"[:200])
                opened = False
        if seen or opened:
            followed.append(f"{loader.name}, {name[:40]!r}: {seen[:1] or 'opened'}")
    return followed, raw


def joined_outside(folder):
    """The control: where a name leads that is just put behind the folder."""
    outside = 0
    for name in NAMES:
        try:
            outside += not (folder / name).resolve().is_relative_to(folder.resolve())
        except (OSError, ValueError):
            outside += 1  # an error of another kind than the caller expects
    return outside


def count_names(loaders, slow_share, tmp_path, counted):
    attempts, followed, raw = 0, [], []
    for number, (name, puts) in enumerate(PLACES.items()):
        loader = loaders[name]
        names = NAMES[number % slow_share :: slow_share] if loader.slow else NAMES
        for put in puts:
            more, unexpected = escapes(loader, put, names, tmp_path / "around")
            attempts, followed, raw = attempts + len(names), followed + more, raw + unexpected
    assert raw == []
    assert followed == []
    counted(attempts, control=(joined_outside(tmp_path), f"of {len(NAMES)} names lead out if just put behind a folder"))


def test_experts_under_a_harmless_name_open_so_that_the_name_alone_is_refused(loaders, tmp_path):
    inside = tmp_path / "deep" / "inside"
    shutil.copytree(loaders["steps"].folder, inside)
    in_steps(inside, "x")
    loaders["steps"].open(inside)


@pytest.mark.row("S2", sample=True)
def test_some_hostile_names_lead_nowhere(loaders, tmp_path, counted):
    count_names(loaders, 12, tmp_path, counted)


@pytest.mark.slow
@pytest.mark.row("S2", cheap=True)
def test_hostile_names_lead_nowhere(loaders, tmp_path, counted):
    count_names(loaders, 1, tmp_path, counted)


def hostile_files(folder):
    """Files of names that images have, which are none."""
    outside = folder.parent / "outside"
    outside.mkdir()
    Image.new("RGB", (8, 8)).save(outside / "secret.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "far.png").symlink_to("/etc/passwd")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "self.png").symlink_to("self.png")
    (folder / "gone.png").symlink_to("gone")
    (folder / "folder.png").mkdir()
    (folder / "deep").symlink_to(outside)
    (folder / "loop").symlink_to(".")
    return ["pipe.png", "link.png", "far.png", "zero.png", "self.png", "gone.png", "folder.png"]


@pytest.mark.row("S2")
def test_pipes_devices_and_links_are_listed_and_never_opened(loaders, tmp_path, counted):
    inside = tmp_path / "deep" / "inside"
    inside.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(inside / "good.png")
    names = hostile_files(inside)
    with opened_outside(inside) as seen, time_limit():
        listing = list_folder(inside)
    assert listing.files == ("good.png",)
    assert {bad.path for bad in listing.refused} == {*names, "deep", "loop"} - {"folder.png"}
    counted(len(names) + 2, len(seen))


@pytest.mark.row("S2")
@pytest.mark.parametrize("loader", ["labels", "checkpoint", "captions", "masks"])
def test_a_pipe_or_a_link_in_the_place_of_a_file_is_refused(loaders, tmp_path, loader, counted):
    one, refused, tried = loaders[loader], 0, 0
    files = {"labels": ("0.png",)}.get(loader, one.files)
    secret = tmp_path / "deep" / "secret"
    for file in files:
        for make in (os.mkfifo, lambda path: path.symlink_to(secret)):
            inside = tmp_path / "deep" / "inside"
            shutil.rmtree(tmp_path / "deep", ignore_errors=True)
            shutil.copytree(one.folder, inside)
            shutil.copy(inside / file, secret)
            (inside / file).unlink()
            make(inside / file)
            sign_if_possible(inside)
            tried += 1
            with opened_outside(inside) as seen, time_limit():
                try:
                    one.open(inside)
                except AnabranchError:
                    refused += not seen
    counted(tried, tried - refused)


def sign_if_possible(folder):
    if all(path.is_file() and not path.is_symlink() for path in folder.rglob("*") if not path.is_dir()):
        sign(folder)
