import pytest

from anabranch.errors import UsageError
from anabranch.suppress.geom_erasing.bins import Grid
from anabranch.suppress.geom_erasing.negatives import negative_prompts, prior_bins, strangers
from anabranch.suppress.geom_erasing.words import Vocabulary

WORDS = Vocabulary(name="<mark>", grid=Grid(3, 3))
SEEN = [[(0, 0), (1, 0)]] * 9 + [[(2, 2)]]


def test_every_policy_on_known_boxes():
    def made(policy, **more):
        return negative_prompts(policy, WORDS, 2, training_bins=SEEN, most=13, **more)

    assert made("none") == ["", ""]
    assert made("name") == ["<mark>"] * 2
    assert made("prior") == ["<mark> <l_0_0> <l_1_0>"] * 2
    assert made("all")[0].split() == WORDS.words()
    assert made("detected", detected=[[(2, 1)], []]) == ["<mark> <l_2_1>", ""]


def test_sampled_draws_training_boxes_in_their_proportion_and_by_seed():
    drawn = negative_prompts("sampled", WORDS, 2000, training_bins=SEEN, most=13, seed=1)
    assert set(drawn) == {"<mark> <l_0_0> <l_1_0>", "<mark> <l_2_2>"}
    assert drawn.count("<mark> <l_2_2>") == pytest.approx(200, abs=45)
    assert drawn == negative_prompts("sampled", WORDS, 2000, training_bins=SEEN, most=13, seed=1)
    assert drawn != negative_prompts("sampled", WORDS, 2000, training_bins=SEEN, most=13, seed=2)


def test_prior_holds_nine_tenths_of_what_was_covered_and_no_more_bins_than_fit():
    assert prior_bins(SEEN, most=13) == [(0, 0), (1, 0)]
    assert prior_bins(SEEN, most=1) == [(0, 0)]
    assert prior_bins(SEEN, most=13, share=1.0) == [(0, 0), (1, 0), (2, 2)]


def test_what_cannot_be_said_is_refused_and_what_is_strange_is_warned_about():
    with pytest.raises(UsageError, match="did you mean prior"):
        negative_prompts("priors", WORDS, 1, most=13)
    with pytest.raises(UsageError, match="cannot name every bin"):
        negative_prompts("all", WORDS, 1, most=8)
    with pytest.raises(UsageError, match="needs a detector"):
        negative_prompts("detected", WORDS, 1, most=8)
    with pytest.raises(UsageError, match="no training boxes"):
        negative_prompts("prior", WORDS, 1, training_bins=[[]], most=8)
    assert "policy all names 9 bins, the longest training caption named 2" in strangers("all", WORDS, SEEN, 13)
    assert strangers("name", WORDS, SEEN, 13) is None
    assert strangers("prior", WORDS, SEEN, 13) is None
