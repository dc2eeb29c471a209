# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch

from anabranch.errors import UsageError
from anabranch.mixture.context import Context, route
from anabranch.mixture.layer import mixtures
from anabranch.models import vit_mae
from anabranch.reuse.extract import extract
from anabranch.specialize import moce
from anabranch.specialize.mae import MaskedAutoencoding

GROUPS = torch.tensor([0, 1, 0, 1])


def insert(base, centroids, **options):
    options = {"num_experts": 2, **options}
    groups = GROUPS % options["num_experts"]
    return moce.insert(
        vit_mae.copy_of(base), centroids, groups, moce.Config(**options), torch.Generator().manual_seed(0)
    )


def routed_tokens(model, pixel_values, cluster):
    with torch.no_grad(), route(model, Context(ids={"cluster": torch.full((len(pixel_values),), cluster)})):
        return vit_mae.encode(model, pixel_values)


def step(objective, batch, steps=1):
    optimizer = torch.optim.AdamW(objective.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        objective(batch)["loss"].backward()
        optimizer.step()


@pytest.mark.parametrize("assignment", ["gate", "fixed"])
@pytest.mark.parametrize("scope", ["ffn", "blocks", "encoder", "autoencoder"])
def test_one_expert_is_the_dense_model_bit_for_bit_also_in_training(base, centroids, batch, assignment, scope):
    dense = MaskedAutoencoding(vit_mae.copy_of(base)).train()
    model = insert(base, centroids, num_experts=1, assignment=assignment, expert_scope=scope, init_noise=0.0)
    config = moce.Config(num_experts=1, assignment=assignment, expert_scope=scope)
    routed = moce.ClusterConditional(model, config, seed=0, batch_size=8).train()
    for _ in range(3):
        assert torch.equal(routed(batch)["loss"], dense(batch)["loss"])
        for objective in (dense, routed):
            step(objective, batch)
    for cluster in range(4):
        taken = extract(routed.model, cluster).state_dict()
        assert all(torch.equal(taken[name], tensor) for name, tensor in dense.model.state_dict().items())


@pytest.mark.parametrize("scope", ["ffn", "blocks", "encoder", "autoencoder"])
def test_insertion_keeps_the_function_for_every_cluster(base, centroids, batch, scope):
    model = insert(base, centroids, expert_scope=scope, init_noise=0.0)
    pixel_values = vit_mae.normalise(batch["pixels"])
    with torch.no_grad():
        before = vit_mae.encode(base, pixel_values)
    for cluster in range(4):
        assert torch.allclose(routed_tokens(model, pixel_values, cluster), before, atol=1e-6)


@pytest.mark.parametrize(
    ("scope", "gate_scale"),
    [
        ("ffn", "straight_through"),
        ("ffn", "prob"),
        ("ffn", "renormalised"),
        ("blocks", "straight_through"),
        ("encoder", "straight_through"),
    ],
)
def test_extraction_is_routing_after_training(base, centroids, batch, scope, gate_scale):
    config = moce.Config(num_experts=2, expert_scope=scope, gate_scale=gate_scale)
    model = insert(base, centroids, expert_scope=scope, gate_scale=gate_scale)
    step(moce.ClusterConditional(model, config, seed=0, batch_size=8).train(), batch, steps=5)
    model.eval()
    pixel_values = vit_mae.normalise(batch["pixels"])
    for cluster in range(4):
        dense = extract(model, cluster)
        with torch.no_grad():
            plain = vit_mae.encode(dense, pixel_values)
        routed = routed_tokens(model, pixel_values, cluster)
        assert torch.allclose(plain, routed, atol=1e-6)
        if gate_scale == "straight_through":
            assert torch.equal(plain, routed)
        assert list(dense.state_dict()) == list(base.state_dict())
        assert vit_mae.to_plain(dense).num_parameters() == vit_mae.to_plain(base).num_parameters()


def test_a_gate_value_does_not_fold_into_whole_blocks(base, centroids):
    with pytest.raises(ValueError, match="expected straight_through"):
        extract(insert(base, centroids, expert_scope="blocks", gate_scale="prob"), 0)


def test_the_gate_sees_the_cluster_and_nothing_else(base, centroids, batch):
    model = insert(base, centroids)
    layer = next(iter(mixtures(model).values()))

    def decided(pixel_values, clusters):
        with torch.no_grad(), route(model, Context(ids={"cluster": clusters})):
            vit_mae.encode(model, pixel_values)
        return layer.slot.routing

    clusters = torch.tensor([2, 2, 1])
    one = decided(torch.rand(3, 1, 28, 28), clusters)
    other = decided(torch.rand(3, 1, 28, 28), clusters)
    assert torch.equal(one.router_logits, other.router_logits)
    assert torch.equal(one.router_logits[0], one.router_logits[1])
    assert not torch.equal(one.router_logits[0], one.router_logits[2])


def test_every_expert_starts_with_a_group_of_clusters(base, centroids):
    for assignment in ("gate", "fixed"):
        model = insert(base, centroids, assignment=assignment)
        assert set(moce.routes(model).flatten().tolist()) == {0, 1}
    fixed = moce.routes(insert(base, centroids, assignment="fixed"))
    assert fixed.tolist() == [GROUPS.tolist()] * 2


def test_experts_of_other_clusters_are_bit_unchanged_by_a_step_with_weight_decay(base, centroids, batch):
    config = moce.Config(num_experts=2, assignment="fixed")
    model = insert(base, centroids, assignment="fixed")
    before = copy.deepcopy(model.state_dict())
    batch = batch | {"cluster": torch.zeros(8, dtype=torch.int64)}
    step(moce.ClusterConditional(model, config, seed=0, batch_size=8).train(), batch)
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".bank.experts.0." in name for name in moved)
    assert not any(".bank.experts.1." in name for name in moved)


@pytest.mark.parametrize(
    ("gate_scale", "learns"), [("straight_through", True), ("prob", True), ("renormalised", False)]
)
def test_which_gate_values_teach_the_gate(base, centroids, batch, gate_scale, learns):
    config = moce.Config(num_experts=2, gate_scale=gate_scale, aux_loss_coef=0.0)
    model = insert(base, centroids, gate_scale=gate_scale)
    moce.ClusterConditional(model, config, seed=0, batch_size=8).train()(batch)["masked"].backward()
    size = sum(float(layer.router.score.gate.weight.grad.abs().sum()) for layer in mixtures(model).values())
    assert (size > 0) == learns
    assert learns or size == 0


def test_noise_is_of_the_step_alone_and_absent_in_evaluation(base, centroids, batch):
    config = moce.Config(num_experts=2)
    objective = moce.ClusterConditional(insert(base, centroids), config, seed=0, batch_size=8)
    state = torch.random.get_rng_state()
    objective.train()
    first, again, later = objective(batch), objective(batch), objective(batch | {"step": torch.full((8,), 4)})
    assert torch.equal(first["balance"], again["balance"])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(first["balance"], later["balance"]) or not torch.equal(first["loss"], later["loss"])
    objective.eval()
    assert torch.equal(objective(batch)["loss"], objective(batch | {"step": torch.full((8,), 4)})["loss"])


def test_terms_add_up_and_distillation_starts_at_zero(base, centroids, batch):
    config = moce.Config(num_experts=2, distill_coef=0.5, entropy_coef=0.1, init_noise=0.0)
    model = insert(base, centroids, init_noise=0.0)
    objective = moce.ClusterConditional(model, config, seed=0, batch_size=8, base=base).eval()
    terms = objective(batch)
    assert terms["distill"].item() == pytest.approx(0, abs=1e-6)
    assert terms["loss"].item() == pytest.approx(
        sum(terms[n].item() for n in ("masked", "balance", "entropy", "distill"))
    )
    assert not any(name.startswith("_base") for name in objective.state_dict())


def test_assignment_does_not_change_when_the_experts_do(base, centroids, batch):
    """Images are assigned by the base; here its weights survive any training of the model with experts."""
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = moce.Config(num_experts=2, assignment="fixed")
    step(
        moce.ClusterConditional(insert(base, centroids, assignment="fixed"), config, seed=0, batch_size=8).train(),
        batch,
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


def test_forward_without_clusters_or_with_too_few(base, centroids, batch):
    model = insert(base, centroids)
    pixel_values = vit_mae.normalise(batch["pixels"])
    with pytest.raises(UsageError, match="without a context"):
        vit_mae.encode(model, pixel_values)
    with (
        pytest.raises(UsageError, match="3 cluster ids for 8 samples"),
        route(model, Context(ids={"cluster": torch.zeros(3, dtype=torch.int64)})),
    ):
        vit_mae.encode(model, pixel_values)


def test_default_layers_and_wrong_options(base):
    assert moce.expert_modules(base, moce.Config()) == ["vit.layers.0.mlp", "vit.layers.1.mlp"]
    with pytest.raises(ValueError, match=r"expected blocks 0..1, received 5"):
        moce.expert_modules(base, moce.Config(expert_layers=(5,)))
    with pytest.raises(ValueError, match="num_experts: expected at least 1, received 0"):
        moce.Config(num_experts=0)
    deep = vit_mae.build("small", image_size=32, channels=1, seed=0)
    assert moce.expert_modules(deep, moce.Config()) == ["vit.layers.3.mlp", "vit.layers.5.mlp"]
