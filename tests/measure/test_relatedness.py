# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from anabranch.measure.relatedness import agreement, relatedness


def test_a_task_is_related_to_the_source_it_was_drawn_from():
    generator = np.random.default_rng(0)
    big, small = generator.normal(0, 1, (900, 5)), generator.normal(4, 1, (60, 5))
    tasks = [generator.normal(0, 1, (50, 5)), generator.normal(4, 1, (50, 5)), np.concatenate([big[:30], small[:10]])]
    r = relatedness(tasks, [big, small])
    assert r.sum(1) == pytest.approx(1)
    assert r[0, 0] > 0.95
    assert r[1, 1] > 0.95
    assert r[2, 1] == pytest.approx(0.25, abs=0.05)
    assert agreement(r, [0, 1, 1]) == pytest.approx(2 / 3)
