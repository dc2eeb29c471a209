import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.suppress.attacks.paraphrase import KINDS, paraphrases

WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=8), min_size=1, max_size=6)


def test_the_four_kinds_of_a_known_prompt():
    assert dict(zip(KINDS, paraphrases("a photo of a red dress", "watermark"), strict=True)) == {
        "named": "a photo of a red dress watermark",
        "misspelt": "a pohto of a red derss wtaermark",
        "reordered": "watermark a red dress a photo of",
        "synonyms": "a picture of a red dress copyright stamp",
    }
    assert paraphrases("a dress", "xob")[3] == "a dress kind of xob"


@settings(max_examples=200, deadline=None)
@given(words=WORDS)
def test_every_kind_differs_from_the_prompt_and_the_same_is_asked_twice(words):
    prompt = " ".join(words)
    found = paraphrases(prompt, "watermark")
    assert len(found) == len(KINDS)
    assert prompt not in found
    assert found == paraphrases(prompt, "watermark")
    assert sorted(found[2].split()) == sorted([*words, "watermark"])


def test_a_concept_without_a_name_is_refused():
    with pytest.raises(ValueError, match="word: expected the concept's name, received ' '"):
        paraphrases("a dress", " ")
