# SPDX-License-Identifier: Apache-2.0
"""Which expert of a trained mixture knows what: sums over a stream of tokens, and what follows from them alone.

statistics       mergeable sums by label, fold, layer and expert
trace            the decisions of the routers in the order of the tokens
domain_specialisation   how differently labels load the experts, against what chance would give
local_consistency       how far neighbouring tokens keep to the same experts: whether a cache would pay
signatures, shadow      which two models came from one, by their routing or by their texts alone
ranking/         one file a ranking: experts by how much they belong to a label
"""
