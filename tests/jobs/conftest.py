# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from PIL import Image


def picture_of(kind, generator, size):
    """A noisy colour picture: bright flat stripes, or a disc on black."""
    across, down = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size))
    if kind == "stripes":
        grey = 0.6 + 0.4 * np.sin(down * generator.uniform(12, 20) + generator.uniform(0, 6))
    else:
        middle = generator.uniform(-0.3, 0.3, 2)
        grey = np.hypot(across - middle[0], down - middle[1]) < generator.uniform(0.4, 0.7)
    colour = 220 * grey[..., None] * generator.uniform(0.6, 1, 3) + generator.normal(0, 6, (size, size, 3))
    return Image.fromarray(colour.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Colour pictures of mixed sizes, nested, in two formats: `pool` without labels, `task` with a folder a class."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name, count in (("pool/stripes/deep", 60), ("pool/disc", 60), ("task/stripes", 24), ("task/disc", 24)):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(count):
            size = int(generator.integers(36, 70))
            picture = picture_of(name.split("/")[1], generator, size).crop(
                (0, 0, size - size // 5 * (i % 3 == 0), size)
            )
            picture.save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root
