# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from anabranch.data.images import Images, Store
from anabranch.data.streams import ShuffledIndices
from anabranch.errors import UsageError
from anabranch.specialize.mae import MaskedAutoencoding, masked_images


@pytest.fixture
def images(generator):
    return Images(
        name="noise", store=Store.of(torch.randint(0, 256, (40, 1, 28, 28), generator=generator, dtype=torch.uint8))
    )


@pytest.mark.parametrize("augment", [False, True])
def test_a_batch_is_a_function_of_seed_and_step(base, images, augment):
    def batch(seed, step):
        stream = masked_images(
            images, base, ShuffledIndices(40, 8, seed), seed=seed, augment=augment, cluster=torch.arange(40)
        )
        return stream.batch(step)

    one, same, later, other = batch(0, 5), batch(0, 5), batch(0, 6), batch(1, 5)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["noise"], later["noise"])
    assert not torch.equal(one["noise"], other["noise"])
    if not augment:
        assert torch.equal(one["pixels"], images.store.read(one["cluster"]))


def test_two_halves_have_the_loss_of_the_whole(base, batch):
    """What data parallelism relies on: equally many masked patches in every image, so the mean of means is the mean."""
    objective = MaskedAutoencoding(base).eval()
    halves = [
        objective({name: tensor[rows] for name, tensor in batch.items()})["loss"] for rows in (slice(0, 4), slice(4, 8))
    ]
    assert objective(batch)["loss"].item() == pytest.approx(torch.stack(halves).mean().item(), abs=1e-6)


def test_images_that_do_not_fit(base):
    colour = Images(name="photos", store=Store.of(torch.zeros(4, 3, 28, 28, dtype=torch.uint8)))
    with pytest.raises(UsageError, match="photos does not fit the model"):
        masked_images(colour, base, ShuffledIndices(4, 2, 0), seed=0)
    large = Images(name="photos", store=Store.of(torch.zeros(4, 1, 32, 32, dtype=torch.uint8)))
    with pytest.raises(UsageError, match="28 pixels a side"):
        masked_images(large, base, ShuffledIndices(4, 2, 0), seed=0)
