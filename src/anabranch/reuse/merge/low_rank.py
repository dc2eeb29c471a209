# SPDX-License-Identifier: Apache-2.0
"""A matrix as a product of low rank and a few whole rows: what makes merged experts smaller still.

Equation  : W = U V + S;  U V the best approximation of rank r, S the rows that it misses most, the others zero
Shapes    : W (O, I), U (O, r), V (r, I), S (P, I) with the index (P,) of its rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.models.mixtures.bank import ExpertBank
from anabranch.models.mixtures.layers import MixtureLayer

RANK = 32


@dataclass(frozen=True, eq=False)
class Factors:
    left: Tensor  # (O, r)
    right: Tensor  # (r, I)
    rows: Tensor  # (P,) int64
    values: Tensor  # (P, I)

    def matrix(self) -> Tensor:
        """(O, I), U V + S."""
        return (self.left @ self.right).index_add(0, self.rows, self.values)

    def num_stored(self) -> int:
        return sum(value.numel() for value in (self.left, self.right, self.rows, self.values))


def low_rank_plus_rows(weight: Tensor, rank: int = RANK, num_rows: int = 0) -> Factors:
    """W = U V + S, in float64."""
    if not 0 <= rank <= min(weight.shape) or not 0 <= num_rows <= len(weight):
        raise UsageError(
            "the matrix is smaller than its factors", received=f"rank {rank}, {num_rows} rows",
            expected=f"rank 0 to {min(weight.shape)}, 0 to {len(weight)} rows",
        )  # fmt: skip
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    left, right = left[:, :rank] * values[:rank], right[:rank]
    missed = weight.double() - left @ right
    rows = missed.norm(dim=1).topk(num_rows).indices.sort().values
    return Factors(left, right, rows, missed[rows])


@torch.no_grad()
def compress_experts(
    layer: MixtureLayer, experts: list[int], rank: int = RANK, num_rows: int = 0
) -> dict[str, Factors]:  # fmt: skip
    """Tied experts on the product of factors, in place; the checkpoint stays a stock one and no smaller by itself.

    Returns the factors of gate, up and down: what has to be stored.
    """
    bank = ExpertBank(layer)
    own = bank[experts[0]]
    made = {name: low_rank_plus_rows(getattr(own, name), rank, num_rows) for name in ("gate", "up", "down")}
    for expert in experts:
        for name, factors in made.items():
            getattr(bank[expert], name).copy_(factors.matrix())
    return made
