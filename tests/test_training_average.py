"""Averages of weights against the sums that define them, and streams of random numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffgen.training import seeds
from diffgen.training.ema import Average, decay, exponent


@given(st.floats(0.005, 0.28))
def test_the_exponent_has_that_length(length: float) -> None:
    """EDM2 eq. 126 is the standard deviation of a density ∝ i^γ on [0, 1]: by its moments 1/(γ + 1 + n)."""
    g = exponent(length)
    mean, square = (g + 1) / (g + 2), (g + 1) / (g + 3)
    assert (square - mean**2) ** 0.5 == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("length", [0.0, 0.2887, -1.0])
def test_a_length_that_no_exponent_has(length: float) -> None:
    with pytest.raises(ValueError, match="length of an average"):
        exponent(length)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.25])
def test_the_average_is_the_weighted_sum(length: float) -> None:
    """Against the sum itself: step i has the weight (1 − β_i)·Π_{j > i} β_j, which tends to ∝ i^γ."""
    n = 400
    values = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    betas = np.array([decay(exponent(length), i) for i in range(1, n + 1)])
    weights = (1 - betas) * np.append(np.cumprod(betas[::-1])[::-1][1:], 1)
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = Average({"p": parameter}, length)
    for i in range(n):
        parameter.data.copy_(values[i])
        average.update(i + 1)
    torch.testing.assert_close(average.values[0].double(), torch.from_numpy(weights) @ values, atol=1e-5, rtol=0)
    ideal = np.arange(1, n + 1) ** exponent(length)
    assert np.abs(np.cumsum(weights) - np.cumsum(ideal / ideal.sum())).max() < 0.02
    positions = np.arange(1, n + 1) / n
    spread = np.sqrt(weights @ positions**2 - (weights @ positions) ** 2)
    assert spread == pytest.approx(length, rel=0.01)


def test_after_one_step_nothing_of_the_first_weights_is_left() -> None:
    parameter = torch.nn.Parameter(torch.full((2,), 1e6))
    average = Average({"p": parameter}, 0.1)
    parameter.data.fill_(3.0)
    average.update(1)
    assert average.values[0].tolist() == [3.0, 3.0]


def test_bits_are_well_mixed() -> None:
    """One more in a word changes every bit half of the time, and no two words share a stream."""
    n = 4000
    mixed = np.array([seeds.mix(0, seeds.STEP, k) for k in range(n + 1)], dtype=np.uint64)
    changed = np.unpackbits((mixed[1:] ^ mixed[:-1]).view(np.uint8).reshape(n, 8), axis=1).mean(0)
    assert np.abs(changed - 0.5).max() < 5 * 0.5 / n**0.5
    words = [(a, b, c) for a in range(20) for b in range(6) for c in range(20)]
    assert len({seeds.mix(*word) for word in words}) == len(words)
    assert len({seeds.mix(*word) & 0xFFFFFFFF for word in words}) == len(words)  # what torch takes of it on a CPU
    assert seeds.mix(1, 2) != seeds.mix(2, 1)


def test_splitmix_is_splitmix() -> None:
    """The first output of SplitMix64 from the state 0 (Vigna's reference implementation)."""
    assert seeds.mix(0) == 0xE220A8397B1DCDAF
