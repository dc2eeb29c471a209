# SPDX-License-Identifier: Apache-2.0
"""An adapter's folder, read and looked at: what is damaged is refused before a pipeline is touched.

The files are described in adapter.py, which writes them.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.models.diffusion.conditioning import Conditioning
from anabranch.models.hub.card import front_matter
from anabranch.models.hub.pretrained import Pretrained
from anabranch.suppress.geom_erasing.bins import Bin, Grid
from anabranch.suppress.geom_erasing.words import Vocabulary
from anabranch.suppress.lora import WEIGHTS

TOKENS, NEGATIVE, CONFIG, WHOLE = "geom_tokens.safetensors", "negative.safetensors", "geom_config.json", "denoiser"
FORMAT = 1
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, SafetensorError)
"""What readers raise on files that somebody cut off or wrote into; UsageError is none of them."""
TRAINED = ("lora", "denoiser", "tokens", "baked")


@dataclass(frozen=True, kw_only=True)
class Adapter(Pretrained):
    """The folder, read."""

    MARK = CONFIG

    folder: Path
    vocabulary: Vocabulary
    rows: dict[str, Tensor] | None
    """Embeddings of the new words by encoder, (n, d); None where they were not published."""
    training_bins: list[list[Bin]]
    """Of the images that contained the concept: each set of bins once, with how often in `counts`."""
    counts: list[int]
    config: dict[str, Any]

    @property
    def trained(self) -> str:
        """lora, denoiser, tokens; or baked, a LoRA that needs no negative prompt."""
        return str(self.config["trained"])

    @property
    def has_lora(self) -> bool:
        return self.trained in ("lora", "baked")

    def write_files(self, folder: Path) -> None:
        """A copy of what makes the adapter; the folder of a run holds its training besides."""
        for name in (WEIGHTS, TOKENS, NEGATIVE, CONFIG):  # the one that makes it an adapter comes last
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
            if name == NEGATIVE and (self.folder / WHOLE).is_dir():
                shutil.copytree(self.folder / WHOLE, folder / WHOLE, dirs_exist_ok=True)

    @classmethod
    def leaves(cls, folder: Path) -> frozenset[str]:
        return frozenset({WEIGHTS, TOKENS, NEGATIVE, WHOLE})

    @classmethod
    def read_files(cls, folder: Path) -> "Adapter":
        return read_adapter(folder)

    def card(self) -> str:
        """The one that was written with it."""
        file = self.folder / "README.md"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        head = front_matter(library_name="diffusers", tags=["geom-erasing"])
        return f"{head}# Less {self.config['concept']}\n\nAn adapter of Geom-Erasing (arXiv 2310.05873).\n"


def read_adapter(folder: str | Path) -> Adapter:
    """The adapter, after a look at every file that it and its later use will need.

    Raises:
        UsageError: not a folder that `anabranch erase train` wrote, one that is damaged, or of a later format.
    """
    folder = Path(folder)
    file = folder / CONFIG
    if not file.is_file():
        raise UsageError(
            f"{folder} is not an adapter",
            expected=f"a folder with {CONFIG}",
            received="no such folder" if not folder.is_dir() else "a folder without it",
            hint="anabranch erase train writes one",
        )
    with damage_told(folder):
        adapter = read_parts(folder)
        check_whole(adapter)
        return adapter


def read_parts(folder: Path) -> Adapter:
    file = folder / CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("format") != FORMAT:
        raise UsageError(f"{file}: another format", expected=FORMAT, received=config.get("format"))
    vocabulary = Vocabulary(name=config["name"], grid=Grid(*config["grid"]), new_name=config["new_name"])
    rows = None
    if (folder / TOKENS).is_file():
        tensors = load_file(folder / TOKENS)
        names = list(dict.fromkeys(key.partition("/")[0] for key in tensors))
        rows = {name: torch.stack([tensors[f"{name}/{word}"] for word in vocabulary.words()]) for name in names}
    return Adapter(
        folder=folder,
        vocabulary=vocabulary,
        rows=rows,
        training_bins=[[(m, n) for m, n in bins] for bins in config["training_bins"]],
        counts=config["training_counts"],
        config=config,
    )


def ready_negatives(folder: Path) -> dict[str, Conditioning]:
    tensors = load_file(folder / NEGATIVE)
    return {
        name: Conditioning(embeds=tensor, pooled=tensors.get(f"{name}.pooled"))
        for name, tensor in tensors.items()
        if not name.endswith(".pooled")
    }


@contextmanager
def damage_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise damaged(folder, told(error)) from error


def damaged(folder: Path, received: str) -> UsageError:
    return UsageError(
        f"the adapter {folder} is damaged",
        expected="its files as anabranch erase train or bake wrote them",
        received=received,
        hint="copy the folder again, or train again into another --out",
    )


def check_whole(adapter: Adapter) -> None:
    config, folder = adapter.config, adapter.folder
    if missing := [name for name in ("trained", "family", "base", "concept") if not isinstance(config.get(name), str)]:
        raise damaged(folder, f"{CONFIG} without {', '.join(missing)}")
    if adapter.trained not in TRAINED:
        raise damaged(folder, f"{CONFIG}: trained is {adapter.trained!r}, none of {', '.join(TRAINED)}")
    needed = [WEIGHTS] if adapter.has_lora else [f"{WHOLE}/config.json"] if adapter.trained == "denoiser" else []
    needed += [] if adapter.trained == "baked" else [NEGATIVE]
    if gone := [name for name in needed if not (folder / name).is_file()]:
        raise damaged(folder, f"no {', '.join(gone)}")
    if adapter.trained != "baked" and "name" not in ready_negatives(folder):
        raise damaged(folder, f"{NEGATIVE} without the negative prompt 'name'")
    check_places(adapter)
    if adapter.rows is not None:
        check_words(adapter)


def check_places(adapter: Adapter) -> None:
    known = set(adapter.vocabulary.grid.bins())
    strange = [place for bins in adapter.training_bins for place in bins if place not in known]
    counts = adapter.counts
    if strange or len(counts) != len(adapter.training_bins) or not all(type(n) is int and n > 0 for n in counts):
        grid = f"{adapter.vocabulary.grid.columns} x {adapter.vocabulary.grid.rows}"
        told = f"the bin {list(strange[0])}" if strange else f"{len(counts)} counts, some of them no counts"
        raise damaged(adapter.folder, f"{CONFIG}: {told} beside a grid of {grid}")


def check_words(adapter: Adapter) -> None:
    with safe_open(adapter.folder / TOKENS, framework="pt") as file:
        found = set(file.keys())
    expected = {f"{name}/{word}" for name in adapter.rows or {} for word in adapter.vocabulary.words()}
    if surplus := sorted(found - expected):
        raise damaged(adapter.folder, f"{TOKENS} holds {surplus[0]!r}, which is in no grid of {CONFIG}")


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"
