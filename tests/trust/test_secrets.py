# SPDX-License-Identifier: Apache-2.0
"""Secrets in the environment or in a home folder are in nothing that a run writes or says."""

import os
import subprocess
import sys

import pytest

from anabranch.cli.options import read_yaml
from anabranch.errors import UsageError
from anabranch.train.run_folder import RunFolder

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
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 3
    texts = [path.read_bytes() for path in written] + [
        text.encode() for text in (done.stdout, done.stderr, failed.stderr)
    ]
    values = [value.encode() for value in (*secrets.values(), in_file)]
    found = sum(any(value in text for text in texts) for value in values)
    counted(len(values), found)


@pytest.mark.row("S10")
def test_settings_that_name_a_secret_do_not_fetch_it(tmp_path, monkeypatch, counted):
    """A run writes its settings down: a reader that fills in the environment would make it write the secrets too."""
    secrets = {name: f"sekret-{name.lower()}" for name in NAMES}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    lines = [f"{kind}_{name}: '{told}'" for name in NAMES for kind, told in (("a", f"${name}"), ("b", f"${{{name}}}"))]
    file = tmp_path / "settings.yaml"
    file.write_text("\n".join(lines), encoding="utf-8")

    def leaked(run):
        RunFolder.open(run, read_yaml(file)).close()
        written = "".join(path.read_text() for path in run.rglob("*") if path.is_file())
        return sum(value in written for value in secrets.values())

    found = leaked(tmp_path / "run")
    tags = [f"a: !{tag} HF_TOKEN\n" for tag in ("env", "ENV", "!python/object/apply:os.getenv [HF_TOKEN] #")]
    for text in tags:
        (tmp_path / "tag.yaml").write_text(text)
        with pytest.raises(UsageError):
            read_yaml(tmp_path / "tag.yaml")
    file.write_text(os.path.expandvars(file.read_text(encoding="utf-8")), encoding="utf-8")
    control = leaked(tmp_path / "filled-in")
    words = f"of {len(NAMES)} are in the run's own files where settings are filled in from the environment"
    counted(len(lines) + len(tags), found, control=(control, words), least=len(NAMES))
