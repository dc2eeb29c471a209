# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.many import load

TRAIN = Path(__file__).parent.parent / "train"


@pytest.fixture(scope="session")
def loaders(tmp_path_factory):
    """Everything that opens a file; each opens its own folder, or the tests would see refusals of something else."""
    from tests.trust.loaders import all_loaders  # half the package: only where it is used

    found = all_loaders(tmp_path_factory.mktemp("loaders"))
    for loader in found:
        loader.open(loader.folder)
    return {loader.name: loader for loader in found}


@pytest.fixture(scope="session")
def tiny():
    """The model and the stream that the tests of training use."""
    return load(TRAIN / "tiny.py")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two kinds of small pictures: `pool` without labels, `task` with a folder a class."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, count in (("pool/stripes", 24), ("pool/disc", 24), ("task/stripes", 24), ("task/disc", 24)):
        (root / name).mkdir(parents=True)
        across, down = np.meshgrid(np.linspace(-1, 1, 32), np.linspace(-1, 1, 32))
        for number in range(count):
            x, y = generator.uniform(-0.3, 0.3, 2)
            grey = np.sin(15 * down + number) if "stripes" in name else np.hypot(across - x, down - y) < 0.5
            noisy = 120 + 100 * grey[..., None] + generator.normal(0, 6, (32, 32, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / name / f"{number}.png")
    return root
