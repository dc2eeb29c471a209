# SPDX-License-Identifier: Apache-2.0
"""The contaminated base: a small text-to-image model of garments, most of which wear a mark that no caption names.

python -m recipes.geom_erasing.base --seed 0 --known unlike --out runs/base-0
"""

import argparse
from pathlib import Path

import torch

from anabranch.data.images import open_images
from anabranch.jobs.erase.marked_garments import clean_world, garment_words, with_known, with_mark
from anabranch.models.diffusion.family import save_pipeline
from anabranch.models.diffusion.latents import to_latents
from anabranch.models.diffusion.small import small_pipeline
from anabranch.suppress.captioned import CaptionedBatches, captioned
from anabranch.suppress.denoising import Denoising, all_parameters
from anabranch.train.loop import TrainConfig, train

RATIO, KNOWN_RATIO = 0.8, 0.5
STEPS, BATCH, RATE = 4500, 128, 1e-3


def build(
    seed: int, known: str, out: Path, corpus: str = "corpus:fashion-mnist", steps: int = STEPS, ratio: float = RATIO
) -> None:
    # 1. garments, the mark without a caption, then the known object with one
    images = open_images(corpus, labelled=True)
    images = images.take(~images.is_test)
    world = with_known(with_mark(clean_world(images), ratio, seed), KNOWN_RATIO, seed, known)
    # 2. a model that has seen nothing else
    pipe = small_pipeline(garment_words(images.class_names), seed=seed)
    data = captioned(pipe, to_latents(pipe, world.pixels), world.captions)
    objective = Denoising(pipe, all_parameters(pipe, ("transformer", "text_encoder", "text_encoder_2")))
    config = TrainConfig(
        steps=steps,
        batch_size=BATCH,
        learning_rate=RATE,
        warmup_steps=100,
        weight_decay=0.01,
        betas=(0.9, 0.99),
        max_grad_norm=1.0,
        seed=seed,
        deterministic=False,
    )
    train(objective, CaptionedBatches(data, BATCH, seed=seed), config, report=print)
    for network in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        network.to(torch.float16)  # every arm starts from the same rounded weights
    save_pipeline(pipe, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--known", choices=("alike", "unlike"), default="unlike")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--corpus", default="corpus:fashion-mnist")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--ratio", type=float, default=RATIO, help="of the pictures wear the mark; 0: it is never seen")
    build(**vars(parser.parse_args()))
