# SPDX-License-Identifier: Apache-2.0
"""Secrets in the environment or in a home folder are in nothing that a run writes or says."""

import os
import subprocess
import sys

import pytest

NAMES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "WANDB_API_KEY", "GITHUB_TOKEN",
    "DATABASE_PASSWORD", "SSH_PASSPHRASE", "MY_API_KEY",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.row("S10", cheap=True)
def test_planted_secrets_are_found_nowhere(tmp_path, counted):
    secrets = {name: f"sekret-{number}-{name.lower()}" for number, name in enumerate(NAMES)}
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    in_file = "sekret-9-in-a-file"
    (home / ".cache" / "huggingface" / "token").write_text(in_file)
    command = [sys.executable, "-m", "anabranch", "measure", "--sources", "patchwork:garments", "patchwork:digits"]
    command += ["--tasks", "patchwork:garments", "--steps", "4", "--seeds", "1", "--out", str(tmp_path / "run")]
    command += ["--set", "num_labels=20", "--set", "num_draws=1", "--set", "probe_points=1", "--set", "max_images=200"]
    command += ["--set", "warmup_steps=1", "--set", "workers=1"]
    done = subprocess.run(
        command, env={**os.environ, **secrets, "HOME": str(home)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    failed = subprocess.run(
        [*command, "--resume", "--preset", "nothing"], env={**os.environ, **secrets, "HOME": str(home)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert failed.returncode == 2
    (tmp_path / "control").write_text(repr({**os.environ, **secrets}) + in_file)  # what a dump of the state would hold
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 3
    texts = [path.read_bytes() for path in written] + [
        text.encode() for text in (done.stdout, done.stderr, failed.stderr)
    ]
    values = [value.encode() for value in (*secrets.values(), in_file)]
    found = sum(any(value in text for text in texts) for value in values)
    control = sum(value in (tmp_path / "control").read_bytes() for value in values)
    counted(
        len(values),
        found,
        control=(control, f"of {len(values)} are found by the same search in a dump of the environment"),
    )
