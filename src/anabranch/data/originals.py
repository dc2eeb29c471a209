# SPDX-License-Identifier: Apache-2.0
"""Pictures at their own size, upright, in colour: what a detector looks at. See `decode` for how modes are converted.

A few pictures are decoded ahead in threads while the caller works on the ones before.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from anabranch.data.decode import UNREADABLE, explain, open_picture, sha256_of, whole
from anabranch.data.images import BadImage

PLAIN_MODES = ("RGB", "L", "P", "1")


@dataclass(frozen=True, eq=False)
class Original:
    file: str
    pixels: np.ndarray
    """(H, W, 3) uint8."""
    sha256: str
    converted: str
    """What was lost on the way to 8-bit colour, such as `CMYK`; nothing for plain pictures."""


def read_original(path: Path, file: str) -> Original:
    """Raises one of `UNREADABLE`."""
    content = path.read_bytes()
    with open_picture(BytesIO(content)) as picture:
        mode = "transparency" if picture.has_transparency_data else picture.mode
        pixels = np.asarray(whole(picture, "RGB"))
    digest = hashlib.sha256(content).hexdigest()
    return Original(file, pixels, digest, "" if mode in PLAIN_MODES else "16-bit" if mode.startswith("I") else mode)


def read_originals(root: Path, files: Sequence[str], ahead: int = 16) -> Iterator[Original | BadImage]:
    """All files in order; at most `ahead` and one a core are decoded and not yet taken."""
    workers = min(16, os.cpu_count() or 1)
    waiting: deque[Future[Original | BadImage]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for file in files:
            waiting.append(pool.submit(_read_or_say_why, root, file))
            if len(waiting) >= ahead + workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read_or_say_why(root: Path, file: str) -> Original | BadImage:
    try:
        return read_original(root / file, file)
    except UNREADABLE as error:
        return BadImage(file, explain(error), sha256_of(root / file))
