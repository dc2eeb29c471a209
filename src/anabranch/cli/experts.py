# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts TOPIC`: the experts of a trained mixture of a language model; one file a topic."""

from anabranch.cli.topics import run_topic

TOPICS = {
    "profile": "read labelled texts, and keep what every router and expert did, as sums",
    "rank": "which experts belong to a label? rankings with intervals, a random control, their overlap",
    "steer": "a recipe of what is done to the routing: experts off, on, stronger or weaker, by a method or by hand",
    "generate": "texts of the model as it is and as it is steered, or the steered model as a checkpoint",
    "tune": "let only the experts that a task uses learn it",
    "prune": "keep the experts that a task needs, in a stock checkpoint",
    "merge": "let experts that are alike share their weights, in a stock checkpoint",
    "families": "every family of models through every operation, as a table; or a model of yours",
}
PURPOSE = "read, steer, tune, prune and merge the experts of a trained mixture of experts"


def main(argv: list[str]) -> int:
    return run_topic("experts", PURPOSE, TOPICS, argv)
