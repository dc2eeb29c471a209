# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from anabranch.mixture.layer import mixtures, routings
from anabranch.models import vit_mae
from anabranch.specialize import moce, token_moe
from anabranch.specialize.mae import MaskedAutoencoding


def insert(base, **options):
    return token_moe.insert(vit_mae.copy_of(base), moce.Config(**options), torch.Generator().manual_seed(0))


def test_one_expert_is_the_dense_model(base, batch):
    model = insert(base, num_experts=1, init_noise=0.0)
    routed = token_moe.TokenRouted(model, moce.Config(num_experts=1), seed=0, batch_size=8)
    assert torch.equal(routed.eval()(batch)["loss"], MaskedAutoencoding(base).eval()(batch)["loss"])


def test_tokens_of_one_image_go_different_ways(base, batch):
    model = insert(base, num_experts=4)
    with torch.no_grad():
        vit_mae.encode(model.eval(), vit_mae.normalise(batch["pixels"]))
    decided = next(iter(routings(model).values()))
    assert decided.per == "token"
    assert len(decided.selected_experts) == 8 * 17
    assert (decided.selected_experts.view(8, 17) != decided.selected_experts.view(8, 17)[:, :1]).any()


def test_gates_and_experts_learn(base, batch):
    model = insert(base, num_experts=2)
    objective = token_moe.TokenRouted(model, moce.Config(num_experts=2), seed=0, batch_size=8).train()
    terms = objective(batch)
    terms["loss"].backward()
    assert terms["balance"] >= 0
    assert all(layer.router.score.gate.weight.grad.abs().sum() > 0 for layer in mixtures(model).values())


def test_whole_blocks_cannot_be_routed_by_token(base):
    with pytest.raises(ValueError, match="expected ffn"):
        insert(base, expert_scope="blocks")
