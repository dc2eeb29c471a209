# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that earlier versions wrote are read as they were written, by every later one.

python -m tests.trust.test_golden 0.1.0        # writes the one of this version, once
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from anabranch.errors import AnabranchError
from anabranch.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden"


def content():
    """A function of nothing, so that no file has to say what is right."""
    weight = torch.arange(24.0).reshape(4, 6) / 7
    model = {"weight": weight, "half": weight.to(torch.bfloat16), "count": torch.tensor(7), "none": torch.empty(0, 3)}
    moments = {"exp_avg/weight": weight**2, "step/weight": torch.tensor(12.0)}
    config = {"steps": 12, "learning_rate": 1e-3, "betas": [0.9, 0.95]}
    return Checkpoint(step=12, model=model, optimizer=moments, config=config, extra={"window": {"loss": [1.5, 3]}})


def refused(run):
    try:
        load_checkpoint(run)
    except AnabranchError:
        return True
    return False


@pytest.mark.row("R10")
def test_checkpoints_of_every_version_are_read_to_the_bit(tmp_path, counted):
    versions = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
    assert "0.1.0" in versions
    expected = content()
    for version in versions:
        found = load_checkpoint(GOLDEN / version).checkpoint
        for kind in ("model", "optimizer"):
            ours, theirs = getattr(expected, kind), getattr(found, kind)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
        assert (found.step, found.config, found.extra) == (12, expected.config, expected.extra)
    shutil.copytree(GOLDEN / "0.1.0", tmp_path / "later")
    state = tmp_path / "later" / "checkpoints" / "step-000012" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"step": 13}))
    counted(len(versions), control=(int(refused(tmp_path / "later")), "altered one is refused"))


if __name__ == "__main__":
    save_checkpoint(GOLDEN / sys.argv[1], content())
