# SPDX-License-Identifier: Apache-2.0
"""`anabranch erase TOPIC`: from images that contain a concept to a model that no longer draws it; one file a topic."""

from importlib import import_module

from anabranch.errors import DONE, UsageError, did_you_mean

TOPICS = {
    "scan": "find the concept: which images of a folder contain it, and where",
    "train": "learn its name and its places as tokens, from a checkpoint and the labels of a scan",
    "sample": "draw images with the concept as learned negative prompt",
    "eval": "count how often it is still drawn, with intervals, and what that cost",
    "bake": "put the negative prompt into the weights, for models that take none",
}


def usage() -> str:
    width = max(map(len, TOPICS))
    rows = "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in TOPICS.items())
    return (
        "take out of a diffusion model what it draws unasked: watermarks, QR codes, overlaid text, a logo\n\n"
        f"usage: anabranch erase TOPIC [OPTIONS]\n\n{rows}\n\n"
        "  anabranch erase TOPIC --help   the options of a topic\n"
    )


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return DONE
    if argv[0] not in TOPICS:
        raise UsageError(f"anabranch erase has no topic {argv[0]!r}", hint=did_you_mean(argv[0], TOPICS))
    code: int = import_module(f"anabranch.cli.erase_{argv[0]}").main(argv[1:])
    return code
