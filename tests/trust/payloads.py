# SPDX-License-Identifier: Apache-2.0
"""Pickles that make a file when they are opened, in every container that machine learning keeps them in."""

import builtins
import bz2
import contextlib
import cProfile
import gzip
import importlib
import io
import json
import logging
import lzma
import os
import pickle
import posix
import profile
import pty
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import timeit
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch


class Call:
    """Pickled as a call, which opening it makes."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def calls(mark: Path):
    """By name, a call that makes the file `mark` and nothing else."""
    name = str(mark)
    touch, write = f"touch {name}", f"open({name!r}, 'w').close()"
    imported = Call(importlib.import_module, "os")
    return {
        "os.system": Call(os.system, touch),
        "posix.system": Call(posix.system, touch),
        "os.popen": Call(os.popen, touch),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", name]),
        "subprocess.call": Call(subprocess.call, ["touch", name]),
        "subprocess.run": Call(subprocess.run, ["touch", name]),
        "subprocess.check_output": Call(subprocess.check_output, ["touch", name]),
        "subprocess.getoutput": Call(subprocess.getoutput, touch),
        "pty.spawn": Call(pty.spawn, ["touch", name]),
        "os.open": Call(os.open, name, os.O_CREAT),
        "os.mkdir": Call(os.mkdir, name),
        "os.symlink": Call(os.symlink, "nowhere", name),
        "eval": Call(eval, write),
        "exec": Call(exec, write),
        "open": Call(builtins.open, name, "w"),
        "FileIO": Call(io.FileIO, name, "w"),
        "Path.touch": Call(Path.touch, mark),
        "getattr": Call(getattr(builtins, "eval"), f"getattr(__import__('os'), 'mkdir')({name!r})"),  # noqa: B009
        "imported": Call(eval, f"m.mkdir({name!r})", {"m": imported}),
        "copyfile": Call(shutil.copyfile, "/dev/null", name),
        "FileHandler": Call(logging.FileHandler, name),
        "timeit": Call(timeit.timeit, write, "pass", timeit.default_timer, 1),
        "cProfile": Call(cProfile.run, write, f"{name}.profile"),
        "profile": Call(profile.run, write, f"{name}.profile"),
        "zipfile": Call(zipfile.ZipFile, name, "w"),
        "tarfile": Call(tarfile.open, name, "w"),
        "gzip": Call(gzip.open, name, "wb"),
        "bz2": Call(bz2.open, name, "wb"),
        "lzma": Call(lzma.open, name, "wb"),
        "torch.save": Call(torch.save, 0, name),
        "numpy.save": Call(np.save, name, 0),
        "nested": Call(pickle.loads, pickle.dumps(Call(os.mkdir, name))),
    }


def zoo(mark: Path):
    """(name, bytes, opener that falls for it)."""
    found = [(name, pickle.dumps(call), pickle.loads) for name, call in calls(mark).items()]
    call = Call(os.mkdir, str(mark))
    found += [(f"protocol {number}", pickle.dumps(call, number), pickle.loads) for number in range(5)]
    raw = {"INST": f"(S'{mark}'\niposix\nmkdir\n.", "OBJ": f"(cposix\nmkdir\nS'{mark}'\no."}
    found += [(name, text.encode(), pickle.loads) for name, text in raw.items()]
    found += [
        ("torch zip", in_torch(call), open_torch),
        ("torch legacy", in_torch(call, _use_new_zipfile_serialization=False), open_torch),
        ("torch tar", in_tar(call), open_torch),
        ("numpy", in_numpy(call), open_numpy),
        ("joblib", zlib.compress(pickle.dumps(call)), lambda data: pickle.loads(zlib.decompress(data))),
    ]
    return found


def in_torch(call, **options):
    file = io.BytesIO()
    torch.save({"weight": call}, file, **options)
    return file.getvalue()


def open_torch(data):
    with warnings.catch_warnings(), tempfile.NamedTemporaryFile() as file:  # its oldest format wants a file
        warnings.simplefilter("ignore")
        Path(file.name).write_bytes(data)
        return torch.load(file.name, weights_only=False)


def in_tar(call):
    """torch's format of 2016."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:") as tar:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            content = pickle.dumps(call, 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def in_numpy(call):
    file = io.BytesIO()
    np.save(file, np.array([call], dtype=object), allow_pickle=True)
    return file.getvalue()


def open_numpy(data):
    return np.load(io.BytesIO(data), allow_pickle=True)


def marks(folder):
    return list(folder.glob("mark*"))


def fall_for(folder):
    """How many payloads do what they are made for where somebody opens them."""
    fell, found = 0, zoo(folder / "mark")
    for _, data, opener in found:
        with contextlib.suppress(Exception):  # what comes out is no model; that it ran is enough
            opener(data)
        deadline = time.monotonic() + 10
        while not marks(folder) and time.monotonic() < deadline:  # some start a process and do not wait for it
            time.sleep(0.01)
        fell += bool(marks(folder))
        for mark in marks(folder):
            shutil.rmtree(mark) if mark.is_dir() and not mark.is_symlink() else mark.unlink()
    return fell, len(found)


if __name__ == "__main__":
    print(json.dumps(fall_for(Path(sys.argv[1]))))
