# SPDX-License-Identifier: Apache-2.0
import copy
import threading
from contextlib import suppress

import pytest
import torch
from torch import nn

from anabranch.errors import UsageError
from anabranch.mixture import Context, mixtures, route, routings
from anabranch.mixture.context import Slot


@pytest.fixture
def layer(small):
    return small.layer(small.fixed_router()).eval()


@pytest.fixture
def x(small):
    return torch.randn(3, 2, small.width, generator=small.seeded())


def clusters(*ids):
    return Context(ids={"cluster": torch.tensor(ids)})


def selected(layer, x, context):
    with route(layer, context):
        layer(x)
    return routings(layer)[""].selected_experts[:, 0].tolist()


def test_a_forward_without_a_context_says_how_to_give_one(layer, x):
    with pytest.raises(UsageError, match=r"has to know the cluster of each sample(.|\n)*with route\(model, context\)"):
        layer(x)


def test_a_wrong_number_of_ids_names_both_lengths(layer, x):
    with pytest.raises(UsageError, match=r"2 cluster ids for 3 samples(.|\n)*expected: 3 ids(.|\n)*received: 2 ids"):
        selected(layer, x, clusters(0, 1))


def test_a_misspelt_key_is_recognised(layer, x):
    with pytest.raises(UsageError, match="did you mean clusters"):
        selected(layer, x, Context(ids={"clusters": torch.tensor([0, 1, 2])}))


def test_an_unknown_cluster_is_an_error_with_the_known_ones(layer, x):
    with pytest.raises(UsageError, match=r"unknown cluster(.|\n)*0\.\.4(.|\n)*0\.\.9"):
        selected(layer, x, clusters(0, 9, 1))


def test_ids_that_are_no_ids_are_refused():
    with pytest.raises(
        ValueError, match=r"ids\['cluster'\]: expected integers \(B,\) or \(B, N\), received torch.float32 \(2,\)"
    ):
        Context(ids={"cluster": torch.rand(2)})


def test_rows_and_batch_go_together():
    with pytest.raises(ValueError, match="rows, batch: expected both or neither"):
        Context(rows=torch.arange(2))


def test_a_model_without_mixture_layers_is_no_silent_no_op():
    with pytest.raises(UsageError, match="nothing would be routed"), route(nn.Linear(2, 2), Context()):
        pass


def test_contexts_nest_and_an_exception_restores_the_outer_one(layer, x):
    with route(layer, clusters(0, 1, 2)):
        with suppress(RuntimeError), route(layer, clusters(3, 3, 3)):
            layer(x)
            assert routings(layer)[""].selected_experts[:, 0].tolist() == [3, 3, 3]
            raise RuntimeError
        layer(x)
        assert routings(layer)[""].selected_experts[:, 0].tolist() == [0, 1, 2]
    with pytest.raises(UsageError):
        layer(x)


def test_another_model_and_another_thread_do_not_see_the_context(layer, x):
    other = copy.deepcopy(layer)
    seen = []

    def attempt(model):
        try:
            model(x)
        except UsageError as error:
            seen.append(error)

    with route(layer, clusters(0, 1, 2)):
        attempt(other)
        thread = threading.Thread(target=attempt, args=(layer,))
        thread.start()
        thread.join()
    assert len(seen) == 2


def test_two_threads_route_one_model_at_once(layer, x):
    entered, found = threading.Barrier(2), {}

    def serve(*ids):
        with route(layer, clusters(*ids)):
            entered.wait()
            layer(x)
            entered.wait()
            found[ids] = tuple(routings(layer)[""].selected_experts[:, 0].tolist())

    threads = [threading.Thread(target=serve, args=ids) for ids in ((0, 1, 2), (3, 2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {ids: ids for ids in found}
    assert len(found) == 2


def test_a_copy_of_a_layer_carries_neither_context_nor_graph(small, x):
    layer = small.layer()
    context = Context(ids={"cluster": torch.tensor([0, 1, 2])}, generator=small.seeded())
    with route(layer, context):
        layer(x)
        copied = copy.deepcopy(layer)
    assert copied.slot.active is None
    assert routings(copied) == {}
    assert set(routings(layer)) == {""}


def test_routings_are_taken_once_and_forgotten_by_the_next_context(layer, x):
    with route(layer, clusters(0, 1, 2)):
        layer(x)
    with route(layer, clusters(0, 1, 2)):
        assert routings(layer) == {}
        layer(x)
    assert list(routings(layer)) == [""]
    assert routings(layer) == {}


def test_layers_draw_different_noise_and_repeat_it_for_the_same_generator_state(small, x):
    model = nn.Sequential(small.layer(), small.layer())
    ids = {"cluster": torch.tensor([0, 1, 2])}

    def scores(seed):
        with route(model, Context(ids=ids, generator=small.seeded(seed))):
            model(x)
        return [routing.scores for routing in routings(model).values()]

    first, second = scores(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, scores(1)[0])
    assert not torch.equal(first, scores(2)[0])


def test_noise_without_a_generator_says_so(small, x):
    with pytest.raises(UsageError, match="gate noise needs a generator"):
        selected(small.layer(), x, clusters(0, 1, 2))
    with pytest.raises(UsageError, match="has to know where its gate noise comes from"):
        small.layer(small.token_router())(x)


def test_the_context_decides_about_training_where_it_says_so(small, x):
    layer = small.layer()
    ids = {"cluster": torch.tensor([0, 1, 2])}
    quiet = selected(layer, x, Context(ids=ids, training=False))
    assert quiet == layer.router.table()[:3].tolist()


def test_mixtures_are_found_by_name(small):
    model = nn.ModuleDict({"a": small.layer(), "b": nn.Linear(2, 2), "c": nn.Sequential(small.layer())})
    assert list(mixtures(model)) == ["a", "c.0"]
    assert all(isinstance(layer.slot, Slot) for layer in mixtures(model).values())


def test_a_mask_of_another_batch_is_refused(small):
    layer = small.layer(router=small.token_router()).eval()
    with (
        route(layer, Context(mask=torch.ones(2, 4, dtype=torch.bool))),
        pytest.raises(UsageError, match=r"(?s)the mask does not fit the batch.*\(2, 3\).*\(2, 4\)"),
    ):
        layer(torch.randn(2, 3, small.width))
