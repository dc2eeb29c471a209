# SPDX-License-Identifier: Apache-2.0
"""Every method of `anabranch list` under the contract."""

from pathlib import Path

import pytest

from anabranch import registry
from anabranch.testing import check_method
from anabranch.testing.discovery import find_subject

TESTS = Path(__file__).parent.parent
FEW = 2
"""Tensors of a model that a NaN is put into here; more of them in the slow test."""


LONG = {
    "suppress/detectors/text", "suppress/detectors/read_text", "suppress/baselines/clean_oracle",
    "suppress/baselines/data_filtering",
}  # fmt: skip
"""Networks that take a second for a picture, and fine-tuning on other rows: with the slow ones alone."""


@pytest.mark.row("contract")
@pytest.mark.parametrize("key", [key for key in registry.cards() if key not in LONG])
def test_method_keeps_its_contract(key, request):
    outcomes = check_method(key, find_subject(key, TESTS), leaves=FEW)
    passed = [name for name, outcome in outcomes.items() if outcome.state == "passed"]
    request.node.user_properties.append(("passed", " ".join(passed)))  # for the table of make trust


@pytest.mark.slow
@pytest.mark.parametrize("key", registry.cards())
def test_method_keeps_its_contract_from_another_seed_and_with_nan_in_more_places(key):
    check_method(key, find_subject(key, TESTS), seed=1, leaves=12)
