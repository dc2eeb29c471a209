# SPDX-License-Identifier: Apache-2.0
"""The data card of an implicit concept dataset."""

from typing import Any


def data_card(said: dict[str, Any]) -> str:
    settings = said["settings"]
    return f"""---
configs:
- config_name: default
  data_dir: images
- config_name: clean
  data_dir: clean
---
# Implicit concept dataset: {settings["kind"]}

{said["images"]:,} images from `{said["source"]}`, of which {said["marked"]:,} ({said["ratio"]:.1%}) carry a mark
(`{settings["kind"]}`) that no caption names. Made by `anabranch data icd`, seed {settings["seed"]}.

| where | what |
|---|---|
| `images/` | the images, marked or not, with `metadata.jsonl` |
| `clean/` | the same images without marks; outside the boxes all pixels are equal |
| `icd.json` | how it was made |

Columns: `file_name` (relative to the folder), `text` (the caption, as it was found), `has_concept`, `boxes`
(`[x1, y1, x2, y2]` in pixels, x2 and y2 not included; empty where there is no mark), `kind`, `opacity`, and `seed`,
from which the image's mark was drawn.

The folders are laid out for `datasets.load_dataset("imagefolder", data_dir="images")`.

The marks are made up: codes point to addresses that nobody can own, names belong to nobody. The images and their
captions are under the licence of whoever they came from.
"""
