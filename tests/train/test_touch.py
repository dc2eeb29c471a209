# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from anabranch.errors import CheckFailed
from anabranch.train.touch import digest, touch_report


@pytest.fixture
def changed_model():
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
    before = digest(model)
    with torch.no_grad():
        model["decoder"].weight[0, 0] += 1e-6
    return before, digest(model)


def test_the_report_sorts_tensors_into_named_trained_changed_and_left_alone(changed_model):
    report = touch_report(*changed_model, ["decoder.*"], trained=["decoder.weight"])
    assert report.named == ("decoder.bias", "decoder.weight")
    assert report.trained == report.changed == ("decoder.weight",)
    assert report.left_alone == ("decoder.bias", "encoder.bias", "encoder.weight")
    assert str(report) == "2 tensors named, 1 trained, 1 changed, 3 left alone"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["decoder.*", "encoder.*"], r"'encoder.\*' was to change, but all 2 of its tensors are as before"),
        (["decoder.weight", "decoder.bias"], "'decoder.bias' was to change, but all 1"),
        (
            [],
            "1 tensors changed that were not to change\n  expected: changes only in nothing\n  received: decoder",
        ),
        (["decoder.wieght"], r"no tensor is called 'decoder.wieght'\n  try: did you mean decoder.weight"),
    ],
)
def test_a_silent_no_op_or_a_surprise_fails_the_check(changed_model, named, message):
    with pytest.raises(CheckFailed, match=message) as failed:
        touch_report(*changed_model, named)
    assert failed.value.exit_code == 3


def test_digests_see_type_shape_and_every_bit():
    class Holder(nn.Module):
        def __init__(self, tensor):
            super().__init__()
            self.register_buffer("tensor", tensor)

    tensors = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        -torch.zeros(4),
        torch.zeros(4, dtype=torch.bool),
        torch.zeros(0),
        torch.tensor(0, dtype=torch.int64),
        torch.zeros(4, dtype=torch.bfloat16),
    ]
    assert len({digest(Holder(tensor))["tensor"] for tensor in tensors}) == len(tensors)
    strided = torch.arange(6.0).reshape(2, 3).T
    assert digest(Holder(strided)) == digest(Holder(strided.contiguous()))
