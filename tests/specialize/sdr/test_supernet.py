# SPDX-License-Identifier: Apache-2.0
"""A path is a plain network; a split changes nothing; what a path does not use cannot move."""

import copy
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.models.resnet import features, macs
from anabranch.specialize.sdr.channels import SHARED, Layout, SplitBatchNorm, SplitConv2d, mean_over_groups
from anabranch.specialize.sdr.supernet import Config, SuperNet, grow, supernet

KINDS = [(layer, teacher) for layer in ("basic", "bottleneck") for teacher in ("anchor", "supernet")]
STAGES = 4


def all_paths(groups: int, num_split: int) -> list[tuple[int, ...]]:
    return [(0,) * (STAGES - num_split) + digits for digits in product(range(groups), repeat=num_split)]


def split(backbone, num_split=2, groups=3, **config) -> SuperNet:
    net = supernet(backbone, Config(groups=groups, **config))
    return grow(net, all_paths(groups, num_split), num_split).eval()


@pytest.mark.parametrize(("layer", "teacher"), KINDS)
def test_an_extracted_path_is_bit_for_bit_the_active_one_and_a_stock_model(
    make_backbone, disturb, pixels, layer, teacher
):
    backbone = make_backbone(layer)
    net = disturb(split(backbone, teacher=teacher))
    for row in [*range(9), *([SHARED] if teacher == "anchor" else [])]:
        plain = net.extract(row)
        assert torch.equal(features(plain, pixels), net.activate(row)(pixels))
        shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in backbone.state_dict().items()}
        assert type(plain) is type(backbone)
        assert macs(plain, 28) == macs(backbone, 28)


def test_paths_differ(make_backbone, disturb, pixels):
    net = disturb(split(make_backbone()))
    found = torch.stack([net.activate(row)(pixels) for row in [*range(9), SHARED]])
    gaps = (found[:, None] - found[None]).abs().amax((2, 3)) + torch.eye(10)
    assert gaps.min() > 1e-4


@pytest.mark.parametrize(("layer", "teacher", "groups"), [(*kind, 2) for kind in KINDS] + [("basic", "anchor", 4)])
def test_every_split_leaves_every_output_as_it_was(make_backbone, disturb, pixels, layer, teacher, groups):
    net = supernet(make_backbone(layer), Config(groups=groups, teacher=teacher)).eval()
    for num_split in range(1, STAGES + 1):
        disturb(net, seed=num_split)
        child = grow(net, all_paths(groups, num_split), num_split).eval()
        for row, path in list(enumerate(child.paths))[:: max(len(child.paths) // 16, 1)]:
            parent = net.paths.index((0,) * (STAGES - num_split + 1) + path[STAGES - num_split + 1 :])
            assert torch.equal(child.activate(row)(pixels), net.activate(parent)(pixels))
        torch.testing.assert_close(
            child.activate(SHARED)(pixels), net.activate(SHARED)(pixels), atol=2e-5, rtol=1e-5
        )  # the full net sums in another order
        net = child


def slow_full_forward(net: SuperNet, x: torch.Tensor) -> torch.Tensor:
    """The full net, block by block from its definition: parts travel in a dictionary, receivers take means."""

    def convolve(conv: SplitConv2d, parts):
        out = {}
        for row in conv.rows.parts():
            received = []
            for column in conv.columns.parts()[1:]:
                if f"{row}_{column}" in conv.blocks:
                    received.append(
                        torch.nn.functional.conv2d(
                            parts[column], conv.blocks[f"{row}_{column}"], None, conv.stride, conv.padding
                        )
                    )
            own = torch.nn.functional.conv2d(
                parts["common"], conv.blocks[f"{row}_common"], None, conv.stride, conv.padding
            )
            out[row] = own + sum(received) / len(received) if received else own
        return out

    def normalise(norm: SplitBatchNorm, parts):
        out, start = {}, 0
        for part in norm.layout.parts():
            size = len(norm.scales[part])
            mean, var = (v[start : start + size] for v in (norm.shared_mean, norm.shared_var))
            start += size
            scaled = (parts[part] - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt()
            out[part] = scaled * norm.scales[part][:, None, None] + norm.biases[part][:, None, None]
        return out

    relu = {True: lambda parts: {k: v.relu() for k, v in parts.items()}, False: lambda parts: parts}
    stem = net.backbone.embedder.embedder
    parts = relu[True](normalise(stem.normalization, convolve(stem.convolution, {"common": x})))
    parts = {k: net.backbone.embedder.pooler(v) for k, v in parts.items()}
    for stage in net.backbone.encoder.stages:
        for block in stage.layers:
            residual, hidden = parts, parts
            for i, inner in enumerate(block.layer):
                hidden = normalise(inner.normalization, convolve(inner.convolution, hidden))
                hidden = relu[i + 1 < len(block.layer)](hidden)
            if hasattr(block.shortcut, "convolution"):
                residual = normalise(block.shortcut.normalization, convolve(block.shortcut.convolution, parts))
            parts = {part: (hidden[part] + residual[part]).relu() for part in hidden}
    groups = [parts[g] for g in net.layouts[-1].parts()[1:]]
    return torch.cat([parts["common"], sum(groups) / len(groups)], 1).mean((2, 3))


@pytest.mark.parametrize("layer", ["basic", "bottleneck"])
def test_the_full_net_is_its_slow_definition(make_backbone, disturb, pixels, layer):
    # the first stage of the bottleneck net has a projection, that of the basic one (8 -> 8) none: it stays unsplit
    net = disturb(split(make_backbone(layer), num_split=3, groups=2, teacher="supernet"))
    torch.testing.assert_close(net.activate(SHARED)(pixels), slow_full_forward(net, pixels), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("layer", "teacher"), KINDS)
def test_what_a_path_does_not_use_is_bit_unchanged_after_momentum_and_decay(
    make_backbone, disturb, pixels, layer, teacher
):
    net = disturb(split(make_backbone(layer), teacher=teacher)).train()
    for optimiser in (
        torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
        torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1),
    ):
        for row in (*range(9), 4):  # all have momentum before it is looked at
            before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
            statistics = {name: buffer.clone() for name, buffer in net.named_buffers()}
            optimiser.zero_grad(set_to_none=True)
            net.activate(row)(pixels).square().sum().backward()
            optimiser.step()
            moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
            assert moved == net.parameters_of(row) == {n for n, p in net.named_parameters() if p.grad is not None}
            for name, buffer in net.named_buffers():
                if "running" in name:
                    others = torch.arange(9) != row
                    assert torch.equal(buffer[others], statistics[name][others])
                    assert not torch.equal(buffer[row], statistics[name][row])
                else:
                    assert torch.equal(buffer, statistics[name])


def test_paths_that_share_digits_share_storage_and_all_teach_the_common_blocks(make_backbone, pixels):
    net = split(make_backbone()).train()
    one, other = net.paths.index((0, 0, 1, 0)), net.paths.index((0, 0, 1, 2))
    used = net.parameters_of(one) & net.parameters_of(other)
    parameters = dict(net.named_parameters())
    third = "backbone.encoder.stages.2.layers.0.layer.0.convolution.blocks."
    assert {f"{third}common_common", f"{third}1_common"} <= used  # one tensor under one name: nothing can drift apart
    net.activate(one)(pixels).sum().backward()
    first = parameters[f"{third}common_common"].grad.clone()
    net.activate(other)(pixels).sum().backward()
    assert not torch.equal(parameters[f"{third}common_common"].grad, first)
    last = "backbone.encoder.stages.3.layers.0.layer.0.convolution.blocks."
    assert parameters[f"{last}0_1"].grad is not None
    assert parameters[f"{last}0_0"].grad is None


def test_a_frozen_path_uses_batch_statistics_and_leaves_running_ones_alone(make_backbone, disturb, pixels):
    net = disturb(split(make_backbone())).train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    frozen = net.activate(SHARED, frozen=True)(pixels)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert torch.equal(frozen, net.activate(SHARED)(pixels))


@pytest.mark.parametrize("row", [3, SHARED])
def test_views_side_by_side_are_views_one_after_another(make_backbone, disturb, pixels, row):
    """The same outputs, gradients and running statistics as when every view passes alone."""
    net = disturb(split(make_backbone())).train()
    alone, views = copy.deepcopy(net), [pixels, pixels.flip(0, 3), pixels.square()]
    weights = torch.randn(3, net.extract(row).config.hidden_sizes[-1])
    slow = torch.stack([alone.activate(row)(view) for view in views], 1)
    found = net.activate(row, views=3)(torch.stack(views, 1).flatten(0, 1)).unflatten(0, (-1, 3))
    torch.testing.assert_close(found, slow, atol=1e-5, rtol=1e-4)
    (slow * weights).sum().backward()
    (found * weights).sum().backward()
    for (name, mine), theirs in zip(net.named_parameters(), alone.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-3)
    for mine, theirs in zip(net.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_narrow_path_has_the_first_channels_of_each_group(make_backbone, disturb, pixels):
    net = disturb(split(make_backbone("bottleneck"), num_split=3, groups=2, split_ratio=0.5))
    plain = net.extract(5, keep=0.5)
    assert list(plain.config.hidden_sizes) == [8, 9, 12, 15]
    assert features(plain, pixels).shape == (6, 15)
    conv = net.backbone.encoder.stages[3].layers[0].shortcut.convolution
    mine = plain.encoder.stages[3].layers[0].shortcut.convolution.weight
    assert torch.equal(mine, conv.weight(net.paths[5])[:15, :12])


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 64), st.floats(0.05, 0.95), st.integers(1, 5), st.integers(1, 3))
def test_the_mean_over_groups_keeps_what_groups_agree_on(channels, ratio, groups, batch):
    layout = Layout(channels, round(ratio * channels), groups, 0)
    plain = torch.randn(batch, channels, 2, 2)
    full = torch.cat([plain[:, : layout.common], *[plain[:, layout.common :]] * groups], 1)
    assert full.shape[1] == layout.width
    torch.testing.assert_close(mean_over_groups(full, layout), plain)


@pytest.mark.parametrize(
    ("paths", "num_split", "message"),
    [
        ([(0, 0, 0, 3)], 1, r"paths: expected digits below \[1, 1, 1, 3\], received \(0, 0, 0, 3\)"),
        ([(0, 1, 0, 2)], 2, r"paths: expected digits below \[1, 1, 3, 3\]"),
        ([(0, 0, 0, 1), (0, 0, 0, 1)], 1, "paths: expected 2 that differ, received 1"),
        ([(0, 0, 0, 1)], 5, r"num_split: expected 0..4, received 5"),
    ],
)
def test_wrong_paths_are_named(make_backbone, paths, num_split, message):
    with pytest.raises(ValueError, match=message):
        grow(supernet(make_backbone(), Config(groups=3)), paths, num_split)


def test_wrong_settings_are_named(make_backbone):
    with pytest.raises(ValueError, match="split_ratio: expected between 0 and 1, both excluded, received 1"):
        Config(split_ratio=1)
    with pytest.raises(ValueError, match=r"row: expected 0..8 or -1 \(shared\), received 9"):
        split(make_backbone()).activate(9)
    with pytest.raises(ValueError, match="the full net, which has no plain shape"):
        split(make_backbone(), teacher="supernet").extract(SHARED)
