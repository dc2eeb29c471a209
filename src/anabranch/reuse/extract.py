# SPDX-License-Identifier: Apache-2.0
"""Take the dense model out of a mixture: for one cluster, every layer keeps the expert that the cluster takes.

Paper     : MoCE, Liu et al. 2023 (arXiv 2402.05382), its customisation step.
Equation  : layer l becomes E_e with e = R_l[k]; where the gate's value w_e(k) is not 1 by construction, it is constant
            for the cluster and folds into the last linear map: W2 <- w W2, b2 <- w b2.
Shapes    : k one cluster; L layers.
Differs   : nothing. Experts are copied: a view of stacked weights would slow down every later fine-tuning step.
Check     : equals the routed model on every cluster, bit for bit unless a gate value was folded
            (tests/reuse/test_extract.py).
"""

import copy

import torch
from torch import nn

from anabranch.mixture.experts import ExpertBank, ModuleBank
from anabranch.mixture.layer import Mixture, mixtures
from anabranch.mixture.routing import straight_through


@torch.no_grad()
def extract(model: nn.Module, cluster: int) -> nn.Module:
    """A copy of the model in which the experts of one cluster stand where mixtures stood."""
    dense = copy.deepcopy(model)
    for name, layer in mixtures(model).items():
        dense.set_submodule(name, expert_of(layer, cluster))
    return dense.eval()


def expert_of(layer: Mixture, cluster: int) -> nn.Module:
    """The expert that a cluster takes in one layer, with its constant gate value folded in."""
    if layer.universal is not None:
        raise ValueError("universal: expected a layer without a universal expert, which needs twice the width")
    assert isinstance(layer.bank, ModuleBank), f"experts in a {type(layer.bank).__name__} have to be unstacked first"
    logits = layer.router.score()
    if not bool(logits.amax(1).isfinite().all()):  # -inf bars an expert, as a fixed table does; NaN would choose one
        raise ValueError("router: expected finite scores of every cluster, received NaN or infinity")
    decided = layer.router.decide(logits, None)
    expert, weight = int(decided.selected_experts[cluster, 0]), float(decided.routing_weights[cluster, 0])
    if layer.router.weigh is straight_through or weight == 1:
        return layer.bank.extract(expert)
    if not isinstance(layer.bank, ExpertBank):
        raise ValueError("gate_scale: expected straight_through for experts other than feed-forward networks")
    return layer.bank.extract(expert, scale=weight)
