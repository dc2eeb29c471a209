# SPDX-License-Identifier: Apache-2.0
"""Fewer experts: which to keep, a mask that tries it out, and a stock checkpoint that holds no others."""
