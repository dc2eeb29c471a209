# SPDX-License-Identifier: Apache-2.0
"""When do the steps hurt each other, and when does it stop? Transfer between steps along one training on PolicyWorld.

    python -m recipes.mote.interference --seeds 0 1 2 3 4 --out runs/mote/interference.jsonl
    python -m recipes.mote.interference --out runs/mote/interference.jsonl --table

A line a model and moment: by how much (per cent) a step of length .1 along the gradient of one reasoning step's loss
lowers the loss of each; held-out questions, the step is learnt on half of them and asked of the other half.
"""

import argparse
from pathlib import Path

import torch

from anabranch.jobs.align.policy_arms import ARMS, Bench, Trained, measure, train_arm
from anabranch.measure.intervals import interval
from anabranch.specialize.mote.collate import StepSpanCollator
from anabranch.specialize.mote.interference import step_transfer
from anabranch.specialize.mote.mote import MoTE
from recipes.rows import read, write

MOMENTS = (50, 100, 300, 700, 1400, 2000)
WATCHED = ("MoTE", "LoRA, equal total")
RATES = {"MoTE": 0.02, "LoRA, equal total": 0.01}
"""Those that were best at 2,000 steps on seeds of their own."""


def main(seeds: list[int], out: Path, table: bool) -> None:
    torch.set_num_threads(1)
    if table:
        show(out)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["arm"], row["seed"]) for row in read(out) if row["step"] == MOMENTS[-1]}
    for seed in seeds:
        for name in WATCHED:
            if (name, seed) not in done:
                watch(Bench(seed=seed, steps=MOMENTS[-1]), name, out)


def watch(bench: Bench, name: str, out: Path) -> None:
    def look(mote: MoTE, step: int) -> None:
        if step not in MOMENTS:
            return
        rows = bench.rows(mote, bench.questions[1])
        collate = StepSpanCollator(mote.tokens, mote.tokenizer.pad_token_id, question=None)
        mote.eval()
        gains = 100 * step_transfer(mote, collate(rows[::2]), collate(rows[1::2]))
        exact = measure(bench, Trained(mote=mote, losses=[]))["exact"]
        mote.train()
        row = {"arm": name, "seed": bench.seed, "step": step, "transfer": gains.tolist(), "exact": exact}
        write(out, [row], append=True)
        print(
            name, bench.seed, step, f"{100 * exact:.1f}", [[round(v, 1) for v in r] for r in gains.tolist()], flush=True
        )

    train_arm(bench, ARMS[name], learning_rate=RATES[name], watch=look)


def show(file: Path) -> None:
    """Mean gain on the own step and on the others, by moment, with 95 % t-intervals over seeds."""
    rows = list({(row["arm"], row["seed"], row["step"]): row for row in read(file)}.values())
    heads = ("steps", "model", "exact answers, %", "own step, %", "other steps, %", "lowest of six pairs, %")
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    for step in MOMENTS:
        for name in WATCHED:
            found = [row for row in rows if (row["arm"], row["step"]) == (name, step)]
            gains = torch.tensor([row["transfer"] for row in found])
            own = gains.diagonal(dim1=1, dim2=2).mean(1)
            others = (gains.sum((1, 2)) - gains.diagonal(dim1=1, dim2=2).sum(1)) / 6
            worst = (gains + 1e9 * torch.eye(3)).flatten(1).min(1).values
            cells = [
                told([100 * row["exact"] for row in found], ""),
                *(told(v.tolist(), "+") for v in (own, others, worst)),
            ]
            print(f"| {step} | {name} | " + " | ".join(cells) + " |")


def told(values: list[float], sign: str) -> str:
    found = interval(values)
    return f"{found.mean:{sign}.1f} [{found.low:{sign}.1f}, {found.high:{sign}.1f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/mote/interference.jsonl"))
    parser.add_argument("--table", action="store_true")
    main(**vars(parser.parse_args()))
