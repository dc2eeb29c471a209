# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import AnabranchError, UsageError
from anabranch.models.mixtures.bank import ExpertBank
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import Triple, mixture_layers
from anabranch.models.mixtures.routing import changed, watched
from anabranch.reuse.merge.compressed_experts import CompressedExperts, NextToken, fit, scale
from anabranch.train.config import TrainConfig

IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def truncated(layer, triple):
    """The highest weight alone, as it is."""
    best_TK = triple.routing_weights == triple.routing_weights.amax(-1, keepdim=True)
    return triple._replace(routing_weights=triple.routing_weights * best_TK)


def renormalised(layer, triple):
    """What the weights are not: the sum of the token's weights on its first expert."""
    kept = truncated(layer, triple)
    return kept._replace(routing_weights=kept.routing_weights * triple.routing_weights.sum(-1, keepdim=True)
                         / kept.routing_weights.sum(-1, keepdim=True))  # fmt: skip


@pytest.mark.parametrize("family", ["Mixtral", "OLMoE", "DeepSeek-V3", "GptOss"])
def test_ones_are_the_truncation_without_renormalised_weights(family):
    model = tiny(family)
    layers = mixture_layers(model)
    with CompressedExperts(layers, 1).applied():
        found = logits_of(model)
    with changed(layers, truncated):
        torch.testing.assert_close(found, logits_of(model), atol=1e-5, rtol=0)
    with changed(layers, renormalised):
        assert float((found - logits_of(model)).abs().max()) > 1e-3


def test_no_auxiliary_expert_changes_nothing_and_nothing_is_left_behind():
    model = tiny("Mixtral")
    layers = mixture_layers(model)
    compressed = CompressedExperts(layers, 2)
    with torch.no_grad():
        for offsets in compressed.offsets:
            offsets.normal_(generator=torch.Generator().manual_seed(0))
    with compressed.applied():
        inside = logits_of(model)
    assert torch.equal(inside, logits_of(model))
    assert all("forward" not in vars(layer.experts) for layer in layers)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), num_main=st.integers(1, 3))
def test_a_layer_equals_the_loop_over_its_definition(seed, num_main):
    g = torch.Generator().manual_seed(seed)
    layer, h_TD = WIDE[0], torch.randn(4, 32, generator=g)
    compressed = CompressedExperts([layer], num_main)
    with torch.no_grad():
        compressed.offsets[0].normal_(generator=g)
        seen = []
        with compressed.applied():
            routed_TD = layer.block(h_TD[None])[0]
        with watched([layer], seen.append):
            layer.block(h_TD[None])
    bank, triple = ExpertBank(layer), seen[0].triple
    for t in range(4):
        slots = sorted(zip(triple.routing_weights[t].tolist(), triple.selected_experts[t].tolist(), strict=True))[::-1]
        total = sum(weight for weight, _ in slots[num_main:])
        theta = sum(w / total * (1 + compressed.offsets[0][e]) for w, e in slots[num_main:]) if total else 1.0
        by_hand = sum(w * bank.run(e, (h_TD[t] * theta)[None])[0] for w, e in slots[:num_main])
        torch.testing.assert_close(routed_TD[t], by_hand, atol=1e-4, rtol=1e-4)


WIDE = mixture_layers(tiny("Mixtral", num_experts_per_tok=3))


def test_only_vectors_of_chosen_auxiliary_experts_get_a_gradient():
    model = tiny("Mixtral", num_experts_per_tok=3)
    layers, chosen = mixture_layers(model), {}
    compressed = CompressedExperts(layers, 2)

    def take(layer, triple):
        order = triple.routing_weights.argsort(-1, descending=True)
        chosen[layer.name] = set(triple.selected_experts.gather(1, order)[:, 2:].flatten().tolist())
        return triple

    ids = IDS[:1, :3]
    with changed(layers, take), compressed.applied():
        model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    for layer, offsets in zip(layers, compressed.offsets, strict=True):
        assert set(offsets.grad.abs().sum(1).nonzero().flatten().tolist()) == chosen[layer.name] != set(range(8))


def test_weights_of_zero_leave_the_input_alone():
    offsets = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    theta = scale(offsets, torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.0, 0.0], [0.3, 0.1]]))
    assert torch.equal(theta[0], torch.ones(4))
    torch.testing.assert_close(theta[1], 1 + 0.75 * offsets[2] + 0.25 * offsets[3])


class Text:
    """What the model with planted vectors would say after each token."""

    def __init__(self, model, planted):
        self.ids = torch.randint(3, 97, (16, 12), generator=torch.Generator().manual_seed(3))
        with planted.applied():
            self.labels = torch.cat((self.ids[:, :1], logits_of(model, self.ids).argmax(-1)[:, :-1]), 1)

    def batch(self, step):
        return {"input_ids": self.ids, "labels": self.labels}


def test_training_moves_the_vectors_alone_and_says_what_planted_vectors_would():
    model = tiny("Mixtral")
    model.set_experts_implementation("eager")
    layers = mixture_layers(model)
    planted, compressed = CompressedExperts(layers, 1), CompressedExperts(layers, 1)
    with torch.no_grad():
        for offsets in planted.offsets:
            offsets.normal_(generator=torch.Generator().manual_seed(0))
        for layer in layers:
            layer.experts.down_proj.mul_(3)
        model.lm_head.weight.mul_(4)
        text = Text(model, planted)
        aim = float(NextToken(model, planted)(text.batch(0))["loss"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = TrainConfig(steps=25, batch_size=16, learning_rate=0.2, weight_decay=0.0)
    result = fit(model, compressed, text, config)
    assert result.losses[-1] < aim < 0.9 * result.losses[0]  # the start is the plain truncation
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(bool(offsets.abs().sum() > 0) for offsets in compressed.offsets)


def test_vectors_come_back_as_they_were(tmp_path):
    compressed = CompressedExperts(WIDE, 2)
    with torch.no_grad():
        for offsets in compressed.offsets:
            offsets.normal_(generator=torch.Generator().manual_seed(0))
    compressed.save(tmp_path / "vectors.safetensors")
    back = CompressedExperts.load(tmp_path / "vectors.safetensors", WIDE)
    assert back.num_main == 2
    assert all(torch.equal(a, b) for a, b in zip(back.offsets, compressed.offsets, strict=True))
    with pytest.raises(UsageError, match="is of another model"):
        CompressedExperts.load(tmp_path / "vectors.safetensors", WIDE[:2])
    (tmp_path / "vectors.safetensors").write_bytes(b"torn")
    with pytest.raises(UsageError, match="cannot be read"):
        CompressedExperts.load(tmp_path / "vectors.safetensors", WIDE)


def test_wrong_uses_say_what_was_expected():
    with pytest.raises(UsageError, match="1 to 3"):
        CompressedExperts(WIDE, 4)
    with pytest.raises(AnabranchError, match="3 of 3 mixture layers never ran"), CompressedExperts(WIDE, 2).applied():
        pass


def test_an_outer_watch_sees_the_slots_that_were_run():
    model = tiny("Mixtral")
    layers, seen = mixture_layers(model), []
    with watched(layers, seen.append), CompressedExperts(layers, 1).applied():
        logits_of(model)
    assert isinstance(seen[0].triple, Triple)
    assert len(seen) == 3
