# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase TOPIC`: from images that contain a concept to a model that no longer draws it; one file a topic."""

from anabranch.cli.topics import run_topic

TOPICS = {
    "scan": "find the concept: which images of a folder contain it, and where",
    "train": "learn its name and its places as tokens, from a checkpoint and the labels of a scan",
    "sample": "draw images with the concept as learned negative prompt",
    "eval": "count how often it is still drawn, with intervals, and what that cost",
    "bake": "put the negative prompt into the weights, for models that take none",
}
PURPOSE = "take out of a diffusion model what it draws unasked: watermarks, QR codes, overlaid text, a logo"


def main(argv: list[str]) -> int:
    return run_topic("erase", PURPOSE, TOPICS, argv)
