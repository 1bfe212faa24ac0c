"""Figures of normals against float64 numpy, in any cut and with padding."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.metrics import normals
from maskvit.metrics.accumulate import added

RNG = np.random.default_rng(0)
N, H, W = 5, 40, 30
TARGET = RNG.standard_normal((N, H, W, 3)).astype(np.float32)
PREDICTION = (TARGET + 0.5 * RNG.standard_normal(TARGET.shape)).astype(np.float32)
KNOWN = RNG.random((N, H, W)) < 0.7
TARGET[0, 0] = 0.0  # no direction
TARGET[1, 0, :, 2] = np.nan
COUNTED = KNOWN & np.isfinite(TARGET).all(axis=-1) & (TARGET != 0).any(axis=-1)


def summed(cuts, prediction=PREDICTION):
    """The sums over batches that end at `cuts`, each with a picture of padding."""
    total = None
    for start, end in zip([0, *cuts], [*cuts, N], strict=True):
        rows = np.r_[start:end, 2]
        given = (jnp.asarray(x[rows]) for x in (prediction, TARGET, KNOWN))
        total = added(total, normals.sums(*given, jnp.arange(len(rows)) < end - start))
    return total


@pytest.fixture(scope="module")
def angles():
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    p, t = (unit(x[COUNTED].astype(float)) for x in (PREDICTION, TARGET))
    return np.degrees(np.arccos((p * t).sum(axis=-1)))


def test_figures_by_their_definition(angles):
    figures = normals.summarize(summed([]))
    assert list(figures) == ["mean", "median", "rmse", "under_11.25", "under_22.5", "under_30"]
    np.testing.assert_allclose(figures["mean"], angles.mean(), rtol=1e-5)
    np.testing.assert_allclose(figures["rmse"], np.sqrt((angles**2).mean()), rtol=1e-5)
    np.testing.assert_allclose(figures["median"], np.median(angles), atol=0.01)
    for threshold in (11.25, 22.5, 30):
        np.testing.assert_allclose(figures[f"under_{threshold:g}"], 100 * (angles < threshold).mean())


@pytest.mark.parametrize("cuts", [[1], [2, 3, 4]])
def test_sums_are_the_same_in_any_cut(cuts):
    ours, whole = summed(cuts), summed([])
    for name in ("pixels", "under", "histogram"):
        assert getattr(ours, name).dtype == np.int64
        np.testing.assert_array_equal(getattr(ours, name), getattr(whole, name))
    np.testing.assert_allclose((ours.angle, ours.square), (whole.angle, whole.square), rtol=1e-6)
    assert whole.pixels == COUNTED.sum() == whole.histogram.sum()


def test_lengths_do_not_matter_and_none_is_a_right_angle():
    figures = normals.summarize(summed([2], 7 * PREDICTION))
    for name, value in normals.summarize(summed([2])).items():
        np.testing.assert_allclose(figures[name], value, rtol=1e-3)
    assert normals.summarize(summed([], np.zeros_like(PREDICTION)))["mean"] == pytest.approx(90)
    opposite = normals.summarize(summed([], -np.nan_to_num(TARGET)))
    assert opposite["mean"] == pytest.approx(180, rel=1e-4) and opposite["median"] == pytest.approx(180, abs=0.01)


def test_nothing_valid():
    nothing = normals.summarize(normals.sums(jnp.ones((1, 2, 2, 3)), jnp.zeros((1, 2, 2, 3))))
    assert np.isnan(list(nothing.values())).all()
