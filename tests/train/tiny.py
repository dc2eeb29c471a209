# SPDX-License-Identifier: Apache-2.0
"""A model and a stream small enough to train many times, yet with everything that a resume can get wrong."""

import torch
from torch import nn


class TinyObjective(nn.Module):
    """Regression with dropout, batch statistics, a counter, a frozen weight and a weight that no step uses."""

    def __init__(self, *, dropout=0.3, batch_norm=True):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            self.inner = nn.Linear(6, 16)
            self.outer = nn.Linear(16, 3)
            self.unused = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(16) if batch_norm else nn.LayerNorm(16)
        self.dropout = nn.Dropout(dropout)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("rows_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, batch):
        if self.training:
            self.rows_seen += len(batch["x"])
        hidden = self.dropout(self.norm(self.inner(batch["x"])).relu())
        error = self.outer(hidden) * self.frozen - batch["y"]
        return {"loss": error.square().mean(), "hidden_mean": hidden.mean()}


class TinyStream:
    def __init__(self, batch_size=8, seed=5):
        self.batch_size, self.seed = batch_size, seed

    def batch(self, step):
        generator = torch.Generator().manual_seed(self.seed * 100_003 + step)
        x = torch.randn(self.batch_size, 6, generator=generator)
        return {"x": x, "y": x[:, :3] * 2 - x[:, 3:]}
