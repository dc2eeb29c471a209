# SPDX-License-Identifier: Apache-2.0
"""Experts that share one set of weights, or that a vector stands in for."""
