# SPDX-License-Identifier: Apache-2.0
"""Adapters of experts: base and adapter give the tuned model bit by bit, and nothing torn or foreign comes in."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from anabranch.errors import UsageError
from anabranch.models.mixtures.adapter import (
    MANIFEST,
    WEIGHTS,
    ExpertAdapter,
    applied,
    difference,
    exchange,
    fingerprint,
    fused_of,
    merge,
)
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import mixture_layers

FAMILIES = ("Qwen2-MoE", "DeepSeek-V3", "GptOss")
IDS = torch.arange(3, 15).view(2, 6)


@torch.no_grad()
def tuned_copy(family, chosen, seed=0, *, noise=0.05):
    """The tiny model with drawn changes in the chosen experts, by number of the mixture layer."""
    model = tiny(family)
    g = torch.Generator().manual_seed(seed)
    for number, experts in chosen.items():
        for value in fused_of(mixture_layers(model)[number]).values():
            for expert in experts:
                value[expert] += noise * torch.randn(value[expert].shape, generator=g)
    return model


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_only_tuned_slices_are_kept_and_give_the_tuned_model_bit_by_bit(family, tmp_path):
    base, tuned = tiny(family), tuned_copy(family, {0: [5, 1], 1: [7]})
    names = [layer.name for layer in mixture_layers(base)]
    difference(base, tuned).save(tmp_path / "adapter")
    adapter = ExpertAdapter.load(tmp_path / "adapter")
    assert adapter.experts == {names[0]: (1, 5), names[1]: (7,)}
    assert not adapter.whole
    held = load_file(tmp_path / "adapter" / WEIGHTS)
    assert {len(value) for name, value in held.items() if name.startswith(names[0])} == {2}
    assert sum(value.numel() for value in held.values()) == 3 * sum(
        value[0].numel() for value in fused_of(mixture_layers(base)[0]).values()
    )
    merge(base, adapter)
    assert same_bits(bits(base), bits(tuned))


def test_taken_out_it_leaves_the_base_bit_by_bit_even_after_an_error(family):
    base, tuned = tiny(family), tuned_copy(family, {0: [0, 3]})
    before, adapter = bits(base), difference(base, tuned)
    inside = []

    def fail():
        with applied(base, adapter):
            inside.append(bits(base))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert same_bits(inside[0], bits(tuned))
    assert same_bits(bits(base), before)


def test_merged_it_is_a_stock_checkpoint(family, tmp_path):
    base = tiny(family)
    merge(base, difference(base, tuned_copy(family, {1: [2]})))
    base.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert same_bits(bits(again), bits(base))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, base(IDS).logits)


def test_what_is_no_expert_is_kept_whole():
    base, tuned = tiny("Mixtral"), tuned_copy("Mixtral", {0: [1]})
    router = mixture_layers(tuned)[1].name + ".gate.weight"
    with torch.no_grad():
        tuned.get_parameter(router)[0, 0] += 1
    adapter = difference(base, tuned)
    assert set(adapter.whole) == {router}
    before = bits(base)
    with applied(base, adapter):
        assert same_bits(bits(base), bits(tuned))
    assert same_bits(bits(base), before)


def test_a_fingerprint_knows_one_bit_but_not_the_precision_it_was_opened_in():
    model = tiny("OLMoE").to(torch.bfloat16)
    half = fingerprint(model)
    assert fingerprint(model.float()) == half
    with torch.no_grad():
        value = next(iter(fused_of(mixture_layers(model)[2]).values()))
        value[3, 2, 1] = torch.nextafter(value[3, 2, 1], torch.tensor(9.0))
    assert fingerprint(model) != half


def test_another_base_is_refused_and_so_is_a_second_adapter():
    one, two = tuned_copy("OLMoE", {0: [1]}), tuned_copy("OLMoE", {1: [1]}, seed=3)
    base = tiny("OLMoE")
    first, second = difference(base, one), difference(base, two)
    for wrong in (tiny("OLMoE", seed=1), one):
        before = bits(wrong)
        with pytest.raises(UsageError, match="tuned on another base model"):
            merge(wrong, second)
        assert same_bits(bits(wrong), before)
    merge(base, first)
    with pytest.raises(UsageError, match="no other adapter in it"):
        merge(base, second)


def spoil_cut(folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-7])


def spoil_bit(folder):
    whole = bytearray((folder / WEIGHTS).read_bytes())
    whole[-3] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(whole))


def spoil_gone(folder):
    (folder / WEIGHTS).unlink()


def spoil_other(folder):
    save_file({"x": torch.zeros(1)}, folder / WEIGHTS)


def spoil_manifest(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])


def spoil_key(folder):
    said = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({key: value for key, value in said.items() if key != "base"}))


@pytest.mark.parametrize("spoil", [spoil_cut, spoil_bit, spoil_gone, spoil_other, spoil_manifest, spoil_key])
def test_torn_files_are_refused(spoil, tmp_path):
    difference(tiny("Mixtral"), tuned_copy("Mixtral", {0: [1]})).save(tmp_path)
    ExpertAdapter.load(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UsageError, match="is torn"):
        ExpertAdapter.load(tmp_path)


def test_a_folder_of_something_else_and_a_newer_format_are_told(tmp_path):
    with pytest.raises(UsageError, match=r"holds no tuned experts\n  expected: a folder with experts.json"):
        ExpertAdapter.load(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": 9}')
    with pytest.raises(UsageError, match="another format"):
        ExpertAdapter.load(tmp_path)


def test_slices_that_do_not_fit_change_nothing():
    base = tiny("Mixtral")
    good = difference(base, tuned_copy("Mixtral", {0: [1]}))
    name = next(iter(good.tensors))
    layer = next(iter(good.experts))
    cases = [
        (good.experts, good.tensors | {name: good.tensors[name][:, :-1]}, "does not fit"),
        (good.experts, {key: value for key, value in good.tensors.items() if key != name}, "does not fit"),
        ({layer: (8,)}, good.tensors, "has no expert 8"),
        ({"model.layers.9.mlp": (1,)}, good.tensors, "no mixture 'model.layers.9.mlp'"),
    ]
    before = bits(base)
    for experts, tensors, message in cases:
        with pytest.raises(UsageError, match=message):
            merge(base, ExpertAdapter(good.base, experts, tensors))
    assert same_bits(bits(base), before)


def test_exchange_gives_back_what_was_there():
    base, tuned = tiny("GptOss"), tuned_copy("GptOss", {0: [1, 4], 2: [0]})
    before = bits(base)
    exchange(base, exchange(base, difference(base, tuned)))
    assert same_bits(bits(base), before)
