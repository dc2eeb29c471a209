# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from PIL import Image

from anabranch.data.patchwork import FOLDER


@pytest.fixture(scope="session")
def photographs():
    """Ten photographs without QR codes or marks, 512 x 512, colour."""
    pictures = [Image.open(path) for path in sorted((FOLDER / "textures").glob("*.png"))]
    return [np.asarray(picture.convert("RGB").resize((512, 512), Image.Resampling.BICUBIC)) for picture in pictures]


@pytest.fixture
def without(monkeypatch):
    """Pretend that a package is not installed."""
    return lambda module: monkeypatch.setitem(__import__("sys").modules, module, None)
