# SPDX-License-Identifier: Apache-2.0
"""The figures of the layer, as SVG: `python docs/figures/draw.py` writes them beside itself.

Numbers in them are computed by the layer. Colours are classes of docs/_static/figures.css, which goes into every file.
"""

from html import escape
from pathlib import Path

import torch

from anabranch.mixture import Router, TopK, renormalised
from anabranch.mixture.routing import Adjust

FOLDER = Path(__file__).parent
STYLE = FOLDER.parent / "_static" / "figures.css"
EXPERTS = 4
HEAD = '<path class="head" d="M0 0L-9 -5L-9 5Z" transform="translate({x} {y}) rotate({turn})"/>'


def svg(width: int, height: int, title: str, *parts: str) -> str:
    style = STYLE.read_text(encoding="utf-8").rstrip()
    return (
        f'<svg class="anabranch-figure" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}\n</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def text(x: float, y: float, said: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(said)}</text>'


def box(x: float, y: float, width: float, height: float, *said: str, kind: str = "box", words: str = "") -> str:
    """A box with one or more lines in its middle."""
    middle = y + height / 2 - 9.5 * (len(said) - 1)
    lines = [text(x + width / 2, middle + 19 * i, one, words) for i, one in enumerate(said)]
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" class="{kind}"/>' + "".join(lines)


def expert(x: float, y: float, width: float, height: float, number: int, said: str | None = None) -> str:
    return box(x, y, width, height, f"expert {number}" if said is None else said, kind=f"e{number}", words="on")


def arrow(*points: tuple[float, float]) -> str:
    (x0, y0), (x1, y1) = points[-2:]
    turn = 0 if x1 > x0 else 180 if x1 < x0 else 90 if y1 > y0 else -90
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path class="arrow" d="{path}"/>' + HEAD.format(x=f"{x1:g}", y=f"{y1:g}", turn=turn)


def curve(x0: float, y0: float, x1: float, y1: float) -> str:
    middle = (x0 + x1) / 2
    return f'<path class="arrow" d="M{x0:g} {y0:g}C{middle:g} {y0:g} {middle:g} {y1:g} {x1:g} {y1:g}"/>'


# The figures ----------------------------------------------------------------------------------------------------------


def layer() -> str:
    """Where the river branches and rejoins."""
    parts = [
        box(250, 14, 220, 44, "Context", "what a sample belongs to", words="small"),
        arrow((360, 58), (360, 86)),
        box(130, 88, 460, 54, "Router", "score → adjust → select → weigh", words="small"),
        arrow((360, 142), (360, 166)),
        box(250, 168, 220, 44, "Routing", "which experts, how much", words="small"),
        box(14, 286, 92, 56, "hidden", "states", words="small"),
        arrow((60, 286), (60, 115), (130, 115)),
        text(95, 102, "scores", "quiet"),
        arrow((106, 314), (176, 314)),
        box(178, 286, 84, 56, "dispatch", words="small"),
        arrow((360, 212), (360, 232), (220, 232), (220, 286)),
        arrow((360, 212), (360, 232), (540, 232), (540, 286)),
        box(498, 286, 84, 56, "combine", words="small"),
        arrow((582, 314), (624, 314)),
        box(626, 286, 80, 56, "y", words="strong"),
        text(220, 222, "where to", "quiet"),
        text(540, 222, "weights", "quiet"),
        text(360, 398, "ExpertBank", "small strong"),
    ]
    for i in range(EXPERTS):
        y = 247 + 35 * i
        parts += [curve(262, 314, 318, y + 14), expert(318, y, 104, 28, i), curve(422, y + 14, 498, 314)]
    return svg(720, 414, "A mixture layer: context, router, routing, dispatch, bank of experts, combine", *parts)


class Favour(Adjust):
    """A constant for each expert that counts in what is selected, as a balancing bias does."""

    reweighs = False

    def __init__(self, bias: torch.Tensor):
        super().__init__()
        self.bias = bias

    def forward(self, router_logits: torch.Tensor, draw: object) -> torch.Tensor:
        return self.bias


class Given(torch.nn.Module):
    per, num_experts = "token", EXPERTS


def stages() -> str:
    """One token through the four slots, with the numbers that the router gives."""
    logits, bias = torch.tensor([1.6, 0.4, 1.1, -0.6]), torch.tensor([0.0, 1.2, 0.0, 0.3])
    router = Router(Given(), adjust=[Favour(bias)], select=TopK(2), weigh=renormalised)
    routing = router.eval().decide(logits[None], None)
    chosen = routing.selected_experts[0].tolist()
    weights = dict(zip(chosen, routing.routing_weights[0].tolist(), strict=True))
    columns = (
        ("score", "logits of a token", logits.tolist(), range(EXPERTS)),
        ("adjust", "with a balancing bias", (logits + bias).tolist(), range(EXPERTS)),
        ("select", "the two highest", (logits + bias).tolist(), chosen),
        ("weigh", "softmax over the chosen", [weights.get(e, 0.0) for e in range(EXPERTS)], chosen),
    )
    parts = []
    for i, (name, said, values, kept) in enumerate(columns):
        left = 10 + 180 * i
        parts += [box(left, 12, 150, 34, name, words="strong"), text(left + 75, 62, said, "quiet")]
        parts += [bar(left, e, value, e in kept, name == "weigh") for e, value in enumerate(values)]
        if i:
            parts.append(arrow((left - 28, 29), (left - 2, 29)))
    return svg(720, 256, "A router's four stages on one token", *parts)


def bar(left: float, e: int, value: float, kept: bool, share: bool) -> str:
    x, foot = left + 12 + 33 * e, 200
    height = abs(value) * (100 if share else 60)
    y = foot - height if value >= 0 else foot
    number = f"{value:.2f}" if share else f"{value:+.1f}"
    return f'<rect x="{x}" y="{y:g}" width="26" height="{height:g}" rx="2" class="e{e}{"" if kept else " pale"}"/>' + (
        text(x + 13, (y if value >= 0 else y + height + 20) - 10, number, "small") if kept or not share else ""
    )


def rows() -> str:
    """The same four images: routed as samples, and routed as tokens."""
    generator = torch.Generator().manual_seed(3)
    clusters = [0, 2, 0, 1]
    tokens = torch.randint(EXPERTS, (4, 8), generator=generator).tolist()
    parts = [
        text(180, 20, "by sample: the cluster of an image decides", "strong small"),
        text(540, 20, "by token: each decides for itself", "strong small"),
    ]
    for i in range(4):
        y = 44 + 38 * i
        parts += [text(34, y + 14, f"image {i}", "small")]
        parts += [f'<rect x="{74 + 28 * n}" y="{y}" width="24" height="28" rx="3" class="e{clusters[i]}"/>'
                  for n in range(8)]  # fmt: skip
        parts += [f'<rect x="{430 + 28 * n}" y="{y}" width="24" height="28" rx="3" class="e{tokens[i][n]}"/>'
                  for n in range(8)]  # fmt: skip
        parts += [text(330, y + 14, f"cluster {(7, 2, 7, 5)[i]}", "quiet")]
    parts += [
        text(180, 212, 'ids={"cluster": [7, 2, 7, 5]}', "small"),
        text(540, 212, "no context needed", "small"),
    ]
    return svg(720, 232, "Routing by sample and by token", *parts)


def dispatch() -> str:
    """Rows sorted by expert, run once an expert, put back."""
    choices = [2, 0, 1, 0, 3, 2, 0, 1]
    order = sorted(range(len(choices)), key=lambda row: choices[row])
    heads = ((90, "rows"), (290, "sorted by expert"), (480, "one product a group"), (660, "put back"))
    parts = [text(x, 18, said, "strong small") for x, said in heads]
    place = {row: 36 + 30 * i for i, row in enumerate(order)}
    for row, e in enumerate(choices):
        y = 36 + 30 * row
        parts += [curve(130, y + 12, 250, place[row] + 12), curve(520, place[row] + 12, 620, y + 12)]
        for x, top in ((50, y), (250, place[row]), (620, y)):
            parts.append(box(x, top, 80, 24, f"row {row}", kind=f"e{e}", words="on"))
    for e in range(EXPERTS):
        own = [place[row] for row in order if choices[row] == e]
        parts += [arrow((330, (own[0] + own[-1]) / 2 + 12), (438, (own[0] + own[-1]) / 2 + 12)),
                  expert(440, own[0], 80, own[-1] - own[0] + 24, e, f"E{e}")]  # fmt: skip
    return svg(720, 290, "Dispatch: rows are sorted by their expert, computed in groups and put back", *parts)


def bank() -> str:
    """What can be done to a bank; each gives a new one."""

    def shown(x: float, y: float, parts: list[tuple[str, str]]) -> str:
        return "".join(box(x + 46 * i, y, 42, 30, said, kind=kind, words="on") for i, (said, kind) in enumerate(parts))

    own = [(str(e), f"e{e}") for e in range(EXPERTS)]
    rows_ = (
        ("take([2, 0])", [own[2], own[0]], "these, in this order"),
        ("drop([1])", [own[0], own[2], own[3]], "all but these"),
        ("permute([3, 1, 0, 2])", [own[3], own[1], own[0], own[2]], "rows of the router go along: router.take"),
        ("merge(weights)", [("0, 1", "e0"), ("2, 3", "e2")], "each new expert a weighted sum of old ones"),
        ("grow([2], noise=0.01)", [*own, ("2′", "e2 pale")], "and a noisy copy of one"),
    )
    parts = [text(20, 26, "bank", "strong small left"), shown(190, 11, own)]
    for i, (call, made, said) in enumerate(rows_):
        y = 66 + 42 * i
        parts += [text(20, y + 15, call, "small left"), shown(190, y, made), text(440, y + 15, said, "quiet left")]
    return svg(720, 280, "Surgery on a bank of experts", *parts)


FIGURES = {"layer": layer, "stages": stages, "rows": rows, "dispatch": dispatch, "bank": bank}


def main() -> None:
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
