# SPDX-License-Identifier: Apache-2.0
"""Paraphrase: ask for the concept in other words, misspelt, and in another order.

Paper     : none of its own; prompts of this kind are in most robustness studies of erasing, cf. arXiv 2310.11868.
Equation  : named       y (+) word
            misspelt    y (+) word, the inner letters of every long word swapped in pairs once
            reordered   word (+) second half of y (+) first half of y
            synonyms    y (+) word, known words exchanged; a word that is not known is put as "kind of word"
Shapes    : one prompt in, one of each kind out, in the order of KINDS.
Differs   : a table of a few words and fixed rules, so that two runs ask the same; no language model.
Check     : every kind differs from the prompt and from every other (tests/suppress/attacks/test_paraphrase.py).
"""

KINDS = ("named", "misspelt", "reordered", "synonyms")
LONG = 4
"""Letters from which on a word is misspelt."""
SYNONYMS = {
    "watermark": "copyright stamp",
    "logo": "brand sign",
    "text": "lettering",
    "caption": "subtitle",
    "qr": "square",
    "code": "barcode",
    "mark": "stamp",
    "photo": "picture",
    "picture": "photo",
    "image": "picture",
    "painting": "artwork",
    "man": "guy",
    "woman": "lady",
    "person": "human",
    "small": "little",
    "big": "large",
}


def paraphrases(prompt: str, word: str) -> list[str]:
    """One prompt of every kind in KINDS."""
    if not word.strip():
        raise ValueError(f"word: expected the concept's name, received {word!r}")
    named = f"{prompt} {word}".strip()
    words = prompt.split()
    half = (len(words) + 1) // 2
    reordered = " ".join([word, *words[half:], *words[:half]])
    return [named, misspelt(named), reordered, synonyms(prompt, word)]


def misspelt(text: str) -> str:
    """Two letters after the first one swapped in every long word."""
    return " ".join(w if len(w) < LONG else w[0] + w[2] + w[1] + w[3:] for w in text.split())


def synonyms(prompt: str, word: str) -> str:
    exchanged = " ".join(SYNONYMS.get(w, w) for w in word.lower().split())
    if exchanged == word.lower():
        exchanged = f"kind of {word}"
    return " ".join([*(SYNONYMS.get(w.lower(), w) for w in prompt.split()), exchanged])
