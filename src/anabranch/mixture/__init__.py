# SPDX-License-Identifier: Apache-2.0
"""The layer that branches and rejoins. Nothing in it knows a paper."""

from anabranch.mixture.context import Context, route
from anabranch.mixture.experts import Bank, ExpertBank, ModuleBank, StackedBank
from anabranch.mixture.layer import Mixture, mixtures, routings
from anabranch.mixture.losses import balance_loss, entropy, hard_load_importance, importance_loss, router_z_loss
from anabranch.mixture.routing import (
    FixedTable,
    GateNoise,
    LinearScore,
    Router,
    Routing,
    TableScore,
    TopK,
    prob,
    renormalised,
    straight_through,
)
from anabranch.mixture.stats import LoadStats

__all__ = [
    "Bank",
    "Context",
    "ExpertBank",
    "FixedTable",
    "GateNoise",
    "LinearScore",
    "LoadStats",
    "Mixture",
    "ModuleBank",
    "Router",
    "Routing",
    "StackedBank",
    "TableScore",
    "TopK",
    "balance_loss",
    "entropy",
    "hard_load_importance",
    "importance_loss",
    "mixtures",
    "prob",
    "renormalised",
    "route",
    "router_z_loss",
    "routings",
    "straight_through",
]
