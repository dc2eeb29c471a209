# SPDX-License-Identifier: Apache-2.0
"""Everything that recipes/experts/README.md shows, in one command: python -m recipes.experts (two hours; goes on).

Trains the three small mixtures, compares every method on two of them, and prints the tables.
"""

from pathlib import Path

from recipes.experts import compare, rest, train
from recipes.rows import read

OUT = Path("runs/experts")

if __name__ == "__main__":
    train.main(OUT, list(train.MODELS), train.STEPS)
    compare.main(OUT, OUT / "compare.jsonl")
    rest.main(OUT, OUT / "rest.jsonl", list(rest.PARTS))
    compare.table(read(OUT / "compare.jsonl"))
    rest.table(read(OUT / "rest.jsonl"))
