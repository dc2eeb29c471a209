# SPDX-License-Identifier: Apache-2.0
"""MoCE and SDR side by side, each beside the plain model of its own family: writes docs/comparison.md.

python -m recipes.comparison           # runs both recipes' four domains first, where they have not run
python -m recipes.comparison --tiny    # a smoke run that prints and writes nothing
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.jobs.transfer.recipe_table import cell, matrix_rows, table
from anabranch.models import resnet, vit_mae
from recipes.moce import recipe as moce
from recipes.sdr import recipe as sdr

PAGE = Path("docs/comparison.md")
START = "<!-- below: written by recipes/comparison.py -->"
FLOOR = {"random-init": "before anything was learned: the floor"}
FAIR = {"continued": "the shared model, trained on: the fair baseline"}


@dataclass(frozen=True)
class Family:
    title: str
    method: str
    arms: dict[str, str]
    size: Callable[[], tuple[int, int]]
    """Parameters and multiply-accumulates of a model that is handed over."""
    cost: Callable[[dict[str, Any], str], list[str]]
    """Steps and images in all, images that the handed-over model has seen, processor seconds of the second stage."""


def moce_size() -> tuple[int, int]:
    model = vit_mae.build("tiny", image_size=28, channels=1, seed=0)
    return sum(p.numel() for p in vit_mae.to_plain(model).parameters()), vit_mae.macs(model)


def moce_cost(result: dict[str, Any], arm: str) -> list[str]:
    if arm == "random-init":
        return ["0", "0", "0", ""]
    steps, batch, seconds = result["steps"], result["batch_size"], result["arm_seconds"].get(arm)
    divided = arm.split()[0] in ("separate", "oracle", "moce", "random-clusters")
    own = steps * batch + steps * batch // (result["num_experts"] if divided else 1)
    return [f"{2 * steps:,}", f"{2 * steps * batch:,}", f"{own:,}", "" if seconds is None else f"{seconds:.0f}"]


def sdr_size() -> tuple[int, int]:
    model = resnet.build("narrow", image_size=28, channels=1, seed=0)
    return sum(p.numel() for p in model.parameters()), resnet.macs(model)


def sdr_cost(result: dict[str, Any], arm: str) -> list[str]:
    spent = result["accounts"][arm.split()[0]]
    seconds = f"{result['arm_seconds'][arm]:.0f}" if arm in result["arm_seconds"] else ""
    return [*(f"{spent[key]:,.0f}" for key in ("total_steps", "images_seen", "images_seen_by_path")), seconds]


MOCE = Family(
    "MoCE: a ViT by masked autoencoding",
    "moce",
    FAIR
    | {
        "moce": "experts of clusters, those that the task's images vote for",
        "moce wrong": "experts that the task did not pick",
        "random-clusters": "experts of groups without meaning",
        "oracle": "experts of the true domains",
        "separate": "one model a true domain, nothing shared",
    }
    | FLOOR,
    moce_size,
    moce_cost,
)
SDR = Family(
    "SDR: a ResNet by SimSiam",
    "sdr",
    FAIR
    | {
        "by-cluster": "the same, every batch from one cluster: no sub-nets, but their batches",
        "multi-crop": "the same with two small crops beside the views, at twice the cost",
        "sdr": "sub-nets of clusters, the one that the task's images vote for",
        "sdr by neighbours": "the same or the shared model beside them, chosen with as many labels as the probe has",
        "sdr wrong": "sub-nets that other tasks picked",
        "sdr-16": "sixteen sub-nets of smaller clusters",
        "sdr-random": "sub-nets of random images",
        "separate": "one model a cluster, nothing shared",
        "oracle": "one model a true domain, nothing shared",
    }
    | FLOOR,
    sdr_size,
    sdr_cost,
)


def main(tiny: bool) -> None:
    runs = [(MOCE, *moce.run("pair" if tiny else "four", tiny)), (SDR, *sdr.run(tiny))]
    text = "\n\n".join(part for run in runs for part in parts(*run))
    if tiny:
        print(text)
        return
    before = PAGE.read_text(encoding="utf-8").partition(START)[0]
    PAGE.write_text(f"{before}{START}\n\n{text}\n", encoding="utf-8")


def parts(family: Family, transfer: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """The arms of one family, the controls of its method, and where the method lands in the transfer matrix."""
    tasks, (parameters, macs) = result["tasks"], family.size()
    chosen = result["levels"][family.method]["tasks"]
    landed = [[name, *row] for name, row in matrix_rows(transfer)]
    landed.append([f"all, then {family.method}: the task's choice", *(f"{chosen[t]['mean']:.1f}" for t in tasks)])
    controls = [e for e in result["effects"] if e["left"] == family.method and e["right"] != "continued"]
    return [
        f"## {family.title}",
        f"{len(result['seeds'])} seeds, {result.get('base_steps', result['steps'])} + {result['steps']} steps of "
        f"{result['batch_size']} images for every arm. A model that is handed over has {parameters:,} parameters and "
        f"{macs:,} multiply-accumulates an image, whichever arm it is from. "
        f"Linear probe with {result['num_labels']} labels, percent; 95 % t-intervals over seeds, paired.",
        arms_table(family, result),
        table(
            ["difference", "arms", "mean over tasks", "verdict"],
            [[e["name"], f"{e['left']} - {e['right']}", cell(e), e["verdict"]] for e in controls],
        ),
        f"Where {family.method} lands in the transfer matrix; the other rows are models of the first stage alone:",
        table(["learned from", *tasks], landed),
    ]


def arms_table(family: Family, result: dict[str, Any]) -> str:
    tasks, rows = result["tasks"], []
    over = {e["left"]: f"{cell(e)} {e['verdict']}" for e in result["effects"] if e["right"] == "continued"}
    for arm, words in family.arms.items():
        if (level := result["levels"].get(arm)) is not None:
            accuracy = [f"{found['mean']:.1f}" for found in (level["mean"], *(level["tasks"][t] for t in tasks))]
            rows.append([arm, words, *accuracy, over.get(arm, ""), *family.cost(result, arm)])
    cost = ["steps", "images", "images of the model", "seconds"]
    return table(["arm", "what it is", "mean", *tasks, "minus continued", *cost], rows)


if __name__ == "__main__":
    main("--tiny" in sys.argv[1:])
