# SPDX-License-Identifier: Apache-2.0
"""Small files that ask for much are refused before they get it: memory and time are looked at in a child process."""

import hashlib
import json
import os
import resource
import signal
import struct
import zlib

import pytest
import yaml

from anabranch.cli.options import read_yaml
from anabranch.data.decode import UNREADABLE, decode, read_header
from anabranch.errors import AnabranchError
from anabranch.suppress.detectors.template import read_template
from anabranch.train.checkpoint import load_checkpoint
from tests.data.test_decode import bomb

MEGABYTES, SECONDS = 200, 3
LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))


def riff(width, height):
    """A WebP whose header declares a canvas, with nothing behind it."""
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size
    return b"RIFF" + struct.pack("<I", len(body)) + body


def header(text, claimed=None):
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text


def tensor(shape, offsets):
    return header(json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode())


def in_run(data, name="model.safetensors"):
    def write(folder):
        step = folder / "checkpoints" / "step-000001"
        step.mkdir(parents=True)
        (step / name).write_bytes(data)
        if name != "manifest.json":
            entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            (step / "manifest.json").write_text(json.dumps({"format": 1, "files": {name: entry}}))
        return folder

    return write


def in_file(data, name):
    def write(folder):
        (folder / name).write_bytes(data)
        return folder / name

    return write


def unguarded_yaml(path):
    def size(node):
        return sum(map(size, node)) if isinstance(node, list) else 1

    return [size(node) for node in yaml.safe_load(path.read_text()).values()]


BOMBS = {
    "400 million pixels": (in_file(bomb(20_000, 20_000), "x.png"), lambda path: decode(path, 28, 3), None),
    "their header": (in_file(bomb(20_000, 20_000), "x.png"), read_header, None),
    "a mark of 64 million": (in_file(bomb(8_000, 8_000), "x.png"), read_template, None),
    "WebP": (in_file(riff(16_384, 16_384), "x.webp"), lambda path: decode(path, 28, 3), None),
    "zip as a picture": (in_file(b"PK\x03\x04" + zlib.compress(bytes(10**8)), "x.png"), read_header, None),
    "YAML aliases": (in_file(LAUGHS.encode(), "x.yaml"), read_yaml, unguarded_yaml),
    "YAML depth": (in_file(b"a: " + b"[" * 200_000, "x.yaml"), read_yaml, None),
    "YAML size": (in_file(b"a: 1\n" * 300_000, "x.yaml"), read_yaml, None),
    "JSON depth": (in_run(b"[" * 10**6, "manifest.json"), load_checkpoint, None),
    "JSON size": (in_run(b" " * (17 * 2**20), "manifest.json"), load_checkpoint, None),
    "header of 1 GB": (in_run(header(b"{}", 2**30)), load_checkpoint, None),
    "shape overflow": (in_run(tensor([2**62, 8], [0, 4])), load_checkpoint, None),
    "data far away": (in_run(tensor([2**40], [0, 2**42])), load_checkpoint, None),
}


def in_child(job, path):
    """(harmless, megabytes, seconds): how a child ends that opens the file, and what it took."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        code = 1
        try:
            job(path)
        except (AnabranchError, *UNREADABLE):
            code = 0
        finally:
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss / 1024, usage.ru_utime


def excess(job, path):
    _, base, _ = in_child(lambda path: None, path)
    code, peak, seconds = in_child(job, path)
    return code, peak - base, seconds


@pytest.mark.row("S5")
def test_bombs_are_refused_in_little_memory(tmp_path, counted):
    wrong, blown, tried = [], 0, 0
    for name, (write, guarded, unguarded) in BOMBS.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        path = write(folder)
        code, megabytes, _ = excess(guarded, path)
        wrong += [f"{name}: {code}, {megabytes:.0f} MB"] if code or megabytes > MEGABYTES else []
        if unguarded is not None:
            tried += 1
            code, megabytes, seconds = excess(unguarded, path)
            blown += code == -signal.SIGXCPU or code == -signal.SIGKILL or megabytes > MEGABYTES or seconds > 2
    assert wrong == []
    words = f"of {tried} take more than {MEGABYTES} MB or 2 s unguarded"
    counted(len(BOMBS), len(wrong), control=(blown, words), least=tried)
