# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from anabranch.errors import AnabranchError, UsageError
from anabranch.measure.experts.trace import Recorder
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import mixture_layers
from anabranch.models.mixtures.routing import watched

LENGTHS = (5, 2, 7)
IDS = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()


def record(model, batches):
    recorder = Recorder(mixture_layers(model))
    for ids, mask in batches:
        with recorder.recording(mask), torch.no_grad():
            model(ids, attention_mask=mask)
    return recorder.trace()


@pytest.mark.parametrize("family", ["Mixtral", "DeepSeek-V3"])
def test_documents_one_after_another_as_each_alone(family):
    model = tiny(family)
    layers, trace = mixture_layers(model), record(model, [(IDS, MASK)])
    assert trace.selected.shape == (sum(LENGTHS), len(layers), 2)
    assert trace.layers == tuple(layer.name for layer in layers)
    parts = list(trace.by_document())
    assert [len(part) for part in parts] == list(LENGTHS)
    for b, length in enumerate(LENGTHS):
        alone = []
        with watched(layers, lambda one, alone=alone: alone.append(one.triple.selected_experts)), torch.no_grad():
            model(IDS[b : b + 1, :length])
        assert torch.equal(parts[b].long().sort(-1).values, torch.stack(alone, 1).sort(-1).values)


def test_more_batches_are_more_documents():
    model = tiny("Mixtral")
    once = record(model, [(IDS, MASK)])
    twice = record(model, [(IDS[:1], MASK[:1]), (IDS[1:], MASK[1:])])
    assert torch.equal(once.documents, twice.documents)
    assert torch.equal(once.selected, twice.selected)


def test_a_row_of_padding_is_no_document():
    model = tiny("Mixtral")
    mask = torch.cat([MASK[:1], torch.zeros_like(MASK[:1]), MASK[2:]])
    trace = record(model, [(IDS, mask)])
    assert [len(part) for part in trace.by_document()] == [5, 7]


def test_padding_before_the_text_is_left_out():
    model = tiny("Mixtral")
    ids = torch.cat([torch.full((3, 4), 50), IDS], 1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.long), MASK], 1)
    recorder = Recorder(mixture_layers(model))
    with recorder.recording(mask), torch.no_grad():
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    assert torch.equal(recorder.trace().selected, record(model, [(IDS, MASK)]).selected)


def test_wrong_uses():
    model = tiny("Mixtral")
    recorder = Recorder(mixture_layers(model))
    with pytest.raises(UsageError, match="the trace is empty\n  expected: forward passes inside `recording`"):
        recorder.trace()
    with pytest.raises(AnabranchError, match="3 of 3 mixture layers never ran"), recorder.recording(MASK):
        pass
    with pytest.raises(UsageError, match="the trace is empty"):
        recorder.trace()
