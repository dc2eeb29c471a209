# SPDX-License-Identifier: Apache-2.0
"""Attacks on an erased model: is the concept gone, or only out of sight? Each leaves the model as it found it."""
