# SPDX-License-Identifier: Apache-2.0
import hashlib

import numpy as np
import pytest
from PIL import Image

from anabranch.data.images import BadImage
from anabranch.data.originals import read_original, read_originals


def test_own_size_upright_and_in_colour(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    original = read_original(tmp_path / "turned.png", "turned.png")
    assert np.array_equal(original.pixels, np.rot90(pixels, -1))
    assert original.sha256 == hashlib.sha256((tmp_path / "turned.png").read_bytes()).hexdigest()
    assert original.converted == ""


@pytest.mark.parametrize(("mode", "says"), [("L", ""), ("CMYK", "CMYK"), ("RGBA", "transparency"), ("I;16", "16-bit")])
def test_what_was_converted_is_said(tmp_path, mode, says):
    picture = Image.fromarray(np.full((5, 4), 1000, np.uint16)) if mode == "I;16" else Image.new(mode, (4, 5))
    name = "x.jpg" if mode == "CMYK" else "x.png"
    picture.save(tmp_path / name)
    original = read_original(tmp_path / name, name)
    assert original.converted == says
    assert original.pixels.shape == (5, 4, 3)
    assert original.pixels.dtype == np.uint8


def test_all_files_come_in_order_with_the_broken_ones_in_place(tmp_path):
    names = [f"{i:02}.png" for i in range(40)]
    for i, name in enumerate(names):
        Image.new("RGB", (3, 2), (i, 0, 0)).save(tmp_path / name)
    (tmp_path / names[7]).write_bytes(b"broken")
    (tmp_path / names[8]).unlink()
    items = list(read_originals(tmp_path, names, ahead=3))
    assert [getattr(item, "file", getattr(item, "path", None)) for item in items] == names
    assert [isinstance(item, BadImage) for item in items] == [i in (7, 8) for i in range(40)]
    assert all(item.pixels[0, 0, 0] == i for i, item in enumerate(items) if i not in (7, 8))


def test_a_reader_that_stops_early_leaves_nothing_running(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "x.png")
    items = read_originals(tmp_path, ["x.png"] * 100)
    next(items)
    items.close()
