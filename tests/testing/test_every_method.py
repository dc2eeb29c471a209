# SPDX-License-Identifier: Apache-2.0
"""Every method of `anabranch list` under the contract."""

from pathlib import Path

import pytest

from anabranch import registry
from anabranch.testing import check_method
from anabranch.testing.discovery import find_subject

TESTS = Path(__file__).parent.parent


PENDING = {
    "reuse/merge/compressed_experts", "reuse/merge/mc_smoe", "reuse/merge/sub_moe", "reuse/prune/naee",
    "reuse/prune/premoe", "reuse/serve/expert_cache", "reuse/serve/expert_flow", "reuse/serve/expert_weave",
    "reuse/serve/llep", "reuse/serve/placement", "reuse/serve/prefetch", "reuse/skip/modes", "reuse/skip/naee",
}  # fmt: skip
"""Nothing says yet how these are exercised: `python -m anabranch.testing` shows them as failed."""


def of(key):
    missing = pytest.mark.xfail(strict=True, reason="nothing says yet how it is exercised")
    return pytest.param(key, marks=missing if key in PENDING else ())


@pytest.mark.row("contract")
@pytest.mark.parametrize("key", [of(key) for key in registry.cards()])
def test_method_keeps_its_contract(key, request):
    outcomes = check_method(key, find_subject(key, TESTS))
    passed = [name for name, outcome in outcomes.items() if outcome.state == "passed"]
    request.node.user_properties.append(("passed", " ".join(passed)))  # for the table of make trust
