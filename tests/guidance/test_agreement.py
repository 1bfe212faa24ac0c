"""Agreement between guidances: exact values on small cases, chance and ceiling."""

from __future__ import annotations

import numpy as np
import pytest

from maskvit.core.types import TokenLayout
from maskvit.guidance.agreement import agreement, chance, corrected, lowest, mean_over_modalities, overlap, ranks, spearman

LAYOUT = TokenLayout(("rgb", "depth"), ((10, 10), (4, 5)))


def test_ranks_and_spearman_with_ties():
    np.testing.assert_array_equal(ranks(np.array([3.0, 1.0, 3.0, 2.0])), [2.5, 0, 2.5, 1])
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a = rng.integers(0, 8, 50).astype(float)
    b = a + rng.integers(0, 5, 50)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(a, np.ones(50)) == 0.0


def test_lowest_breaks_ties_by_index():
    assert lowest(np.array([1.0, 0.0, 1.0, 1.0]), 2).tolist() == [True, True, False, False]


def test_overlap_by_hand():
    exact = np.arange(100.0)[None]
    shifted = (np.arange(100.0)[None] + 10) % 100  # the ten last become the lowest, the others keep their order
    found = overlap(shifted, exact)
    assert found["low"] == pytest.approx(7 / 17)
    assert found["high"] == pytest.approx(15 / 25)
    assert overlap(exact, exact) == dict(low=1.0, high=1.0, spearman=pytest.approx(1.0))
    assert overlap(-exact, exact) == dict(low=0.0, high=0.0, spearman=pytest.approx(-1.0))


def test_random_scores_are_at_chance_and_the_mirrored_ones_at_one():
    rng = np.random.default_rng(1)
    exact = rng.random((400, 120))
    mirrored = exact + 0.3 * rng.random((400, 120))
    base = chance(100)
    assert base == dict(low=0.17, high=0.25, spearman=0.0)
    found = agreement(rng.random((400, 120)), exact, mirrored, LAYOUT)
    assert set(found) == {"rgb", "depth"}
    for key in base:
        assert found["rgb"][key] == pytest.approx(base[key], abs=0.02)
        assert found["rgb"][f"{key}_corrected"] == pytest.approx(0.0, abs=0.03)
    same = agreement(mirrored, exact, mirrored, LAYOUT)
    assert all(values[f"{key}_corrected"] == pytest.approx(1.0) for values in same.values() for key in base)
    assert mean_over_modalities(same)["low"] == pytest.approx((same["rgb"]["low"] + same["depth"]["low"]) / 2)


def test_a_ceiling_at_chance_gives_no_number():
    assert np.isnan(corrected(0.3, 0.17, 0.17)) and np.isnan(corrected(0.3, 0.17, 0.1))
    found = {"rgb": {"low": 0.5, "low_corrected": 0.8}, "depth": {"low": 0.3, "low_corrected": float("nan")}}
    assert mean_over_modalities(found) == {"low": pytest.approx(0.4), "low_corrected": pytest.approx(0.8)}
