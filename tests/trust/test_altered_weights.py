# SPDX-License-Identifier: Apache-2.0
"""Altered weight files: never a crash, and where a manifest stands beside them, never a silent load."""

import random
import shutil

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from anabranch.errors import AnabranchError
from tests.trust.mutate import altered_bytes

WATCHED = ("checkpoint", "adapter")
"""Whoever wrote these wrote their sha-256 as well."""


def weights(loader):
    return [file for file in loader.files if file.endswith(".safetensors")]


def try_out(loader, file, count, folder):
    """(silent loads, what is no AnabranchError, silent loads of the library alone)."""
    generator = random.Random(f"{loader.name}/{file}")
    shutil.copytree(loader.folder, folder, dirs_exist_ok=True)
    original, silent, raw, alone = (folder / file).read_bytes(), 0, {}, 0
    for _ in range(count):
        data = altered_bytes(original, generator)
        if data == original:
            data += b"\0"
        (folder / file).write_bytes(data)
        alone += opens(folder / file)
        try:
            loader.open(folder)
            silent += 1
        except AnabranchError:
            continue
        except Exception as error:
            raw[f"{loader.name}/{file}: {type(error).__name__}"] = str(error)[:200]
    (folder / file).write_bytes(original)
    return silent, raw, alone


def opens(file):
    try:
        return bool(load_file(file))
    except SafetensorError:
        return False


def count_all(loaders, watched, others, slow, tmp_path, counted):
    total, silent, raw, alone = 0, 0, {}, 0
    for loader in loaders.values():
        count = watched if loader.name in WATCHED else slow if loader.slow else others
        for file in weights(loader):
            quiet, odd, library = try_out(loader, file, count, tmp_path / loader.name)
            total, raw = total + count, raw | odd
            if loader.name in WATCHED:
                silent, alone = silent + quiet, alone + library
    assert raw == {}
    counted(total, silent, control=(alone, "load without a word where nothing compares their sha-256"))


@pytest.mark.row("S3", sample=True)
def test_some_altered_weights(loaders, tmp_path, counted):
    count_all(loaders, 80, 15, 4, tmp_path, counted)


@pytest.mark.slow
@pytest.mark.row("S3", cheap=True)
def test_10000_altered_weights(loaders, tmp_path, counted):
    count_all(loaders, 3000, 100, 60, tmp_path, counted)
