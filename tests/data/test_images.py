# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.data.images import BadImage, Images, Store, concat, fit, open_images
from anabranch.errors import UsageError


def numbered(name, start, count, size=2, **columns):
    """Images whose every pixel is their number."""
    pixels = (start + torch.arange(count, dtype=torch.uint8))[:, None, None, None].expand(-1, 1, size, size)
    return Images(name=name, store=Store.of(pixels.contiguous()), **columns)


def numbers(images, indices):
    return images.store.read(torch.tensor(indices, dtype=torch.long))[:, 0, 0, 0].tolist()


@settings(deadline=None, max_examples=200)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), data=st.data())
def test_take_and_concat_read_like_lists(sizes, data):
    parts, reference, start = [], [], 0
    for size in sizes:
        part, values = numbered("p", start, size), list(range(start, start + size))
        if data.draw(st.booleans()):
            keep = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8))
            part, values = part.take(torch.tensor(keep)), [values[i] for i in keep]
        parts.append(part)
        reference += values
        start += size
    mixture = concat(parts)
    assert len(mixture) == len(reference)
    keep = data.draw(st.lists(st.integers(0, len(reference) - 1), max_size=10))
    assert numbers(mixture, keep) == [reference[i] for i in keep]
    assert numbers(concat([mixture, mixture]), [len(reference)]) == reference[:1]


def test_take_follows_labels_split_and_files_and_accepts_a_mask():
    images = numbered(
        "x", 0, 4, labels=torch.tensor([0, 1, 0, 1]), class_names=("a", "b"),
        is_test=torch.tensor([False, False, True, True]), files=("a/0", "b/1", "a/2", "b/3"),
    )  # fmt: skip
    test = images.take(images.is_test)
    assert numbers(test, [0, 1]) == [2, 3]
    assert (test.labels.tolist(), test.is_test.all().item(), test.files) == ([0, 1], True, ("a/2", "b/3"))
    source = images.unlabelled()
    assert numbers(source, [0, 1]) == [0, 1]
    assert (len(source), source.labels, source.class_names, source.is_test) == (2, None, (), None)


def test_concat_keeps_labels_only_for_the_same_classes_and_all_quarantines():
    labels = torch.tensor([0, 1])
    one = numbered("one", 0, 2, labels=labels, class_names=("a", "b"), quarantine=(BadImage("x", "broken"),))
    two = numbered("two", 2, 2, labels=labels, class_names=("a", "b"), quarantine=(BadImage("y", "broken"),))
    other = numbered("other", 4, 2, labels=labels, class_names=("c", "d"))
    assert concat([one, two]).labels.tolist() == [0, 1, 0, 1]
    assert [bad.path for bad in concat([one, two]).quarantine] == ["x", "y"]
    assert concat([one, other]).labels is None
    assert concat([one, other]).name == "one+other"


def test_concat_of_different_shapes_names_them():
    with pytest.raises(UsageError, match=r"one 1 x 2 x 2, two 1 x 3 x 3"):
        concat([numbered("one", 0, 2), numbered("two", 0, 2, size=3)])
    with pytest.raises(UsageError, match="no images"):
        concat([])


def test_columns_of_the_wrong_length_and_pixels_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="labels: expected 3 entries, received 2"):
        numbered("x", 0, 3, labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="expected uint8"):
        Store.of(torch.zeros(2, 1, 4, 4))


def test_fit_resizes_flat_images_to_the_same_shade_and_repeats_channels():
    images = numbered("x", 0, 5, size=7)
    for size in (4, 7, 28):
        out = fit(images, size, 3).store.read(torch.arange(5))
        assert out.shape == (5, 3, size, size)
        assert (out == torch.arange(5)[:, None, None, None]).all()
    assert fit(images, None, None) is images


def test_shipped_specs_go_through_the_same_door():
    task = open_images("patchwork:digits", image_size=14, channels=3, labelled=True)
    assert (len(task), task.image_size, task.channels, len(task.class_names)) == (3000, 14, 3, 10)
    source = open_images("patchwork:digits")
    assert (len(source), source.image_size, source.labels, source.is_test) == (2000, 28, None, None)
    assert torch.equal(source.store.read(torch.arange(9)), open_images("patchwork:digits").store.read(torch.arange(9)))


def test_misspelt_specs_are_answered():
    with pytest.raises(UsageError, match="did you mean garments"):
        open_images("patchwork:garment")
    with pytest.raises(UsageError, match="did you mean sklearn-digits"):
        open_images("corpus:digits")
    with pytest.raises(UsageError, match="no such folder"):
        open_images("patchwrok:garments")
