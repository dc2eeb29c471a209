# SPDX-License-Identifier: Apache-2.0
"""`anabranch align TOPIC`: a language model that reasons in steps, with one expert for each; one file a topic."""

from anabranch.cli.topics import run_topic

TOPICS = {
    "chain": "let the model write its own chains: analysis, guidance, answer, checked by itself",
    "train": "learn one expert a step, and one that all share, from chains",
    "chat": "ask, and see the answer or the whole chain",
    "generate": "answer a file of questions",
    "eval": "is it harmless, and still of use? base and experts side by side, with intervals",
    "export": "one plain LoRA a step, for engines that take an adapter a request",
}
PURPOSE = "align a language model by its own reasoning, with one expert a step"


def main(argv: list[str]) -> int:
    return run_topic("align", PURPOSE, TOPICS, argv)
