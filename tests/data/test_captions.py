# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from anabranch.data import captions
from anabranch.data.captions import read_captions
from anabranch.errors import UsageError

FILES = ("a.png", "b.jpg")


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def row(name, text, **more):
    return {"file_name": name, "text": text, **more}


def test_metadata_in_any_order_with_other_columns_and_files(tmp_path):
    write(tmp_path / "metadata.jsonl", row("b.jpg", "ein Boot", size=3), "\n", row("a.png", ""), row("c.png", "gone"))
    assert read_captions(tmp_path, FILES) == ["", "ein Boot"]


def test_metadata_may_lie_in_the_folders_it_describes(tmp_path):
    write(tmp_path / "train" / "metadata.jsonl", row("cat/a.png", "a cat"), row("b.png", "none"))
    assert read_captions(tmp_path, ["train/cat/a.png", "train/b.png"]) == ["a cat", "none"]


def test_a_text_file_beside_each_image(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeff a harbour \n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("")
    assert read_captions(tmp_path, FILES) == ["a harbour", ""]


def test_without_captions_the_class_folder_names_them(tmp_path):
    assert read_captions(tmp_path, FILES) == ["", ""]
    assert read_captions(tmp_path, ["cat/a.png", "dog/old/b.png", "c.png"]) == [
        "a photo of a cat",
        "a photo of a dog",
        "",
    ]
    assert read_captions(tmp_path, ["train/cat/a.png", "test/dog/b.png"], "{class}!") == ["cat!", "dog!"]
    assert read_captions(tmp_path, ["train/a.png", "car/b.png"], "{class}") == ["train", "car"]


def test_a_line_of_the_metadata_wins_over_a_text_file(tmp_path):
    write(tmp_path / "metadata.jsonl", row("a.png", "listed"))
    (tmp_path / "a.txt").write_text("beside")
    (tmp_path / "b.txt").write_text("beside")
    assert read_captions(tmp_path, FILES) == ["listed", "beside"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["file_name,text\n"], "line 1: no JSON object"),
        ([row("a.png", "x"), "[1]\n"], "line 2: no JSON object"),
        (["[" * 100_000], "no JSON object"),
        ([row("a.png", "x"), row("a.png", "y")], "'a.png' was named before"),
        ([row("a.png", None)], "the caption is no text"),
        ([row("a.png", ["x"])], "the caption is no text"),
        (['{"file_name": "a.png", "text": "\\ud800"}\n'], "the caption is no text"),
        ([{"file_name": "a.png"}], "the caption is no text"),
        ([{"text": "x"}], "unusable file_name"),
        ([row("../a.png", "x")], "unusable file_name"),
        ([row("/etc/a.png", "x")], "unusable file_name"),
        ([row("C:\\a.png", "x")], "unusable file_name"),
        ([row("a.png", "x" * 70_000)], "too long"),
        ([row("a.png", "x")], "1 of 2 images have no caption, the first is 'b.jpg'"),
        ([row("z.png", "x")], "2 of 2 images have no caption"),
    ],
)
def test_odd_metadata_is_refused(tmp_path, rows, says):
    write(tmp_path / "metadata.jsonl", *rows)
    with pytest.raises(UsageError, match=says):
        read_captions(tmp_path, FILES)


def test_odd_files_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"a\.txt is not UTF-8"):
        read_captions(tmp_path, FILES)
    (tmp_path / "a.txt").unlink()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.txt").symlink_to(outside / "secret.txt")
    with pytest.raises(UsageError, match="leads out of the folder"):
        read_captions(folder, FILES)
    (folder / "a.txt").unlink()
    (folder / "metadata.jsonl").mkdir()
    with pytest.raises(UsageError, match="not a file"):
        read_captions(folder, FILES)
    monkeypatch.setattr(captions, "MAX_METADATA_BYTES", 10)
    write(tmp_path / "metadata.jsonl", row("a.png", "x"))
    with pytest.raises(UsageError, match="too large"):
        read_captions(tmp_path, FILES)


@pytest.mark.parametrize("template", ["{}", "a {name}", "{class.__init__}"])
def test_a_template_has_one_place(tmp_path, template):
    with pytest.raises(UsageError, match=r"\{class\} only"):
        read_captions(tmp_path, ["cat/a.png"], template)
