# SPDX-License-Identifier: Apache-2.0
from importlib.util import find_spec

import pytest
import torch

from anabranch.data.images import Images, Store
from anabranch.data.streams import ShuffledIndices
from anabranch.errors import UsageError
from anabranch.jobs.transfer.embed import embed
from anabranch.jobs.transfer.learners import LEARNERS, family_of, learner, training

PRESENT = [name for name in LEARNERS if find_spec(f"anabranch.specialize.{name}")]


@pytest.fixture
def images(generator):
    pixels = torch.randint(0, 256, (24, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return Images(name="noise", store=Store.of(pixels))


@pytest.mark.parametrize("name", PRESENT)
def test_a_learner_trains_the_model_that_it_is_given(name, images):
    taught = learner(name)
    model = family_of(name).build("tiny", image_size=28, channels=1, seed=0)
    stream = taught.stream(images, model, ShuffledIndices(24, 8, 0), seed=0, cluster=torch.arange(24))
    objective = taught.objective(model, seed=0).train()
    batch, again = stream.batch(3), stream.batch(3)
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    assert all(len(rows) == 8 for rows in batch.values())
    assert "cluster" in batch
    assert objective.model is model
    objective(batch)["loss"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", PRESENT)
def test_features_leave_a_model_as_it_was(name, images):
    model = family_of(name).build("tiny", image_size=28, channels=1, seed=0).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    features = embed(model, images)
    assert model.training
    assert len(features) == len(images)
    assert torch.allclose(features[:3], embed(model, images.take(torch.arange(3))), atol=1e-5)  # eval: no batch matters
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_names_and_rates():
    with pytest.raises(UsageError, match=r"no learner 'simsiem'[\s\S]*did you mean simsiam"):
        learner("simsiem")
    assert training("mae") == {"optimizer": "adamw", "learning_rate": 4e-3, "weight_decay": 0.05}
    assert training("simsiam", 0.0, 0.1) == {"optimizer": "sgd", "learning_rate": 0.0, "weight_decay": 0.1}
