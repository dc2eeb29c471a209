# SPDX-License-Identifier: Apache-2.0
"""The concept's word as negative prompt, on a model that nobody touched.

Paper     : classifier-free guidance, Ho & Salimans 2022 (arXiv 2207.12598), the word in place of the empty prompt.
Equation  : eps(word) + s (eps(y) - eps(word))
Shapes    : B images, a prompt each.
Differs   : nothing from the stock pipelines' `negative_prompt`.
Check     : the stock pipeline's images; s = 1 is refused (tests/suppress/baselines/test_negative_prompt.py).
Exempt    : off (without guidance the word does nothing: refused)
"""

from collections.abc import Sequence
from typing import Any

from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.guidance import Negative, check_guidance


def prompts(word: str, count: int) -> list[str]:
    """One negative prompt an image."""
    if not word.strip():
        raise ValueError(f"word: expected the concept's name, received {word!r}: that is guidance without a negative")
    return [word] * count


def guidance(pipe: Any, captions: Sequence[str], word: str, scale: float) -> Negative:
    """For `anabranch.suppress.guidance.sample`.

    Raises:
        UsageError: without guidance the word would do nothing.
    """
    check_guidance(pipe, scale)
    negative = encode_prompts(pipe, prompts(word, len(captions)))
    return Negative(positive=encode_prompts(pipe, captions), negative=negative, scale=scale)
