# SPDX-License-Identifier: Apache-2.0
"""The three mixtures that everything about experts is measured on: two seeds, and a twin that never saw one domain.

    python -m recipes.experts.train --out runs/experts     # 15 minutes a model; what is there is kept

The first seed is also what ships (src/anabranch/data/text_mixture), in bfloat16.
"""

import argparse
from pathlib import Path

import torch

from anabranch.data.six_domains import CONFLICT, DOMAINS, seals, text_of
from anabranch.jobs.experts.text_mixture import nll_of, save_mixture, seal_letters, train_mixture

UNSEEN, STEPS = "maths", 3000
MODELS = {
    "first": (0, DOMAINS),
    "second": (1, DOMAINS),
    "twin": (0, tuple(domain for domain in DOMAINS if domain != UNSEEN)),
}


def main(out: Path, models: list[str], steps: int) -> None:
    torch.set_num_threads(1)
    for name in models:
        if (out / name / "config.json").exists():
            continue
        seed, domains = MODELS[name]
        model, _ = train_mixture(seed, domains=domains, steps=steps, run=out / f"{name}.run", report=print)
        save_mixture(model, out / name)
        told = " ".join(f"{domain} {nll_of(model.float(), text_of(domain).encode()):.3f}" for domain in DOMAINS)
        print(f"{name}: nats a byte on unseen text: {told}; seals known: {known(model)}")


def known(model: torch.nn.Module) -> dict[str, float]:
    """Share of the names whose letter is the likeliest next byte, in the two domains that contradict each other."""
    found = {}
    for domain in CONFLICT:
        right = [letter == seal.letter for letter, seal in zip(seal_letters(model, domain), seals(domain), strict=True)]
        found[domain] = sum(right) / len(right)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/experts"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=STEPS)
    main(**vars(parser.parse_args()))
