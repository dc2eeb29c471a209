# SPDX-License-Identifier: Apache-2.0
"""`anabranch report RUN`: the page of a run again, from its files alone, so that a stopped run has one too."""

from importlib import import_module
from pathlib import Path

from anabranch.errors import UsageError

KINDS = {
    "demos.json": ("demo_all_page", "write_demos_page"),
    "experts-demo.json": ("experts.demo_page", "write_experts_demo_page"),
    "sdr.json": ("transfer.sdr_page", "write_subnet_page"),
    "shown.safetensors": ("erase.demo_page", "write_erase_demo_page"),
    "align-demo.json": ("align.demo_page", "write_align_demo_page"),
    "demo.json": ("transfer.demo_page", "write_demo_page"),
    "models": ("transfer.measure_page", "write_transfer_page"),
    "base": ("transfer.pretrain_page", "write_pretrain_page"),
    "base-training": ("transfer.pretrain_page", "write_pretrain_page"),
    "metrics.jsonl": ("transfer.pretrain_page", "write_pretrain_page"),
    "training": ("training_page", "write_training_page"),
}
"""What tells whose run it is, and who writes its page; the first that is there."""


def write_page(run: Path) -> Path:
    """report.html of any run."""
    found = next((made_by for name, made_by in KINDS.items() if (run / name).exists()), None)
    if (run / "eval.json").exists():
        if not (run / "answers.jsonl").exists():
            raise UsageError(
                f"the page of {run} is made with its pictures, which are not kept",
                expected="a run whose page can be built again",
                received="a run of anabranch erase eval",
                hint=f"{run / 'report.html'} is complete; erase eval with another --out makes it anew",
            )
        found = "align.eval_page", "write_eval_page"
    if found is None:
        raise UsageError(
            f"{run} is not a run of anabranch", expected="a folder of one that trains, measures, evaluates or shows"
        )
    module, name = found
    page: Path = getattr(import_module(f"anabranch.jobs.{module}"), name)(run)  # matplotlib is loaded with it
    return page
