# SPDX-License-Identifier: Apache-2.0
"""Contracts that methods pass; shipped, so that yours can be held to them too."""

from anabranch.testing.contract import check_bank, check_mixture, check_router
from anabranch.testing.method_contract import check_method, examine
from anabranch.testing.subject import Reordering, Subject, along

__all__ = ["Reordering", "Subject", "along", "check_bank", "check_method", "check_mixture", "check_router", "examine"]
