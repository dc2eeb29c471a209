# SPDX-License-Identifier: Apache-2.0
"""The contract itself: a sound method passes, and each broken one fails with the sentence for what it breaks."""

import random
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.registry import Card, parse_card
from anabranch.testing import Subject, along, check_method, examine
from anabranch.testing.method_contract import CHECKS, EXEMPT, FAILED, NOT_APPLICABLE, PASSED

CARD = (
    "A made-up method.\n\nPaper     : none.\nEquation  : none\nShapes    : none\nDiffers   : no.\nCheck     : here.\n"
)


def method(exempt: str = "", **members: object) -> ModuleType:
    """A module with a card; what is defined in it says so."""
    module = ModuleType("made_up", CARD + (f"Exempt    : {exempt}\n" if exempt else ""))
    for name, member in members.items():
        member.__module__ = "made_up"
        setattr(module, name, member)
    return module


def failing(module: ModuleType, subject: Subject | None) -> dict[str, str]:
    return {name: one.why for name, one in examine(module, subject).items() if one.state == FAILED}


def of_rows(call, **more) -> Subject:
    return Subject(
        inputs=lambda g: {"features": torch.randn(12, 4, generator=g), "mask": torch.ones(12, dtype=torch.bool)},
        call=call,
        **{"samples": along(12, {"features": 0, "mask": 0}), "pad": padded, **more},
    )


def padded(given):
    rows = torch.cat([given["features"], torch.full((3, 4), 7.0)])
    return {"features": rows, "mask": torch.arange(15) < 12}


def mean(features: Tensor, mask: Tensor) -> Tensor:
    """A sound method."""
    return (features * mask[:, None]).sum(0) / mask.sum()


def test_a_sound_method_passes_and_says_what_does_not_apply():
    outcomes = check_method(method(), of_rows(mean))
    states = {name: outcome.state for name, outcome in outcomes.items()}
    assert set(states) == set(CHECKS)
    assert {name for name, state in states.items() if state == NOT_APPLICABLE} == {
        "config", "experts", "save", "touch", "off",
    }  # fmt: skip
    assert all(outcome.why for outcome in outcomes.values() if outcome.state == NOT_APPLICABLE)


@pytest.mark.parametrize(
    ("draw", "name"),
    [(lambda: torch.rand(()), "torch"), (lambda: np.random.rand(), "numpy"), (lambda: random.random(), "python")],
)
def test_the_global_generators_are_found(draw, name):
    np.random.rand(3)  # most draws move numpy's place among its keys, and no key
    found = failing(method(), of_rows(lambda features, mask: mean(features, mask) + 1e-9 * float(draw())))
    assert found["rng"] == f"the global generator of {name} is used"


def test_a_generator_that_is_seeded_and_left_so_is_found():
    def seeds(features, mask):
        torch.manual_seed(0)
        return mean(features, mask) + torch.rand(4)

    assert failing(method(), of_rows(seeds)) == {"rng": "the global generator of torch is used"}


def test_nan_that_is_dropped_or_ranked_is_found():
    def drops(features, mask):
        return torch.nan_to_num(features).mean(0)

    def highest(features, mask):
        return features.nan_to_num(nan=-1e9, posinf=-1e9).amax(0)

    found = failing(method(), of_rows(drops))
    assert found["nan"].startswith("NaN in features gives a finite answer, and another one than without")
    assert "inf" in found
    found = failing(method(), of_rows(highest))
    assert "NaN in features" in found["nan"]


def test_nan_that_would_have_decided_is_found_although_the_answer_stays():
    def above(features, mask):  # NaN is above nothing: the answer is that of a small number
        return (features > 100).any()

    assert failing(method(), of_rows(above))["nan"] == "NaN in features is passed over in silence"


def test_an_input_that_is_never_read_may_be_anything():
    def half(features, mask):
        return mean(features[:, :2], mask)

    def one_sided(features, mask, other):
        return mean(features, mask)

    assert failing(method(), of_rows(half)) == {}
    subject = Subject(
        inputs=lambda g: {"features": torch.randn(1, 4, generator=g), "other": torch.randn(1, generator=g)},
        call=lambda features, other: features.square(),
    )
    assert failing(method(), subject) == {}
    assert one_sided


def test_a_refusal_after_a_change_is_found():
    def scales(weight, factor):
        weight *= 2
        if not torch.isfinite(factor).all():
            raise UsageError("no factor")
        weight *= factor
        return weight.sum()

    subject = Subject(
        inputs=lambda g: {"weight": torch.randn(1, generator=g), "factor": torch.rand(1, generator=g)},
        call=scales,
        changes=("weight",),
        touches=lambda given, output: ["weight"],
    )
    assert "is refused after something was changed: weight" in failing(method("off (none)"), subject)["nan"]


def test_inputs_changed_in_place_are_found():
    def centres(features, mask):
        features -= mean(features, mask)
        return features.square().mean(0)

    assert failing(method(), of_rows(centres))["inputs"].startswith("it changes what it was given: features differs")


def test_padding_and_order_are_found():
    found = failing(method(), of_rows(lambda features, mask: features.mean(0)))
    assert found["padding"].startswith("padding changes the output")
    found = failing(method(), of_rows(lambda features, mask: features[0] + 0 * mean(features, mask)))
    assert found["samples"].startswith("samples in another order give another output")
    assert "nothing that it takes is masked" not in str(found)


def test_experts_that_are_not_equivariant_are_found():
    def first_if_equal(router_logits, num_experts):
        return router_logits * torch.arange(1, num_experts + 1)

    subject = Subject(
        inputs=lambda g: {"router_logits": torch.randn(1, 5, generator=g), "num_experts": 5},
        call=first_if_equal,
        experts=along(5, {"router_logits": 1}, {"": 1}),
    )
    assert failing(method(), subject)["experts"].startswith("experts in another order give another output")


def test_results_that_change_from_call_to_call_are_found():
    count = [0]

    def counts(features, mask):
        count[0] += 1
        return mean(features, mask) + count[0]

    assert failing(method(), of_rows(counts))["determinism"].startswith("the same inputs and generator state give")


def test_a_wrong_gradient_is_found():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 3 * x

        @staticmethod
        def backward(ctx, slope):
            return 2 * slope

    def triples(features, mask):
        return Wrong.apply(mean(features, mask))

    assert failing(method(), of_rows(triples))["gradcheck"].startswith("the gradient of it is")


def test_low_precision_that_drifts_is_found():
    def adds_up(features, mask):
        total = features.new_zeros(4)
        for row in features.repeat(200, 1):
            total = total + row.abs()
        return total / 200 + 0 * mean(features, mask)

    assert failing(method(), of_rows(adds_up))["dtype"].startswith("torch.bfloat16: the result differs by")


# configurations


@dataclass(frozen=True, kw_only=True)
class Doubling:
    size: int = 3

    def __post_init__(self):
        object.__setattr__(self, "size", 2 * self.size)


class Anything:
    def __init__(self, **given):
        self.__dict__.update(given)


@dataclass(frozen=True, kw_only=True)
class Lenient:
    size: int = 3

    def __new__(cls, **given):
        made = object.__new__(cls)
        made.__dict__["size"] = given.get("size", 3)
        return made

    def __init__(self, **given): ...


@pytest.mark.parametrize(
    ("kind", "sentence"), [(Doubling, "is another one after JSON"), (Lenient, "takes a name that")]
)
def test_configurations_that_do_not_come_back_are_found(kind, sentence):
    module = method(SomeConfig=kind)
    assert sentence in failing(module, of_rows(mean))["config"]


# modules


class Gate(nn.Module):
    """A sound objective."""

    def __init__(self, g):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, generator=g))
        self.frozen = nn.Parameter(torch.randn(4, generator=g), requires_grad=False)
        self.register_buffer("offset", torch.randn(4, generator=g))

    def forward(self, batch):
        return {"loss": (batch * self.scale + self.frozen + self.offset).square().mean()}


class Forgetful(Gate):
    """Its offset is no buffer."""

    def __init__(self, g):
        super().__init__(g)
        del self._buffers["offset"]
        self.offset = torch.randn(4, generator=g)


class Greedy(Gate):
    """Trains what it calls frozen."""

    def __init__(self, g):
        super().__init__(g)
        self.frozen.requires_grad_()


class Idle(Gate):
    def forward(self, batch):
        return {"loss": (batch * self.scale.detach() + self.offset).square().mean() + 0 * self.scale.sum()}


def learning(kind, **more) -> tuple[ModuleType, Subject]:
    subject = Subject(
        inputs=lambda g: {"objective": kind(g), "batch": torch.randn(6, 4, generator=g)},
        call=lambda objective, batch: objective(batch),
        **{
            "touches": lambda given, output: ["objective.scale"], "samples": along(6, {"batch": 0}),
            "off": lambda given: (torch.zeros(1), torch.zeros(1)), **more,
        },
    )  # fmt: skip
    return method(Kind=kind), subject


def test_a_sound_objective_passes():
    outcomes = check_method(*learning(Gate))
    assert {name for name in ("gradcheck", "save", "touch", "off") if outcomes[name].state == PASSED} == {
        "gradcheck", "save", "touch", "off",
    }  # fmt: skip


def test_a_forgotten_buffer_is_found():
    found = failing(*learning(Forgetful))
    assert found["save"].startswith("objective holds something that its state_dict does not: loss differs")


def test_other_parameters_that_learn_and_none_that_do_are_found():
    assert failing(*learning(Greedy))["touch"] == "it changes objective.frozen, which it does not name"
    assert failing(*learning(Idle))["touch"] == "it changes nothing"
    wide = learning(Gate, touches=lambda given, output: ["objective.*"])
    assert failing(*wide)["touch"] == "it names objective.frozen, which stays as it was"


def test_an_off_switch_that_is_not_exact_is_found():
    nearly = learning(Gate, off=lambda given: (given["batch"] * (1 + 1e-7), given["batch"]))
    assert failing(*nearly)["off"].startswith("strength 0 is not the plain thing")


# what is neither checked nor exempt


def test_what_is_left_out_fails_and_an_exemption_with_a_reason_does_not():
    bare = of_rows(mean, samples=None, pad=None)
    assert set(failing(method(), bare)) == {"samples", "padding"}
    exempt = method("samples (order is what it measures); padding (masked upstream)")
    assert failing(exempt, bare) == {}
    outcomes = check_method(exempt, bare)
    assert outcomes["padding"].state == EXEMPT
    assert outcomes["padding"].why == "masked upstream"


def test_an_exemption_that_is_not_needed_fails():
    assert failing(method("nan (too hard)"), of_rows(mean)) == {"nan": "the card exempts it, but it holds"}
    assert "does not apply" in failing(method("experts (it has none)"), of_rows(mean))["experts"]
    assert "no such check" in failing(method("luck (none)"), of_rows(mean))["rng"]


def test_a_whole_method_can_be_exempt_and_one_without_a_subject_fails():
    assert {o.why for o in check_method(method("everything (needs a robot)"), None).values()} == {"needs a robot"}
    with pytest.raises(AssertionError, match="there is no subject"):
        check_method(method(), None)


def test_an_exemption_without_a_reason_is_refused():
    card = parse_card("a/b", CARD + "Exempt    : samples; padding (masked upstream)\n")
    with pytest.raises(UsageError, match="an exemption without a reason"):
        _ = card.exempt
    assert Card("a/b", "", {}).exempt == {}


def test_a_module_without_a_card_is_no_method():
    with pytest.raises(UsageError, match="no method"):
        check_method(ModuleType("plain"), of_rows(mean))
