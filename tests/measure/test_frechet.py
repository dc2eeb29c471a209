# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from anabranch.measure.frechet import caution, distances, floor, frechet, gaussian_distance, kid


def slow_kid(x, y):
    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def within(z):
        pairs = [kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j]
        return sum(pairs) / len(pairs)

    across = [kernel(a, b) for a in x for b in y]
    return within(x) + within(y) - 2 * sum(across) / len(across)


def test_diagonal_gaussians_have_a_closed_form():
    one, other = np.array([1.0, 4.0, 0.0]), np.array([9.0, 4.0, 0.25])
    shift = np.array([3.0, 0.0, -1.0])
    found = gaussian_distance(np.zeros(3), np.diag(one), shift, np.diag(other))
    assert found == pytest.approx(10 + ((np.sqrt(one) - np.sqrt(other)) ** 2).sum())


def test_a_shift_costs_its_square_and_nothing_else():
    x = np.random.default_rng(0).normal(size=(300, 5))
    assert frechet(x, x + np.arange(5)) == pytest.approx(30)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


@settings(deadline=None, max_examples=200)
@given(n=st.integers(2, 9), m=st.integers(2, 9), width=st.integers(1, 4), seed=st.integers(0, 2**31 - 1))
def test_distances_are_symmetric_blind_to_order_and_what_the_slow_loops_say(n, m, width, seed):
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(n, width)), 2 * generator.normal(size=(m, width)) + 1
    assert kid(x, y) == pytest.approx(slow_kid(x.tolist(), y.tolist()), abs=1e-9)
    assert frechet(x, y) >= 0
    for distance in (frechet, kid):
        assert distance(y, x[::-1]) == pytest.approx(distance(x, y), abs=1e-7)


def test_the_square_root_is_that_of_scipy():
    generator = np.random.default_rng(0)
    a, b = (generator.normal(size=(40, 6)) @ generator.normal(size=(6, 6)) for _ in range(2))
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet(a, b) == pytest.approx(expected)


def test_without_a_difference_kid_is_zero_on_average_and_frechet_falls_with_more_images():
    generator = np.random.default_rng(0)
    draws = [generator.normal(size=(2, 60, 4)) for _ in range(200)]
    values = [kid(x, y) for x, y in draws]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    few, many = (frechet(*generator.normal(size=(2, n, 4))) for n in (50, 5000))
    assert few > 10 * many


def test_a_real_difference_stands_above_its_floor_and_the_space_is_named():
    generator = np.random.default_rng(0)
    real, made = generator.normal(size=(400, 8)), generator.normal(0.5, 1, (300, 8))
    found = distances(real, made, "small garment network, layer 2", generator)
    assert found.frechet > 5 * found.frechet_floor
    assert found.kid > 5 * abs(found.kid_floor)
    assert found.feature_space == "small garment network, layer 2"
    assert (found.num_reference, found.num_generated) == (400, 300)
    assert "300 images are fewer than 2,048" in found.note


def test_few_images_are_said():
    assert "singular; read KID" in caution(40, 48)
    assert caution(2048, 48) == ""


def test_a_floor_follows_its_generator():
    x = np.random.default_rng(1).normal(size=(50, 3))
    assert floor(x, np.random.default_rng(0)) == floor(x, np.random.default_rng(0)) > 0
    assert floor(x, np.random.default_rng(0)) != floor(x, np.random.default_rng(2))


def test_features_that_do_not_fit_are_refused():
    x = np.zeros((5, 3))
    with pytest.raises(ValueError, match="generated: expected 3 features as in reference, received 2"):
        frechet(x, np.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"reference: expected finite \(at least 2 images, features\)"):
        kid(np.full((5, 3), np.nan), x)
    with pytest.raises(ValueError, match="features: expected at least 4 images"):
        floor(x[:3], np.random.default_rng(0))
