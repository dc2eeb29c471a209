# SPDX-License-Identifier: Apache-2.0
"""One process of the tuning of some experts: `python tuning_worker.py FOLDER`, with copies and with parts."""

import json
import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # which optimisers import: before the processes are forked, not in each
import torch.distributed.fsdp
from safetensors.torch import save_file

from anabranch.measure.experts.ranking.batches import Batch
from anabranch.models.mixtures.families import tiny
from anabranch.specialize.expert_tuning import Kept, Training, tune
from anabranch.train import sharded_checkpoint  # noqa: F401  likewise
from anabranch.train.processes import disconnect

EXPERTS = {"model.layers.0.mlp": [5], "model.layers.2.mlp": [0, 3, 6]}
CASES = {"Qwen2-MoE": torch.float32, "GptOss": torch.bfloat16}
"""Qwen2-MoE with its shared experts; GptOss with biases, in half precision."""
CONFIG = Training(steps=3, learning_rate=3e-3, max_grad_norm=0.5)


def batches(num=4, B=6, S=10):
    """Rows of very different lengths: the mean over tokens of a process is not that of all."""
    found = []
    for seed in range(num):
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 97, (B, S), generator=g)
        mask = (torch.arange(S) < torch.tensor([[S], [S], [S - 1], [4], [3], [2]])).long()
        found.append(Batch(ids, mask, torch.zeros_like(ids), torch.zeros(B, dtype=torch.int64)))
    return found


def tuned(family, sharding="none", folder=None):
    model = tiny(family).to(CASES[family])
    names = [name for name, _ in model.named_parameters()]
    kept = Kept(folder=folder, sharding=sharding, save_every=2)
    result = tune(model, EXPERTS, batches(), CONFIG, shared=family == "Qwen2-MoE", kept=kept)
    assert names == [name for name, _ in model.named_parameters()]
    return model, list(result.losses)


def main(folder):
    torch.set_num_threads(1)
    rank, losses = os.environ["RANK"], {}
    for family in CASES:
        for sharding in ("none", "full"):
            name = f"{family}.{sharding}"
            model, losses[name] = tuned(family, sharding, Path(folder) / f"run-{name}")
            if rank == "1":  # every process has the whole model again
                save_file({key: value.clone() for key, value in model.state_dict().items()}, Path(folder) / name)
    (Path(folder) / f"losses-{rank}.json").write_text(json.dumps(losses))
    disconnect()


if __name__ == "__main__":
    main(*sys.argv[1:])
