# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.data import patchwork
from anabranch.data.images import open_images
from anabranch.data.planted import code, load, read, to_patches, write
from anabranch.errors import UsageError

NUMBERS = st.integers(0, 10**6)
L, P, SIDE = 16, 49, 28


def slow_write(pixels, code):
    """Straight loops over the definition."""
    out = torch.zeros_like(pixels)
    for patch in range(L):
        for i in range(P):
            top, left = divmod(code.patches_L[patch].item(), 4)
            down, right = divmod(code.pixels_P[i].item(), 7)
            value = pixels[:, 0, 7 * top + down, 7 * left + right]
            value = 255 - value if code.negative_P[i] else value
            out[:, 0, 7 * (patch // 4) + i // 7, 7 * (patch % 4) + i % 7] = value
    return out


def random_images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)


@settings(deadline=None, max_examples=200)
@given(number=NUMBERS)
def test_a_code_permutes_and_is_a_function_of_its_number(number):
    made, again, other = code(number), code(number), code(number + 1)
    assert made.patches_L.sort().values.tolist() == list(range(L))
    assert made.pixels_P.sort().values.tolist() == list(range(P))
    assert made.negative_P.sum() == P // 2
    for part in ("patches_L", "pixels_P", "negative_P"):
        assert torch.equal(getattr(made, part), getattr(again, part))
    assert not torch.equal(made.pixels_P, other.pixels_P)


@settings(deadline=None, max_examples=200)
@given(number=NUMBERS, count=st.integers(0, 3), seed=st.integers(0, 2**31 - 1))
def test_reading_undoes_writing(number, count, seed):
    pixels, made = random_images(count, seed), code(number)
    written = write(pixels, made)
    assert (written.dtype, written.shape) == (pixels.dtype, pixels.shape)
    assert torch.equal(read(written, made), pixels)


def test_writing_follows_the_definition():
    pixels = random_images(3, seed=0)
    assert torch.equal(write(pixels, code(2)), slow_write(pixels, code(2)))


def test_a_linear_embedding_reads_a_code_as_well_as_the_original(generator):
    """W x = W' x' + b with the columns of W reordered and negated, and b the sum of the negated ones times 255."""
    pixels, made = random_images(3, seed=0), code(4)
    weight_DP = torch.randn(5, P, generator=generator, dtype=torch.float64)[:, made.pixels_P]
    moved_DP = weight_DP * torch.where(made.negative_P, -1, 1)
    bias_D = 255 * weight_DP[:, made.negative_P].sum(1)
    plain_NLP = to_patches(pixels).double()[:, made.patches_L][..., made.pixels_P]
    torch.testing.assert_close(to_patches(write(pixels, made)).double() @ moved_DP.T + bias_D, plain_NLP @ weight_DP.T)


def test_the_images_labels_and_split_of_the_domain_are_kept():
    plain, planted = patchwork.load("digits"), open_images("planted:digits-3", labelled=True)
    everything = torch.arange(len(plain))
    assert planted.name == "digits-3"
    assert torch.equal(planted.labels, plain.labels)
    assert torch.equal(planted.is_test, plain.is_test)
    assert planted.class_names == plain.class_names
    assert torch.equal(read(planted.store.read(everything), code(3)), plain.store.read(everything))
    assert len(open_images("planted:digits-3")) == 2000


@pytest.mark.parametrize("name", ["digits", "digits-", "digits-x", "faces-1", "digits--1"])
def test_an_unknown_name_says_how_one_looks(name):
    with pytest.raises(UsageError, match="planted:garments-3"):
        load(name)
