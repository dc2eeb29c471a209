# SPDX-License-Identifier: Apache-2.0
"""Routers as one graph, in evaluation: torch.compile without a break, and torch.export, decide what the router does."""

import shutil
import warnings

import pytest
import torch
from torch import nn

from anabranch.mixture import (
    FixedTable,
    GateNoise,
    LinearScore,
    Mixture,
    ModuleBank,
    Router,
    TableScore,
    TopK,
    prob,
    renormalised,
    straight_through,
)

EXEMPT = {"the layer with its experts": "how many rows an expert gets is known only once they are routed"}


def seeded():
    return torch.Generator().manual_seed(0)


def tokens(**parts):
    return Router(LinearScore(8, 4, generator=seeded()), **parts)


ROUTERS = {
    "top-1, straight through": tokens(),
    "top-1, probability": tokens(weigh=prob, temperature=0.5),
    "top-2, renormalised": tokens(select=TopK(2), weigh=renormalised),
    "top-3 that learned with gate noise": tokens(select=TopK(3), weigh=prob, adjust=[GateNoise()]),
    "all": tokens(select=TopK(4), weigh=renormalised),
    "centroids": Router(TableScore(torch.randn(6, 8, generator=seeded()), 4, generator=seeded())),
    "learned table": Router(
        TableScore(torch.randn(6, 8, generator=seeded()), 4, generator=seeded(), cluster_embedding="learned"),
        select=TopK(2), weigh=renormalised,
    ),
    "fixed table": Router(FixedTable(torch.tensor([0, 1, 3, 2, 0, 1]), 4), weigh=straight_through),
}  # fmt: skip


class Decision(nn.Module):
    """Of tokens, or of samples by the rows of the table: tensors alone, as a graph gives them back."""

    def __init__(self, router):
        super().__init__()
        self.router = router.eval()

    def forward(self, given):
        if self.router.per == "token":
            return tuple(self.router(given, None))[:4]
        return tuple(self.router.decide(self.router.score(), None).rows(given))[:4]


class Breaking(LinearScore):
    """It looks at a number: no graph can hold what Python does with it."""

    def forward(self, hidden_states):
        logits = super().forward(hidden_states)
        return logits if float(logits.sum()) > 0 else -logits


def compiled(module, given):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="eager")(given)


def exported(module, given):
    return torch.export.export(module, (given,)).module()(given)


def one_graph(make, module, given):
    """Whether it can be made and gives the same bits."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the tracer, about what it does itself
            found, expected = make(module, given), module(given)
    except (torch._dynamo.exc.TorchDynamoException, torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode):
        return False
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    return all(torch.equal(a, b) for a, b in pairs)


def inputs_of(router):
    return torch.randn(3, 5, 8, generator=seeded()) if router.per == "token" else torch.tensor([0, 3, 5])


@pytest.mark.row("N10")
@pytest.mark.parametrize("make", [compiled, exported])
def test_routers_are_one_graph(make, counted):
    failed = [name for name, router in ROUTERS.items() if not one_graph(make, Decision(router), inputs_of(router))]
    assert failed == []
    broken = Decision(Router(Breaking(8, 4, generator=seeded())))
    seen = int(not one_graph(make, broken, inputs_of(broken.router)))
    counted(len(ROUTERS), len(failed), control=(seen, "of 1 router that looks at its numbers is refused"))


@pytest.mark.slow
@pytest.mark.row("N10", cheap=True)
def test_compiled_code_decides_as_the_router_does(counted):
    """Code of the machine sums in another order: weights to rounding, choices exactly."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("needs a compiler of C++")
    wrong = []
    for name in ("top-1, straight through", "top-2, renormalised", "centroids"):
        module, given = Decision(ROUTERS[name]), inputs_of(ROUTERS[name])
        torch._dynamo.reset()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the compiler, about what it does itself
            found, expected = torch.compile(module, fullgraph=True)(given), module(given)
        close = all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected, strict=True))
        wrong += [] if close and torch.equal(found[2], expected[2]) else [name]
    counted(3, len(wrong))


@pytest.mark.row("N10")
def test_what_is_exempt_is_no_graph_indeed(counted):
    """An exemption that is not needed hides what the layer can do."""
    bank = ModuleBank.from_template(nn.Linear(8, 8), 4)
    layer = Mixture(tokens(select=TopK(2), weigh=prob), bank).eval()
    given = torch.randn(3, 5, 8, generator=seeded())
    assert not one_graph(exported, layer, given)
    counted(0, note="; ".join(f"exempt: {what} ({why})" for what, why in EXEMPT.items()))
