"""Distances between sets, each against a closed form; the classifier in which some of them are computed."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgen.training import metrics
from diffgen.training.classifier import FEATURES, Classifier, accuracy, features, shrunk, train_classifier, turned
from diffgen.training.metrics import (
    density_and_coverage,
    frechet,
    memorisation_ratio,
    nearest,
    nearest_neighbour_accuracy,
    sliced_wasserstein,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(mean, factor, count=200, seed=0):
    """Examples whose mean is `mean` and whose covariance is factor·factorᵀ, not only on average."""
    x = draw(count, len(mean), seed=seed)
    x = x - x.mean(0)
    return mean + torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T @ factor.T


# Sliced Wasserstein


def test_sliced_wasserstein_of_a_shift():
    """W₂(θ·a, θ·(a + v)) = |θ·v|, whose square is |v|²/D on average."""
    a, v = draw(50, 9), torch.tensor([3.0, 0, 0, 4, 0, 0, 0, 0, 0])
    assert sliced_wasserstein(a, a + v, projections=20_000) == pytest.approx(5 / 3, rel=0.02)
    assert sliced_wasserstein(a, a.flip(0)) == 0


def test_sliced_wasserstein_of_gaussians():
    """Of N(0, s²) and N(0, 1): |s − 1| in each direction."""
    assert sliced_wasserstein(3 * draw(4000, 4), draw(4000, 4, seed=1)) == pytest.approx(2, rel=0.03)


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=7), st.lists(st.integers(-9, 9), min_size=1, max_size=7))
@settings(max_examples=50, deadline=None)
def test_sliced_wasserstein_in_one_dimension_is_exact(a, b):
    """By repeating the examples until both sets have one size."""
    size = math.lcm(len(a), len(b))
    one, other = (np.repeat(sorted(x), size // len(x)).astype(float) for x in (a, b))
    column = [torch.tensor(x)[:, None] for x in (a, b)]
    assert sliced_wasserstein(*column, projections=3) == pytest.approx(np.sqrt(np.mean((one - other) ** 2)))


def test_sliced_wasserstein_in_blocks(monkeypatch):
    a, b = draw(30, 5), draw(20, 5, seed=1)
    expected = sliced_wasserstein(a, b)
    monkeypatch.setattr(metrics, "AT_ONCE", 200)
    assert sliced_wasserstein(a, b) == pytest.approx(expected, rel=1e-12)


# Fréchet


def test_frechet_of_gaussians_is_exact():
    mean, other = draw(6), draw(6, seed=1)
    fa, fb = torch.linalg.cholesky(torch.eye(6) * 2 + (m := draw(6, 6)) @ m.T), draw(6, 6, seed=3)
    sa, sb = (fa @ fa.T).numpy(), (fb @ fb.T).numpy()
    expected = float((mean - other).square().sum()) + np.trace(sa + sb - 2 * scipy.linalg.sqrtm(sa @ sb).real)
    assert frechet(exactly(mean, fa), exactly(other, fb, seed=5)) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_equal_and_of_few():
    a = draw(8, 20)  # singular: fewer examples than dimensions
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, a + 1) == pytest.approx(20)
    assert frechet(torch.tensor([[0.0], [2]]), torch.tensor([[5.0], [5]])) == pytest.approx(16 + 2)
    with pytest.raises(ValueError, match="at least two"):
        frechet(a, a[:1])


# Nearest neighbours


def test_nearest_neighbours_of_one_distribution_are_right_half_of_the_time():
    values = [nearest_neighbour_accuracy(draw(100, 3, seed=s), draw(100, 3, seed=s + 100)) for s in range(30)]
    assert np.mean(values) == pytest.approx(0.5, abs=0.02)
    unequal = [nearest_neighbour_accuracy(draw(400, 3, seed=s), draw(40, 3, seed=s + 100)) for s in range(30)]
    assert np.mean(unequal) == pytest.approx(0.5, abs=0.03)


def test_nearest_neighbours_far_apart_and_copied():
    a = draw(40, 3)
    assert nearest_neighbour_accuracy(a, a + 100) == 1
    assert nearest_neighbour_accuracy(a, a) == 0
    assert nearest_neighbour_accuracy(a, a + 1e-9) == 0


def test_nearest_neighbours_that_are_equally_near_count_in_part():
    """Where all are one point, of the 2n − 1 others n − 1 are of the own set."""
    same = torch.zeros(5, 2)
    assert nearest_neighbour_accuracy(same, same) == pytest.approx(4 / 9)


def test_nearest_neighbours_in_blocks(monkeypatch):
    a, b = draw(30, 5), draw(50, 5, seed=1)
    expected = nearest_neighbour_accuracy(a, b), density_and_coverage(a, b), nearest(a, b)
    monkeypatch.setattr(metrics, "AT_ONCE", 400)
    assert nearest_neighbour_accuracy(a, b) == expected[0]
    assert density_and_coverage(a, b) == expected[1]
    assert torch.equal(nearest(a, b)[1], expected[2][1])


def test_nearest_against_all_distances():
    a, b = draw(20, 4), draw(50, 4, seed=1)
    every = torch.tensor(np.linalg.norm(a.numpy()[:, None] - b.numpy()[None], axis=2))
    distance, number = nearest(a, b)
    torch.testing.assert_close(distance, every.min(1).values)
    assert torch.equal(number, every.argmin(1))
    own = torch.arange(50)
    distance, number = nearest(b, b, leave_out=own)
    assert bool((number != own).all())
    torch.testing.assert_close(distance, torch.cdist(b, b).fill_diagonal_(9e9).min(1).values)


# Density and coverage


def test_density_and_coverage_by_hand():
    """Balls with k = 1 round 0, 1 and 10, with radii 1, 1 and 9: 0.5 lies in two, 8 in one, 30 in none."""
    real = torch.tensor([[0.0], [1], [10]])
    assert density_and_coverage(real, torch.tensor([[0.5]]), k=1) == (2, 2 / 3)
    assert density_and_coverage(real, torch.tensor([[0.5], [8], [30]]), k=1) == (1, 1)
    assert density_and_coverage(real, torch.tensor([[30.0]]), k=1) == (0, 0)


@pytest.mark.parametrize(("n", "m", "k"), [(30, 30, 5), (40, 12, 3)])
def test_density_and_coverage_of_one_distribution(n, m, k):
    """Density 1; a ball is empty if all k nearest of the N + M − 1 others are real: C(N−1, k)/C(N+M−1, k)."""
    values = [density_and_coverage(draw(n, 2, seed=s), draw(m, 2, seed=s + 1000), k) for s in range(200)]
    density, coverage = np.mean(values, axis=0)
    assert density == pytest.approx(1, abs=0.03)
    assert coverage == pytest.approx(1 - math.comb(n - 1, k) / math.comb(n + m - 1, k), abs=0.012)


def test_density_and_coverage_need_neighbours():
    with pytest.raises(ValueError, match="more than 5 real examples, there are 5"):
        density_and_coverage(draw(5, 2), draw(9, 2))


# Memorisation


def test_memorisation():
    train, test = draw(100, 8), draw(50, 8, seed=1)
    assert memorisation_ratio(train[:30], train, test) == pytest.approx(0, abs=1e-6)
    assert memorisation_ratio(test, train, test) == 1
    assert memorisation_ratio(10 * test, train, test) > 5
    values = torch.randint(17, (60, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert memorisation_ratio(values[:20], values[:40], values[40:]) == 0  # whole numbers are compared exactly
    with pytest.raises(ValueError, match="copies"):
        memorisation_ratio(test, train, train[:10])


@pytest.mark.parametrize("metric", [sliced_wasserstein, frechet, nearest_neighbour_accuracy, density_and_coverage])
@pytest.mark.parametrize("shapes", [((9, 3), (9, 4)), ((9, 3), (0, 3)), ((9,), (9,))])
def test_refused_comparisons(metric, shapes):
    with pytest.raises(ValueError, match="expected"):
        metric(*map(torch.zeros, shapes))


# The classifier


def blobs(count, side=8, seed=0):
    """Noisy pictures that are bright at the left (0) or at the right (1)."""
    labels = torch.arange(count) % 2
    x = 0.5 * draw(count, 1, side, side, seed=seed).float()
    half = side // 2
    x[labels == 0, :, :, :half] += 0.5
    x[labels == 1, :, :, half:] += 0.5
    return x, labels


def test_classifier_learns_and_is_the_same_again():
    x, labels = blobs(100)
    state = torch.get_rng_state()
    one, again = (train_classifier(x, labels, 2, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    new, new_labels = blobs(600, seed=1)
    assert accuracy(one, new, new_labels) > 0.97
    assert accuracy(one, new, 1 - new_labels) < 0.03
    assert features(one, new).shape == (600, FEATURES)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 8), (32, 20), (100, 40)])
def test_classifier_of_any_size(size):
    classifier = Classifier(3, size, 4)
    assert classifier(torch.zeros(2, 3, *size)).shape == (2, 4)


def test_large_pictures_are_averaged():
    assert torch.equal(shrunk(torch.ones(1, 1, 96, 8)), torch.ones(1, 1, 32, 8))
    stripes = torch.tensor([0.0, 2]).repeat(32).expand(1, 1, 64, 64)
    torch.testing.assert_close(shrunk(stripes), torch.ones(1, 1, 32, 32))


def test_positions():
    x = torch.arange(4.0).reshape(1, 1, 2, 2)
    pictures, labels = turned(x)
    assert labels.tolist() == [0, 1, 2, 3]
    assert [p.flatten().tolist() for p in pictures] == [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]]
    flat = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert len({str(p.tolist()) for p in turned(flat)[0]}) == 4
