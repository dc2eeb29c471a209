# SPDX-License-Identifier: Apache-2.0
"""Which places a negative prompt names: the policies.

Paper     : Geom-Erasing (ECCV 2024, arXiv 2310.05873): name and location tokens as the negative prompt, from a reading
            note; which locations stand there when none is known is not told.
Equation  : y_neg = y_im (+) { <l_m_n> : (m, n) in S }
Shapes    : n images, a prompt each; S a set of bins.
Differs   : policies are ours. none: the empty prompt. name: S empty. sampled: the bins of one training image. prior:
            the commonest bins, up to 90 % of all that were covered. all: every bin. detected: the bins of what a
            detector finds in the picture made without; only those pictures are made again.
Check     : tests/suppress/geom_erasing/test_negatives.py
"""

from collections import Counter
from collections.abc import Sequence

import torch

from anabranch.errors import UsageError, did_you_mean
from anabranch.suppress.geom_erasing.bins import Bin
from anabranch.suppress.geom_erasing.words import Vocabulary

POLICIES = ("none", "name", "sampled", "prior", "all", "detected")
PRIOR_SHARE = 0.9


def prior_bins(training_bins: Sequence[Sequence[Bin]], most: int, share: float = PRIOR_SHARE) -> list[Bin]:
    """The commonest bins that together hold `share` of all covered ones, at most `most`, row by row."""
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected 0 to 1, received {share}")
    counts = Counter(place for bins in training_bins for place in bins)
    total, held, kept = sum(counts.values()), 0, []
    for place, count in sorted(counts.items(), key=lambda item: (-item[1], item[0][1], item[0][0])):
        if held >= share * total or len(kept) == most:
            break
        kept.append(place)
        held += count
    return sorted(kept, key=lambda place: (place[1], place[0]))


def negative_prompts(
    policy: str,
    vocabulary: Vocabulary,
    count: int,
    *,
    training_bins: Sequence[Sequence[Bin]] = (),
    most: int,
    seed: int = 0,
    detected: Sequence[Sequence[Bin]] | None = None,
) -> list[str]:
    """One negative prompt an image.

    training_bins  of the images that contained the concept, for `sampled` and `prior`.
    most           bins that a prompt has room for.
    detected       bins an image, [] where nothing was found: its negative prompt is empty.

    Raises:
        UsageError: an unknown policy, or one that has nothing to draw from, or more bins than there is room for.
    """
    if policy not in POLICIES:
        raise UsageError(f"there is no policy {policy!r}", hint=did_you_mean(policy, POLICIES))
    if policy in ("none", "name"):
        return ["" if policy == "none" else vocabulary.suffix([])] * count
    if policy == "all":
        if len(vocabulary.grid) > most:
            raise UsageError(
                "a prompt cannot name every bin of the grid",
                expected=f"at most {most} bins",
                received=f"{len(vocabulary.grid)}",
                hint="policy prior or sampled, or a coarser --grid when training",
            )
        return [vocabulary.suffix(vocabulary.grid.bins())] * count
    if policy == "detected":
        if detected is None:
            raise UsageError("policy detected needs a detector", expected="--detector", hint="or the policy name")
        return [vocabulary.suffix(bins) if bins else "" for bins in detected]
    known = [list(bins) for bins in training_bins if bins]
    if not known:
        raise UsageError(f"policy {policy} has no training boxes to draw from", hint="the policy name")
    if policy == "prior":
        return [vocabulary.suffix(prior_bins(known, most))] * count
    generator = torch.Generator().manual_seed(seed)
    return [vocabulary.suffix(known[i]) for i in torch.randint(len(known), (count,), generator=generator).tolist()]


def strangers(policy: str, vocabulary: Vocabulary, training_bins: Sequence[Sequence[Bin]], most: int) -> str | None:
    """A warning when a policy names more bins than any training caption held."""
    longest = max((len(bins) for bins in training_bins), default=0)
    named = {"all": len(vocabulary.grid), "prior": len(prior_bins(training_bins, most))}.get(policy, 0)
    if named <= longest:
        return None
    return (
        f"policy {policy} names {named} bins, the longest training caption named {longest}: such prompts are "
        "strange to the model, and made more of the concept where we measured it; try name or detected"
    )
