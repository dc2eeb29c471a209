import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anabranch.models.diffusion.family import denoiser
from anabranch.suppress.attacks.quantise import GROUP, layers, quantised, rounded
from anabranch.suppress.geom_erasing.adapter import hashes
from anabranch.suppress.lora import add_lora
from tests.diffusion_pipelines import tiny


def slow_rounded(weight, bits, group):
    """Value by value."""
    flat, out = weight.flatten(1), weight.flatten(1).clone()
    for row in range(len(flat)):
        for start in range(0, flat.shape[1], group):
            part = flat[row, start : start + group]
            step = float(part.abs().max()) / (2 ** (bits - 1) - 1)
            for i, value in enumerate(part.tolist()):
                out[row, start + i] = round(value / step) * step if step else 0.0
    return out.reshape(weight.shape)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 5), columns=st.integers(1, 70), bits=st.sampled_from([2, 4, 8]), seed=st.integers(0, 2**31 - 1)
)
def test_it_matches_the_slow_loop_and_stays_within_half_a_step(rows, columns, bits, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0] *= 0
    for group in (GROUP, columns):
        found = rounded(weight, bits, group)
        assert torch.allclose(found, slow_rounded(weight, bits, group), atol=1e-5)
        step = weight.abs().amax() / (2 ** (bits - 1) - 1)
        assert ((found - weight).abs() <= step / 2 + 1e-6).all()
    assert len(found[-1].unique()) <= 2**bits - 1


def test_a_linear_layer_computes_with_rounded_weights_and_has_its_own_back():
    layer = nn.Sequential(nn.Linear(40, 3), nn.Conv2d(1, 1, 1))
    before = layer[0].weight.clone()
    with quantised(layer, 4) as count:
        assert count == 2
        assert torch.equal(layer[0].weight, rounded(before, 4, GROUP))
        assert not torch.equal(layer[0].weight, before)
    assert torch.equal(layer[0].weight, before)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3"])
def test_a_change_smaller_than_the_rounding_is_lost_and_everything_is_back_afterwards(name):
    pipe = tiny(name)
    plain = {key: layer.weight.clone() for key, layer in enumerate(layers(denoiser(pipe)))}
    parameters = add_lora(pipe, 2, 0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.full_like(parameter, 1e-4))
    before, merged = hashes(pipe), [part for part in denoiser(pipe).modules() if hasattr(part, "merged_adapters")]
    with pytest.raises(RuntimeError, match="on the way"), quantised(denoiser(pipe), 4):  # noqa: PT012
        assert merged
        assert all(part.merged for part in merged)
        same = [
            ((layer.weight - rounded(plain[key], 4, GROUP)).abs() < 1e-5).float().mean()
            for key, layer in enumerate(layers(denoiser(pipe)))
        ]
        assert min(same) > 0.95  # but for values that lay next to a border
        raise RuntimeError("on the way")
    assert hashes(pipe) == before
    assert not any(part.merged for part in merged)


def test_one_bit_is_refused():
    with pytest.raises(ValueError, match="bits: expected at least 2, received 1"):
        rounded(torch.ones(2, 2), 1)
