# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anabranch.errors import UsageError
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import mixture_layers
from anabranch.reuse.calibration import captured
from anabranch.reuse.prune.keep import masked, prune
from anabranch.reuse.prune.premoe import TaskLibrary, first_layer, pep

MODELS = {family: tiny(family) for family in ("Mixtral", "GLM-4-MoE")}
LAYERS = {family: mixture_layers(model) for family, model in MODELS.items()}


def drawn(layers, seed, ties=False):
    scores = torch.rand(len(layers), 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scores * 4).round() if ties else scores


def test_correspondence_by_hand():
    layers = LAYERS["Mixtral"][:2]
    stored = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1], [1.0, 2, 3, 4, 5, 6, 7, 8]])  # rank j of layer 2: expert 7 - j
    library = TaskLibrary.of(layers, {"maths": stored, "far": stored + 100})
    query = torch.tensor([8.0, 1, 6, 5, 9, 3, 2, 1])  # its best two: 4 and 0, stored ranks 4 and 0
    assert library.retrieve(query) == "maths"
    assert list(library.keep(layers, query, 2).values()) == [[0, 4], [3, 7]]
    own_ranks = [7 - j for j in (0, 1)]  # ranks of the query itself would have said 7 and 6
    assert sorted(own_ranks) != library.keep(layers, query, 2)[layers[1].name]


def slow_keep(layers, stored, query, num_keep):
    """Loops over the definition; within each group where there are some."""
    size = 8 // layers[0].num_groups
    keep = {layer.name: [] for layer in layers}
    for start in range(0, 8, size):
        group = range(start, start + size)
        best = sorted(group, key=lambda e: (-query[e], e))[: num_keep // layers[0].num_groups]
        ranking = [sorted(group, key=lambda e, row=row: (-row[e], e)) for row in stored]
        for expert in best:
            for layer, order in zip(layers, ranking, strict=True):
                keep[layer.name].append(order[ranking[0].index(expert)])
    return {name: sorted(chosen) for name, chosen in keep.items()}


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**30), family=st.sampled_from(["Mixtral", "GLM-4-MoE"]), ties=st.booleans(),
    num_keep=st.sampled_from([4, 6, 8]),
)  # fmt: skip
def test_a_stored_pattern_finds_its_task_and_its_list(seed, family, ties, num_keep):
    layers = LAYERS[family]
    scores = {f"task {i}": drawn(layers, seed + i, ties) + 10 * i for i in range(3)}
    library = TaskLibrary.of(layers, scores)
    for task, own in scores.items():
        assert library.retrieve(own[0]) == task
        assert library.keep(layers, own[0], num_keep) == pep(layers, own, num_keep)
    query = scores["task 1"][0] + 0.3 * drawn(layers, seed + 7)[0]
    assert library.keep(layers, query, num_keep) == slow_keep(
        layers, scores["task 1"].tolist(), query.tolist(), num_keep
    )


def test_a_library_comes_back_as_it_was(tmp_path):
    layers = LAYERS["Mixtral"]
    scores = {"law": drawn(layers, 0), "maths": drawn(layers, 1)}
    library = TaskLibrary.of(layers, scores)
    library.save(tmp_path / "library")
    back = TaskLibrary.load(tmp_path / "library")
    assert (back.tasks, back.layers, back.num_groups) == (library.tasks, library.layers, 1)
    assert torch.equal(back.patterns, library.patterns)
    assert torch.equal(back.order, library.order)
    assert sorted(path.name for path in (tmp_path / "library").iterdir()) == ["library.json", "library.safetensors"]
    with pytest.raises(UsageError, match="of another model"):
        back.keep(LAYERS["GLM-4-MoE"], scores["law"][0], 4)
    (tmp_path / "library" / "library.json").write_text(json.dumps({"format": "another"}), encoding="utf-8")
    with pytest.raises(UsageError, match="holds no task library"):
        TaskLibrary.load(tmp_path / "library")
    (tmp_path / "library" / "library.safetensors").write_bytes(b"torn")
    with pytest.raises(UsageError, match="cannot be read"):
        TaskLibrary.load(tmp_path / "library")


@pytest.mark.parametrize("family", ["Mixtral", "GLM-4-MoE"])
def test_a_query_stops_at_the_first_mixture_layer(family):
    model, layers = MODELS[family], LAYERS[family]
    batch = {"input_ids": torch.arange(3, 15).view(2, 6), "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])}
    ran = []
    hooks = [layer.experts.register_forward_hook(lambda *_, name=layer.name: ran.append(name)) for layer in layers]
    logits_TN = first_layer(model, layers[0], batch)
    for hook in hooks:
        hook.remove()
    assert ran == []
    assert torch.equal(logits_TN, captured(model, layers, [batch])[layers[0].name].router_logits)
    assert isinstance(model.model(input_ids=batch["input_ids"]).last_hidden_state, torch.Tensor)


def test_text_of_a_planted_task_brings_the_experts_of_that_task():
    """Tokens below 50 are sent to experts 0 to 3 by every router, the others to 4 to 7."""
    model = tiny("Mixtral")
    layers = mixture_layers(model)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings[:, 0] = torch.where(torch.arange(97) < 50, 8.0, -8.0)
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight.shape == (32, 32):
                module.weight.mul_(0.1)  # what attention adds stays small beside the mark
        for layer in layers:
            layer.router.weight[:4, 0], layer.router.weight[4:, 0] = 3.0, -3.0
    text = {"low": torch.randint(3, 50, (4, 12), generator=g), "high": torch.randint(50, 97, (4, 12), generator=g)}
    scores = {}
    for task, ids in text.items():
        seen = captured(model, layers, [{"input_ids": ids}])
        scores[task] = torch.stack([seen[layer.name].router_logits.softmax(-1).mean(0) for layer in layers])
    library = TaskLibrary.of(layers, scores)
    query = {"input_ids": torch.randint(50, 97, (1, 9), generator=g)}
    pattern = first_layer(model, layers[0], query).softmax(-1).mean(0)
    assert library.retrieve(pattern) == "high"
    keep = library.keep(layers, pattern, 4)
    assert all(chosen == [4, 5, 6, 7] for chosen in keep.values())
    with torch.no_grad():
        plain = model(**query).logits
        with masked(layers, library.keep(layers, scores["low"][0], 4)):  # control: the other task's experts
            wrong = model(**query).logits
        prune(model, keep)
        torch.testing.assert_close(model(**query).logits, plain, atol=1e-5, rtol=0)
    assert float((wrong - plain).abs().max()) > 1e-2


def test_wrong_uses_say_what_was_expected():
    layers = LAYERS["Mixtral"]
    library = TaskLibrary.of(layers, {"law": drawn(layers, 0)})
    with pytest.raises(UsageError, match="8 finite numbers"):
        library.retrieve(torch.zeros(4))
    with pytest.raises(UsageError, match="2 to 8"):
        library.keep(layers, torch.zeros(8), 9)
    with pytest.raises(UsageError, match="of another model"):
        TaskLibrary.of(layers, {"law": torch.zeros(1, 8)})
    with pytest.raises(UsageError, match="needs a task"):
        TaskLibrary.of(layers, {})
