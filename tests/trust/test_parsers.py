# SPDX-License-Identifier: Apache-2.0
"""Whatever stands in a text file, it is read or refused in words; no other error comes out, and nothing hangs."""

import json
import random
import shutil

import pytest
import yaml

from anabranch.errors import AnabranchError
from tests.trust.loaders import sign
from tests.trust.mutate import altered_text

TEXTS = (".json", ".jsonl", ".yaml", ".txt")


def targets(loaders):
    """(loader, file) of every text that is read here; those that cost more come second.

    A model's own config.json is read by transformers, and may ask for a model of any size.
    """
    found = [(one, file) for one in loaders.values() for file in one.files if file.endswith(TEXTS)]
    slow = [(loaders["steps"], "mote.json"), (loaders["pipeline"], "model_index.json")]
    return [pair for pair in found if not pair[0].slow], slow


def try_out(loader, file, count, folder, seed=0):
    """What came out that is no AnabranchError, and how many of the files a plain reader fails on in its own way."""
    generator = random.Random(f"{loader.name}/{file}/{seed}")
    shutil.copytree(loader.folder, folder, dirs_exist_ok=True)
    path, escaped, plain = folder / file, {}, 0
    original = path.read_bytes() if path.is_file() else b"{}"
    for number in range(count):
        data = altered_text(original, generator)
        path.write_bytes(data)
        if path.name not in ("manifest.json", "experts.json"):
            sign(folder)
        plain += fails_plainly(data, file)
        try:
            loader.open(folder)
        except AnabranchError:
            continue
        except Exception as error:
            escaped[f"{loader.name}/{file}: {type(error).__name__}"] = (number, str(error)[:120], data[:200])
    return escaped, plain


def fails_plainly(data, file):
    """The control: the parser alone, used as most programs use it."""
    try:
        text = data.decode()
        for part in text.split("\n") if file.endswith(".jsonl") else [text]:
            if file.endswith(".yaml"):
                yaml.safe_load(part)
            elif part.strip() and not file.endswith(".txt"):
                dict(json.loads(part))
    except Exception:
        return True
    return False


def count_all(loaders, fast, slow, tmp_path, counted):
    escaped, plain, total = {}, 0, 0
    for pairs, count in zip(targets(loaders), (fast, slow), strict=True):
        for number, (loader, file) in enumerate(pairs):
            more, failed = try_out(loader, file, count, tmp_path / f"{number}-{count}")
            escaped, plain, total = escaped | more, plain + failed, total + count
            shutil.rmtree(tmp_path / f"{number}-{count}")
    assert escaped == {}
    counted(total, len(escaped), control=(plain, "of them end a plain reader"))


@pytest.mark.row("S6", sample=True)
def test_altered_texts_are_read_or_refused(loaders, tmp_path, counted):
    count_all(loaders, 40, 4, tmp_path, counted)


@pytest.mark.slow
@pytest.mark.row("S6", cheap=True)
def test_many_altered_texts_are_read_or_refused(loaders, tmp_path, counted):
    count_all(loaders, 1500, 60, tmp_path, counted)


@pytest.mark.night
@pytest.mark.row("S6")
def test_very_many_altered_texts_are_read_or_refused(loaders, tmp_path, counted):
    count_all(loaders, 20_000, 600, tmp_path, counted)
