# SPDX-License-Identifier: Apache-2.0
import fcntl
import json
import os

import pytest

from anabranch.errors import AnabranchError, UsageError
from anabranch.swap import clean_leftovers
from anabranch.train.publish import is_safe_name, publish_folder, read_json, verify_folder

UNSAFE_NAMES = [
    "",
    ".",
    "..",
    "../outside",
    "a/../../outside",
    "a/..",
    "./a",
    "a//b",
    "/etc/passwd",
    "a/",
    "..\\outside",
    "a\\b",
    "C:/outside",
    "C:outside",
    "\\\\server\\share",
    "//server/share",
    "a\0b",
    "a\nb",
    "a\tb",
    "a\u202egnp.exe",
    "\ud800",
    "CON",
    "con.txt",
    "a/NUL",
    "aux.json",
    "COM1",
    "lpt9.safetensors",
    "name.",
    "name ",
    "a*",
    "a?",
    'a"b',
    "a<b",
    "a|b",
    "stream:ads",
    "x" * 256,
    "é" * 200,
    "/".join(["deep"] * 300),
]


def write_text(text):
    return lambda folder: (folder / "a.txt").write_text(text)


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_a_name_that_leaves_the_folder_somewhere_is_unsafe(name):
    assert not is_safe_name(name)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "a/b/c.json", "chien d'été.txt"]
)
def test_ordinary_names_are_safe(name):
    assert is_safe_name(name)


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_a_manifest_with_an_unsafe_name_opens_no_file(tmp_path, name):
    publish_folder(write_text("inside"), tmp_path / "good")
    manifest = tmp_path / "good" / "manifest.json"
    entries = {name: {"bytes": 0, "sha256": "0"}}
    manifest.write_text(json.dumps({"format": 1, "files": entries}))
    with pytest.raises(AnabranchError, match=r"manifest.json: unsafe file name"):
        verify_folder(tmp_path / "good")


def test_replacing_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path):
    target = publish_folder(write_text("old"), tmp_path / "out")

    def write(folder):
        (folder / "a.txt").write_text("new")
        assert (target / "a.txt").read_text() == "old"

    publish_folder(write, target)
    assert (target / "a.txt").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
def test_a_failing_writer_leaves_everything_as_it_was(tmp_path, error):
    target = publish_folder(write_text("old"), tmp_path / "out")

    def fail(folder):
        (folder / "a.txt").write_text("half")
        raise error

    with pytest.raises(type(error)):
        publish_folder(fail, target)
    assert (target / "a.txt").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_other_peoples_files_is_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("irreplaceable")
    with pytest.raises(UsageError, match=r"holds files that would be lost(.|\n)*received: holiday.jpg"):
        publish_folder(write_text("new"), tmp_path / "photos")
    target = publish_folder(write_text("old"), tmp_path / "out")
    (target / "notes.md").write_text("mine")
    with pytest.raises(UsageError, match=r"received: notes.md"):
        publish_folder(write_text("new"), target)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="expected: a folder or a free name"):
        publish_folder(write_text("new"), tmp_path / "file")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(UsageError, match="expected: a folder or a free name"):
        publish_folder(write_text("new"), tmp_path / "link")
    assert (tmp_path / "photos" / "holiday.jpg").read_text() == "irreplaceable"


def test_an_empty_folder_and_an_earlier_result_are_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    publish_folder(write_text("new"), tmp_path / "empty")
    publish_folder(write_text("newer"), tmp_path / "empty")
    assert verify_folder(tmp_path / "empty") == {"a.txt": 5}


def test_a_writer_that_makes_unportable_files_is_refused(tmp_path):
    with pytest.raises(AnabranchError, match="cannot publish a file named 'a:b'"):
        publish_folder(lambda folder: (folder / "a:b").write_text("x"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    for name in (".out.new-00000001", ".out.gone-00000002", ".out.new-00000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("half")
    (tmp_path / ".out.new-nothex").mkdir()  # not ours
    living = os.open(tmp_path / ".out.new-00000003", os.O_RDONLY)
    fcntl.flock(living, fcntl.LOCK_EX)
    try:
        assert clean_leftovers(tmp_path) == [".out.gone-00000002", ".out.new-00000001"]
    finally:
        os.close(living)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".out.new-00000003", ".out.new-nothex"]


def test_a_crash_between_the_two_renames_is_finished(tmp_path):
    for state in ("old", "new"):
        (tmp_path / f".out.{state}-0000000a").mkdir()
        (tmp_path / f".out.{state}-0000000a" / "a.txt").write_text(state)
    clean_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a.txt").read_text() == "new"


@pytest.mark.parametrize("damage", ["missing", "symlink", "pipe", "folder", "shorter", "altered"])
def test_each_kind_of_damage_is_named(tmp_path, damage):
    target = publish_folder(write_text("content"), tmp_path / "out")
    file = target / "a.txt"
    file.unlink()
    messages = {
        "missing": "No such file",
        "symlink": "not a regular file",
        "pipe": "not a regular file",
        "folder": "not a regular file",
        "shorter": "4 bytes, the manifest says 7",
        "altered": "content changed",
    }
    if damage == "symlink":
        (tmp_path / "elsewhere").write_text("content")
        file.symlink_to(tmp_path / "elsewhere")
    elif damage == "pipe":
        os.mkfifo(file)
    elif damage == "folder":
        file.mkdir()
    elif damage == "shorter":
        file.write_text("cont")
    elif damage == "altered":
        file.write_text("Content")
    with pytest.raises(AnabranchError, match=f"a.txt: .*{messages[damage]}"):
        verify_folder(target)


@pytest.mark.parametrize(
    "document",
    [
        "",
        "[]",
        "{",
        '{"format": 2, "files": {}}',
        '{"format": 1}',
        '{"format": 1, "files": {"a.txt": 3}}',
        "[" * 100_000,
    ],
)
def test_a_broken_manifest_is_an_error_in_words(tmp_path, document):
    target = publish_folder(write_text("content"), tmp_path / "out")
    (target / "manifest.json").write_text(document)
    with pytest.raises(AnabranchError, match=r"manifest.json: "):
        verify_folder(target)


def test_json_that_is_a_pipe_or_too_large_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(AnabranchError, match="not a regular file"):
        read_json(tmp_path / "pipe.json")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(2**25)
    with pytest.raises(AnabranchError, match="larger than"):
        read_json(tmp_path / "large.json")
