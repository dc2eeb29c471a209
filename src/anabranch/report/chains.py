# SPDX-License-Identifier: Apache-2.0
"""Chains of reasoning as they were written: a question, and under it every step in a colour of its own."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from anabranch.report.canvas import GAIN, HARM, INK, MUTED, RULE, SERIES, Canvas, canvas, text_width
from anabranch.report.page import Figure, Table

LINE, GAP, BAND = 24, 16, 4
MOST_WHO, MOST_STEP, MOST_TEXT = 28, 16, 96


class Told(NamedTuple):
    """What one model made of a question."""

    who: str
    texts: Mapping[str, str]
    """By step, in order; the answer last."""
    verdict: str
    good: bool


class Asked(NamedTuple):
    question: str
    note: str
    told: Sequence[Told]


def chain_figure(asked: Sequence[Asked], steps: Sequence[str], title: str) -> Figure:
    """One block a question; `steps` give the colours, in their order."""
    colors = {step: SERIES[number % len(SERIES)] for number, step in enumerate(steps)}
    every = [told for one in asked for told in one.told]
    who = text_width([told.who for told in every], most=MOST_WHO) + 18
    named = text_width(steps, most=MOST_STEP) + 22
    widest = text_width([text for told in every for text in told.texts.values()], most=MOST_TEXT)
    verdicts = text_width([told.verdict for told in every], most=40, bold=True)
    heads = text_width([f"{one.question}    {one.note}" for one in asked], size=13, most=110, bold=True)
    width = max(who + named + widest + 24 + verdicts, heads)
    height = sum(LINE + 6 + GAP + sum(max(1, len(told.texts)) * LINE for told in one.told) for one in asked)
    with canvas(width, height) as drawing:
        y = 0.0
        for one in asked:
            y = draw_question(drawing, one, y, (who, named, who + named + widest + 24), colors)
        picture = drawing.svg()
    rows = [
        [one.question, told.who, step, text, told.verdict]
        for one in asked
        for told in one.told
        for step, text in told.texts.items()
    ]
    said = "; ".join(
        f"{one.question}: " + ", ".join(f"{told.who} {told.verdict}" for told in one.told) for one in asked
    )
    return Figure(
        svg=picture,
        caption=title,
        alt=f"{title}. {said}.",
        table=Table(title, ["question", "model", "step", "text", "verdict"], rows),
        notes=["The band at the left of a line has the colour of its step."],
    )


def draw_question(
    drawing: Canvas, one: Asked, y: float, columns: tuple[float, float, float], colors: Mapping[str, str]
) -> float:  # fmt: skip
    """Returns where the next question begins."""
    who, named, verdict = columns
    drawing.text(0, y + LINE / 2, one.question, size=13, bold=True, most=80)
    drawing.text(drawing.width, y + LINE / 2, one.note, size=12, align="right", color=MUTED, most=40)
    y += LINE
    drawing.line([0, drawing.width], [y, y], RULE)
    y += 6
    for told in one.told:
        drawing.text(0, y + LINE / 2, told.who, color=MUTED, most=MOST_WHO)
        for step, text in told.texts.items():
            drawing.rectangle(who, y + 3, BAND, LINE - 6, colors.get(step, MUTED))
            drawing.text(who + BAND + 8, y + LINE / 2, step, size=11, color=colors.get(step, MUTED), most=MOST_STEP)
            drawing.text(who + named, y + LINE / 2, text, color=INK, most=MOST_TEXT)
            y += LINE
        if not told.texts:
            drawing.text(who + named, y + LINE / 2, "(nothing)", color=MUTED)
            y += LINE
        color = GAIN if told.good else HARM
        drawing.text(verdict, y - LINE / 2, told.verdict, bold=True, color=color, most=40)
    return y + GAP
