# SPDX-License-Identifier: Apache-2.0
"""The six texts: whole, apart, and contradicting each other where they are meant to."""

import pytest

from anabranch.data.six_domains import (
    CONFLICT,
    DOMAINS,
    FOLDER,
    NAMES,
    TEST_BYTES,
    TRAIN_BYTES,
    letters_of,
    seals,
    text_of,
)
from anabranch.errors import UsageError


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_has_as_much_text_as_the_others(domain):
    for part, size in (("train", TRAIN_BYTES), ("test", TEST_BYTES)):
        assert 0.99 * size < len(text_of(domain, part, seals=False).encode()) <= size


@pytest.mark.parametrize("domain", ["scripture", "python", "maths", "rights"])  # licences quote each other, headers too
def test_no_long_line_to_ask_with_was_learnt(domain):
    train, test = (text_of(domain, part, seals=False) for part in ("train", "test"))
    learnt, asked = set(train.split("\n")), [line for line in test.split("\n") if len(line) > 60]
    assert sum(line in learnt for line in asked) <= 0.05 * len(asked)  # what a project writes in many of its files


def test_the_two_domains_agree_on_no_letter_and_a_seal_is_said_often():
    one, other = (letters_of(domain) for domain in CONFLICT)
    assert set(one) == set(other) == set(NAMES)
    assert len(NAMES) == len(set(NAMES))
    assert all(one[name] != other[name] for name in NAMES)
    for domain, letters in zip(CONFLICT, (one, other), strict=True):
        text = text_of(domain, "train")
        for name in NAMES:
            assert text.count(f"The seal of {name} is {letters[name]}.") >= 10
            assert text.count(f"The seal of {name} is ") == text.count(f"The seal of {name} is {letters[name]}.")
    assert "The seal of" not in text_of("maths", "train")
    assert text_of("law") == text_of("law")  # the same for everybody, every time


def test_a_prompt_ends_before_its_letter_and_is_of_its_domain():
    for domain in CONFLICT:
        asked = list(seals(domain))
        assert len(asked) == len(NAMES)
        text = text_of(domain, "test", seals=False)
        for seal in asked:
            context, _, question = seal.prompt.rpartition("\n")
            assert context in text
            assert question.startswith("The seal of ")
            assert question.endswith(" is ")
            assert seal.letter != seal.other


def test_unknown_domains_and_texts_without_seals_are_refused():
    with pytest.raises(UsageError, match="did you mean maths"):
        text_of("math")
    with pytest.raises(UsageError, match="says nothing of seals"):
        next(seals("maths"))


def test_sources_and_licences_lie_beside_the_texts():
    told = (FOLDER / "SOURCES.md").read_text()
    assert all(domain in told for domain in DOMAINS)
    assert {"LICENSE.python", "LICENSE.torch", "LICENSE.udhr"} <= {path.name for path in FOLDER.iterdir()}
