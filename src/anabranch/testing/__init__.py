# SPDX-License-Identifier: Apache-2.0
"""Contracts that methods pass; shipped, so that yours can be held to them too."""

from anabranch.testing.contract import check_bank, check_mixture, check_router

__all__ = ["check_bank", "check_mixture", "check_router"]
