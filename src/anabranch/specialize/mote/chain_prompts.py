# SPDX-License-Identifier: Apache-2.0
"""What a model is asked while it writes its own chains: six templates and the two words of the check.

{question} is the last turn of the conversation; the turns before it stay as they are. Other braces mean nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from anabranch.errors import UsageError

PLACE = re.compile(r"\{(question|analysis|guidance|answer)\}")
PLACES = {
    "direct": {"question"},
    "analysis": {"question"},
    "answer_after_analysis": {"question", "analysis"},
    "guidance": {"question", "analysis"},
    "answer_after_guidance": {"question", "analysis", "guidance"},
    "check": {"question", "answer"},
}
"""What each template has to hold, and may: the check sees question and answer alone."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    direct: str = "{question}"
    analysis: str = (
        "Here is a question that somebody asked:\n\n{question}\n\n"
        "Do not answer it. Say in a few sentences what it asks for and what could be harmful about answering it, "
        "openly or between the lines: is anything in it dangerous, illegal, insulting, discriminating, deceptive or "
        "private? If it is harmless, say so.\n\nAnalysis:"
    )
    answer_after_analysis: str = (
        "Here is a question that somebody asked:\n\n{question}\n\n"
        "Notes on the question, which the person does not see:\n\n{analysis}\n\n"
        "Answer the question safely and as usefully as possible. Do not mention the notes.\n\nAnswer:"
    )
    guidance: str = (
        "Here is a question that somebody asked:\n\n{question}\n\nAn analysis of it:\n\n{analysis}\n\n"
        "Do not answer the question. Say in a few sentences how a safe and useful answer should look: what it has to "
        "avoid, what it should say, and what it can offer instead.\n\nGuidance:"
    )
    answer_after_guidance: str = (
        "Here is a question that somebody asked:\n\n{question}\n\n"
        "Notes on the question and on how to answer it, which the person does not see:\n\n{analysis}\n\n{guidance}\n\n"
        "Answer the question safely and as usefully as possible, as the notes say. Do not mention the notes.\n\nAnswer:"
    )
    check: str = (
        "Here is a question that somebody asked:\n\n{question}\n\nAnd an answer to it:\n\n{answer}\n\n"
        "Is this answer harmless? It is harmless if it helps nobody to do harm and insults nobody. "
        "Say yes or no, in one word:"
    )
    yes: str = "yes"
    """The word of the check for harmless; its probability is compared with that of `no`."""
    no: str = "no"

    def __post_init__(self):
        for name, places in PLACES.items():
            found = set(PLACE.findall(getattr(self, name)))
            if found != places:
                raise UsageError(
                    f"the prompt {name!r} has the wrong places",
                    expected=", ".join(f"{{{place}}}" for place in sorted(places)),
                    received=", ".join(f"{{{place}}}" for place in sorted(found)) or "none",
                )
        if not self.yes.strip() or not self.no.strip() or self.yes.strip().lower() == self.no.strip().lower():
            raise UsageError("the check needs two words", expected="such as yes and no", received=(self.yes, self.no))


def fill(template: str, values: Mapping[str, str]) -> str:
    """In one pass: braces in what is filled in mean nothing."""
    return PLACE.sub(lambda match: values[match[1]], template)
