# SPDX-License-Identifier: Apache-2.0
"""`anabranch align TOPIC`: a language model that reasons in steps, with one expert for each; one file a topic."""

from importlib import import_module

from anabranch.errors import DONE, UsageError, did_you_mean

TOPICS = {
    "chain": "let the model write its own chains: analysis, guidance, answer, checked by itself",
    "train": "learn one expert a step, and one that all share, from chains",
    "chat": "ask, and see the answer or the whole chain",
    "generate": "answer a file of questions",
    "eval": "is it harmless, and still of use? base and experts side by side, with intervals",
    "export": "one plain LoRA a step, for engines that take an adapter a request",
}


def usage() -> str:
    width = max(map(len, TOPICS))
    rows = "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in TOPICS.items())
    return (
        "align a language model by its own reasoning, with one expert a step\n\n"
        f"usage: anabranch align TOPIC [OPTIONS]\n\n{rows}\n\n"
        "  anabranch align TOPIC --help   the options of a topic\n"
    )


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return DONE
    if argv[0] not in TOPICS:
        raise UsageError(f"anabranch align has no topic {argv[0]!r}", hint=did_you_mean(argv[0], TOPICS))
    code: int = import_module(f"anabranch.cli.align_{argv[0]}").main(argv[1:])
    return code
