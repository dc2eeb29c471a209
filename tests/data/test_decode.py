# SPDX-License-Identifier: Apache-2.0
import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from anabranch.data.decode import MAX_PIXELS, UNREADABLE, decode, read_header
from anabranch.data.folders import in_threads


def saved(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


def ramp(dtype=np.uint8, size=16):
    """Left to right from black to the brightest value."""
    return np.tile(np.linspace(0, np.iinfo(dtype).max, size).astype(dtype), (size, 1))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(10_000))) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_16_bit_grey_keeps_its_shades(tmp_path):
    path = saved(tmp_path / "deep.png", ramp(np.uint16))
    with Image.open(path) as picture:
        assert picture.mode.startswith("I")
    np.testing.assert_array_equal(decode(path, 16, 1)[0], np.round(ramp(np.uint16) / 257).astype(np.uint8))


@pytest.mark.parametrize(("alpha", "expected"), [(255, 40), (0, 255), (128, round(40 * 128 / 255 + 255 * 127 / 255))])
def test_transparent_parts_lie_on_white(tmp_path, alpha, expected):
    rgba = np.full((8, 8, 4), (40, 40, 40, alpha), dtype=np.uint8)
    grey_alpha = np.full((8, 8, 2), (40, alpha), dtype=np.uint8)
    for name, pixels in (("rgba.png", rgba), ("la.png", grey_alpha), ("rgba.webp", rgba)):
        path = saved(tmp_path / name, pixels, **({"lossless": True} if name.endswith("webp") else {}))
        for channels in (1, 3):
            assert abs(int(decode(path, 8, channels).mean()) - expected) <= 1


def test_palette_gives_its_colours_and_a_transparent_entry_is_white(tmp_path):
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 200, 30, 60])
    picture.save(tmp_path / "plain.png")
    assert decode(tmp_path / "plain.png", 8, 3)[:, 0, 0].tolist() == [200, 30, 60]
    picture.save(tmp_path / "clear.png", transparency=1)
    assert decode(tmp_path / "clear.png", 8, 3)[:, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_camera_picture_stands_upright(tmp_path, orientation):
    """Turn a known picture by the definition of each orientation; decoding must turn it back."""
    upright = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    # what the camera stored, so that the tag's operation gives `upright` again
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "turned.png", np.ascontiguousarray(stored), exif=exif)
    np.testing.assert_array_equal(decode(path, 8, 1)[0], upright)


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    red, green, blue = decode(tmp_path / "print.jpg", 16, 3).mean((1, 2))
    assert red > 240
    assert green < 15
    assert blue < 15


def test_one_bit_and_colour_profile_pictures_are_read(tmp_path):
    Image.new("1", (8, 8), 1).save(tmp_path / "bit.png")
    assert (decode(tmp_path / "bit.png", 8, 1) == 255).all()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = saved(tmp_path / "profile.png", np.full((8, 8, 3), 90, np.uint8), icc_profile=profile)
    assert (decode(path, 8, 3) == 90).all()


@pytest.mark.parametrize(("height", "width"), [(32, 64), (64, 32), (50, 33), (3, 501)])
def test_shorter_side_is_resized_and_the_centre_is_kept(tmp_path, height, width):
    pixels = np.zeros((height, width), np.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = 200  # only the centre square is bright
    out = decode(saved(tmp_path / "wide.png", pixels), 16, 1)
    assert out.shape == (1, 16, 16)
    assert abs(int(out[0, 8, 8]) - 200) <= 8


def test_equal_size_is_left_alone(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(saved(tmp_path / "n.png", noise), 28, 3), noise.transpose(2, 0, 1))


@pytest.mark.parametrize("side", [20_000, 12_000, 8_000])
def test_a_decompression_bomb_is_refused_before_decoding(tmp_path, side):
    assert side * side > MAX_PIXELS
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(side, side))
    with pytest.raises(UNREADABLE):
        decode(path, 28, 1)
    with pytest.raises(UNREADABLE):
        read_header(path)


def test_other_formats_and_scripts_are_refused_by_content(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "picture.bmp")
    path = (tmp_path / "picture.bmp").rename(tmp_path / "renamed.png")
    with pytest.raises(UNREADABLE):
        decode(path, 8, 1)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n(r) file\n")
    with pytest.raises(UNREADABLE):
        decode(path, 8, 1)


def seeds_of_fuzz():
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, picture, options in (
        ("JPEG", Image.fromarray(noise), {"exif": exif}),
        ("JPEG", Image.fromarray(noise).convert("CMYK"), {"progressive": True}),
        ("PNG", Image.fromarray(noise), {"exif": exif}),
        ("PNG", Image.fromarray(noise).quantize(16), {"transparency": 3}),
        ("PNG", Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257), {}),
        ("WEBP", Image.fromarray(noise), {"exif": exif}),
    ):
        file = io.BytesIO()
        picture.save(file, name, **options)
        yield file.getvalue()


def mutated(data: bytes, generator: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(generator.choice([1, 1, 2, 4, 16])):
        out[generator.randrange(len(out))] = generator.randrange(256)
    if generator.random() < 0.25:
        del out[generator.randrange(len(out)) :]
    if generator.random() < 0.1:
        out += generator.randbytes(40)
    return bytes(out)


def count_rejected(tmp_path, num_files):
    """Mutate, decode; anything but a picture or one of `UNREADABLE` fails the test."""
    generator, originals = random.Random(0), list(seeds_of_fuzz())

    def attempt(i):
        try:
            return decode(tmp_path / str(i), 24, 3).shape != (3, 24, 24)
        except UNREADABLE:
            return True

    for i in range(num_files):
        content = mutated(originals[i % len(originals)], generator)
        (tmp_path / str(i)).write_bytes(repair_checksums(content) if generator.random() < 0.5 else content)
    return sum(in_threads(attempt, range(num_files)))


def repair_checksums(data: bytes) -> bytes:
    """Give a mutated PNG valid checksums, so that the damage reaches the parsers behind them."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, place = data[:8], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        out, place = out + png_chunk(kind, body), place + 12 + length
    return out


@pytest.mark.parametrize(
    "num_files",
    [
        pytest.param(300, marks=pytest.mark.row("S4", sample=True)),
        pytest.param(10_000, marks=[pytest.mark.row("S4", cheap=True), pytest.mark.slow]),
    ],
)
def test_mutated_files_never_raise_anything_unexpected(tmp_path, num_files, counted):
    rejected = count_rejected(tmp_path, num_files)
    assert num_files / 10 < rejected < num_files  # some still decode: the mutations are not trivial
    others = sum(isinstance(attempt(tmp_path / str(i)), SyntaxError | ValueError) for i in range(300))
    counted(num_files, control=(others, "of 300 get past a reader that expects OSError alone"))


def attempt(path):
    """What Pillow itself makes of a file."""
    try:
        with Image.open(path) as picture:
            picture.load()
    except Exception as error:
        return error
