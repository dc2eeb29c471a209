# SPDX-License-Identifier: Apache-2.0
"""Decode one picture file into a square of 8-bit pixels, in whatever way it was saved.

Formats   : PNG, JPEG, WebP, told by their content; animated files give their first frame.
Size      : the shorter side becomes `image_size` (bicubic, antialiased), then the centre is cut out.
Grey      : ITU-R 601 luma. 16-bit grey is divided by 257, so that 65535 becomes 255.
Colour    : CMYK and palettes become RGB; embedded colour profiles are not applied.
Alpha     : composited on white, the page that pictures with transparent parts are drawn for.
Turned    : the orientation that a camera wrote (EXIF) is applied.
Refused   : more than 50 million pixels, before any of them is decoded.
"""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
MAX_PIXELS = 50_000_000
# SyntaxError is what Pillow raises for some broken PNG chunks; the warning is an error for callers that made it one.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)

GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")
ORIENTATION_TAG = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(file: object) -> Image.Image:
    """The picture with its header read and its pixels not yet decoded."""
    picture = Image.open(file, formats=("JPEG", "PNG", "WEBP"))
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"{picture.width} x {picture.height} pixels, more than {MAX_PIXELS // 10**6} million")
    return picture


def read_header(path: Path) -> tuple[int, int, bool]:
    """(width, height, saved as grey), without decoding."""
    with path.open("rb") as file, open_picture(file) as picture:
        return picture.width, picture.height, picture.mode in GREY_MODES


def decode(path: Path, image_size: int, channels: int) -> np.ndarray:
    """(C, S, S) uint8; raises one of `UNREADABLE`."""
    with path.open("rb") as file, open_picture(file) as picture:
        plain = whole(picture, "L" if channels == 1 else "RGB")
        plain = ImageOps.fit(plain, (image_size, image_size), method=Image.Resampling.BICUBIC)
        return np.asarray(plain).reshape(image_size, image_size, channels).transpose(2, 0, 1)


def whole(picture: Image.Image, mode: str) -> Image.Image:
    """All of its pixels, 8 bit, upright, on white: neither cut nor resized."""
    picture.load()
    return on_white(to_8_bit(upright(picture))).convert(mode)


def upright(picture: Image.Image) -> Image.Image:
    turn = TURNS.get(picture.getexif().get(ORIENTATION_TAG))
    return picture if turn is None else picture.transpose(turn)


def to_8_bit(picture: Image.Image) -> Image.Image:
    """Scale 16-bit grey; `convert("L")` would clip everything above 255 to white."""
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture.convert("RGBA"))
    return page


def explain(error: Exception) -> str:
    """Why a picture could not be read, without the library's object names."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a PNG, JPEG or WebP picture"
    return f"cannot be decoded: {error}"


def sha256_of(path: Path) -> str:
    """Hex digest, or nothing where the file cannot be read at all."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
