# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import UsageError
from anabranch.models.mixtures.families import FAMILIES, tiny
from anabranch.models.mixtures.layers import mixture_layers
from anabranch.models.mixtures.routing import changed, off_empty
from anabranch.reuse.prune.keep import cumulative, floor, global_count, masked, prune, random_keep, uniform

IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
MIXTRAL = mixture_layers(tiny("Mixtral"))
GLM = mixture_layers(tiny("GLM-4-MoE"))  # 2 groups of 4, a token is sent to 1 of them


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def rows(layers, row):
    return torch.tensor(row, dtype=torch.float64).expand(len(layers), -1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_saved_and_reloaded_model_equals_the_masked_one(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny(family)
    layers = mixture_layers(model)
    keep = random_keep(layers, 4, torch.Generator().manual_seed(3))
    with masked(layers, keep):
        expected = logits_of(model)
    difference = float((logits_of(model) - expected).abs().max())
    prune(model, keep)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert mixture_layers(reloaded)[0].num_experts == 4
    assert float((logits_of(reloaded) - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    assert difference > 1e-3  # the mask did something


def test_a_weight_of_zero_is_another_thing_than_the_pruned_model():
    model = tiny("Mixtral")
    layers = mixture_layers(model)
    keep = random_keep(layers, 4, torch.Generator().manual_seed(3))
    with masked(layers, keep):
        refilled = logits_of(model)
    off = {name: torch.tensor([e not in chosen for e in range(8)]) for name, chosen in keep.items()}
    with changed(layers, lambda layer, triple: off_empty(triple, off[layer.name])):
        emptied = logits_of(model)
    assert float((refilled - emptied).abs().max()) > 1e-2


def test_all_experts_kept_is_the_model_bit_for_bit():
    model = tiny("DeepSeek-V3")
    layers = mixture_layers(model)
    with masked(layers, uniform(layers, torch.rand(len(layers), 8), 8)):
        assert torch.equal(logits_of(model), logits_of(model))
        inside = logits_of(model)
    assert torch.equal(inside, logits_of(model))


def test_lists_by_hand():
    row = [5.0, 1.0, 7.0, 0.0, 3.0, 3.0, 2.0, 4.0]  # sums to 25
    assert uniform(MIXTRAL, rows(MIXTRAL, row), 3)[MIXTRAL[0].name] == [0, 2, 7]
    assert uniform(MIXTRAL, rows(MIXTRAL, row), 4)[MIXTRAL[0].name] == [0, 2, 4, 7]  # of the equals 4 and 5, the first
    assert uniform(MIXTRAL, rows(MIXTRAL, row), 3, [(MIXTRAL[1].name, 3)])[MIXTRAL[1].name] == [0, 2, 3]
    assert cumulative(MIXTRAL, rows(MIXTRAL, row), 12 / 25)[MIXTRAL[0].name] == [0, 2]
    assert cumulative(MIXTRAL, rows(MIXTRAL, row), 0.5)[MIXTRAL[0].name] == [0, 2, 7]
    assert cumulative(MIXTRAL, rows(MIXTRAL, row), 0.01)[MIXTRAL[0].name] == [0, 2]  # a token needs two
    assert cumulative(MIXTRAL, rows(MIXTRAL, row), 1.0)[MIXTRAL[0].name] == [0, 1, 2, 4, 5, 6, 7]
    assert uniform(GLM, rows(GLM, row), 4)[GLM[0].name] == [0, 2, 4, 7]
    assert cumulative(GLM, rows(GLM, row), 0.1)[GLM[0].name] == [0, 2, 4, 7]


def test_a_global_budget_goes_where_the_scores_are():
    scores = torch.zeros(3, 8)
    scores[0, :6] = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 4.0])
    scores[1, 7], scores[2, 5] = 1.0, 2.0
    keep = global_count(MIXTRAL, scores, 9, [(MIXTRAL[2].name, 6), (MIXTRAL[2].name, 7)])
    assert list(keep.values()) == [[0, 1, 2, 3, 4], [0, 7], [6, 7]]
    model = tiny("Mixtral")
    layers = mixture_layers(model)
    with masked(layers, keep):
        logits_of(model)
    with pytest.raises(UsageError, match="different numbers of experts"):
        prune(model, keep)


def test_every_choice_of_groups_fills_the_slots():
    layers = mixture_layers(tiny("DeepSeek-V2"))  # 2 of 8 experts from 1 of 2 groups, a group scored by its best
    assert [floor(layer) for layer in (MIXTRAL[0], GLM[0], layers[0])] == [2, 2, 2]
    with pytest.raises(UsageError, match="4 to 8, a multiple of its 2 groups"):
        uniform(layers, torch.rand(len(layers), 8), 2)
    with pytest.raises(UsageError, match="at least 2 of each group"), masked(layers, {layers[0].name: [0, 4, 5]}):
        pass


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1), num_keep=st.sampled_from([4, 6, 8]), grouped=st.booleans(),
    held=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 7)), max_size=3), mass=st.floats(0.01, 1),
)  # fmt: skip
def test_what_is_kept_beats_what_is_dropped_and_protected_ones_stay(seed, num_keep, grouped, held, mass):
    layers = GLM if grouped else MIXTRAL[:2]
    scores = torch.rand(2, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    protect = [(layers[i].name, e) for i, e in held]
    sizes = [range(0, 4), range(4, 8)] if grouped else [range(8)]
    most = max(sum(i == layer and e in group for i, e in held) for layer in range(2) for group in sizes)
    if most <= num_keep // len(sizes):
        keep = uniform(layers, scores, num_keep, protect)
        for i, layer in enumerate(layers):
            chosen, own = keep[layer.name], {e for j, e in held if j == i}
            assert own <= set(chosen)
            assert chosen == sorted(chosen)
            for group in sizes:
                inside = [e for e in group if e in chosen]
                assert len(inside) == num_keep // len(sizes)
                free, dropped = [e for e in inside if e not in own], [e for e in group if e not in chosen]
                assert not free or not dropped or min(scores[i, free]) >= max(scores[i, dropped])
    for i, chosen in enumerate(cumulative(layers, scores, mass, protect).values()):
        assert float(scores[i, chosen].sum()) >= mass * float(scores[i].sum()) - 1e-9
        spare = [e for e in chosen if (i, e) not in held]
        if not grouped and len(chosen) > 2 + len(held):  # more than was asked for anyway: the last one was needed
            assert float(scores[i, chosen].sum() - scores[i, spare].min()) < mass * float(scores[i].sum()) + 1e-9


def test_random_keep_is_drawn_by_its_generator_alone():
    state = torch.get_rng_state()
    first, again, other = (random_keep(MIXTRAL, 4, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(state, torch.get_rng_state())


def test_wrong_uses_say_what_was_expected():
    scores = torch.rand(3, 8)
    with pytest.raises(UsageError, match=r"expected: \(3, 8\).*\n.*received: \(3, 4\)"):
        uniform(MIXTRAL, scores[:, :4], 2)
    with pytest.raises(UsageError, match="2 to 8"):
        uniform(MIXTRAL, scores, 1)
    with pytest.raises(UsageError, match="no share"):
        cumulative(MIXTRAL, scores, 0)
    with pytest.raises(UsageError, match="below zero"):
        cumulative(MIXTRAL, scores - 1, 0.5)
    with pytest.raises(UsageError, match=f"nan for layer {MIXTRAL[1].name}, expert 3"):
        uniform(MIXTRAL, scores.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(float("nan"))), 4)
    with pytest.raises(UsageError, match="more experts are protected"):
        uniform(MIXTRAL, scores, 2, [(MIXTRAL[0].name, e) for e in range(3)])
    with pytest.raises(UsageError, match="not in the model"):
        uniform(MIXTRAL, scores, 2, [("model.layers.9.mlp", 0)])
    with pytest.raises(UsageError, match="6 to 24"):
        global_count(MIXTRAL, scores, 5)
    with pytest.raises(UsageError, match="name no layer"), masked(MIXTRAL, {"nowhere": [0, 1]}):
        pass


def test_a_refused_list_changes_nothing():
    model = tiny("Mixtral")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError):
        prune(model, {layer.name: [0] for layer in mixture_layers(model)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
