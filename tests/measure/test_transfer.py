# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from anabranch.measure.transfer import TransferScores, best_source, summarise


def scores(own, others, shared, seeds=3, without=None):
    """One task of two sources and the mixture; the first source is its own."""
    noise = np.array([-0.1, 0.0, 0.1, 0.05, -0.05])[:seeds, None, None]
    table = np.array([own, others, shared], float)[None, :, None] + noise
    other = np.array([others, own, shared], float)[None, :, None] + noise  # a second task, its mirror image
    both = np.concatenate([table + np.array([0.05, 0, -0.05])[None, :, None] * noise * 10, other], 2)
    return TransferScores(
        sources=("a", "b"), tasks=("ta", "tb"), own=(0, 1), accuracy=both, choose=both, report=both, without=without
    )


def test_semantic_harm_undertraining_help_and_no_answer():
    cases = {
        (80, 60, 70): ("hurt by sharing", "semantic"),
        (80, 80, 70): ("hurt by sharing", "under-trained"),
        (60, 50, 70): ("helped by sharing", "none"),
        (70, 60, 70): ("cannot tell at this budget", "none"),
    }
    for (own, others, shared), expected in cases.items():
        task = summarise(scores(own, others, shared))["tasks"][0]
        assert (task["verdict"], task["cause"]) == expected
        assert task["gap_own"]["mean"] == pytest.approx(own - shared, abs=0.1)
        assert task["specificity"]["mean"] == pytest.approx(own - others, abs=0.1)


def test_a_cause_that_cannot_be_told_is_not_told():
    """Seeds disagree about the other source: no word of under-training follows from that."""
    accuracy = np.array([[80, 60, 70], [80, 85, 70], [80, 62, 70]], float)[:, :, None]
    parts = dict.fromkeys(("accuracy", "choose", "report"), accuracy)
    task = summarise(TransferScores(sources=("a", "b"), tasks=("t",), own=(0,), **parts))["tasks"][0]
    assert (task["verdict"], task["cause"]) == ("hurt by sharing", "open")
    assert "cannot be told" in task["sentence"]


def test_one_seed_never_tells():
    task = summarise(scores(90, 10, 50, seeds=1))["tasks"][0]
    assert task["verdict"] == "cannot tell at this budget"


def test_the_best_source_is_chosen_on_other_images_than_it_is_reported_on():
    """Pure noise: chosen and reported on the same numbers the gap is positive, here it is not biased."""
    generator = np.random.default_rng(0)
    gaps = []
    for _ in range(400):
        choose, report = generator.normal(50, 3, (2, 1, 9, 1))
        parts = {"accuracy": (choose + report) / 2, "choose": choose, "report": report}
        noise = TransferScores(sources=tuple("abcdefgh"), tasks=("t",), own=(0,), **parts)
        gaps.append(summarise(noise)["tasks"][0]["ntg"]["mean"])
    assert abs(np.mean(gaps)) < 0.6
    assert np.mean([r.max() for r in generator.normal(0, 3, (400, 8))]) > 3


def test_harm_is_what_leaving_a_source_out_gains():
    without = np.full((3, 2, 2), 70.0)
    without[:, 1, 0] = 75
    result = summarise(scores(80, 60, 70, without=without))
    assert result["harm"][1][0]["mean"] == pytest.approx(5, abs=0.1)
    assert result["harm"][0][0]["mean"] == pytest.approx(0, abs=0.1)
    assert summarise(scores(80, 60, 70))["harm"] is None


def test_matrix_rows_are_sources_then_all():
    table = summarise(scores(80, 60, 70))["matrix"]
    assert table["rows"] == ["a", "b", "all"]
    assert table["columns"] == ["ta", "tb"]
    assert [row[0]["mean"] for row in table["accuracy"]] == pytest.approx([80, 60, 70], abs=0.1)
    assert [row[0]["mean"] for row in table["minus_shared"]] == pytest.approx([10, -10], abs=0.1)
    assert best_source(scores(80, 60, 70), 1) == 1


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"expected shape \(3, 3, 1\)"):
        TransferScores(
            sources=("a", "b"),
            tasks=("t",),
            own=(0,),
            **dict.fromkeys(("accuracy", "choose", "report"), np.zeros((3, 2, 1))),
        )
