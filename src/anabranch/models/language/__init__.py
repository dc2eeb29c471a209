# SPDX-License-Identifier: Apache-2.0
"""Causal language models of transformers."""
