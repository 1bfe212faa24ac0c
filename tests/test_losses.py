"""Losses and target normalizations against float64 numpy, and their gradients where there is nothing to predict."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.losses.pixels import absolute_error, cross_entropy, masked_mean, normalize_patches, squared_error, standardize_trimmed

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_squared_error():
    prediction, target = array(2, 5, 4, 3), array(2, 5, 4, 3)
    expected = ((prediction.astype(float) - target) ** 2).mean(axis=-1)
    np.testing.assert_allclose(squared_error(jnp.asarray(prediction), jnp.asarray(target)), expected, rtol=2e-6)


def test_absolute_error():
    prediction, target = array(2, 5, 4, 3), array(2, 5, 4, 3)
    expected = np.abs(prediction.astype(float) - target).mean(axis=-1)
    np.testing.assert_allclose(absolute_error(jnp.asarray(prediction), jnp.asarray(target)), expected, rtol=2e-6)


def test_cross_entropy():
    logits, target = 5 * array(2, 5, 4, 7), RNG.integers(-1, 7, (2, 5, 4)).astype(np.int32)
    exact = logits.astype(float)
    expected = np.log(np.exp(exact).sum(axis=-1)) - np.take_along_axis(exact, np.maximum(target, 0)[..., None], -1)[..., 0]
    result = cross_entropy(jnp.asarray(logits), jnp.asarray(target))
    np.testing.assert_allclose(result, np.where(target >= 0, expected, 0), rtol=2e-6, atol=1e-6)
    huge = cross_entropy(jnp.asarray(1e4 * logits), jnp.asarray(target))
    assert np.isfinite(huge).all()


def test_masked_mean_is_a_mean_of_per_sample_means():
    values, weights = array(4, 6, 9), RNG.integers(0, 2, (4, 6, 1)) * np.ones((1, 1, 9))
    weights[2] = 0
    loss_sum, count = masked_mean(jnp.asarray(values), jnp.asarray(weights, jnp.float32))
    means = [(values[i].astype(float) * weights[i]).sum() / weights[i].sum() for i in (0, 1, 3)]
    np.testing.assert_allclose(loss_sum, sum(means), rtol=1e-6)
    assert count == 3


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_sample_with_nothing_to_predict_has_a_finite_zero_gradient(everywhere):
    prediction, target = jnp.asarray(array(3, 4, 4, 2)), jnp.asarray(array(3, 4, 4, 2))
    weights = jnp.ones((3, 4, 4)).at[1].set(0)
    weights = jnp.zeros_like(weights) if everywhere else weights

    def loss(prediction):
        total, count = masked_mean(squared_error(prediction, target), weights)
        return total / jnp.maximum(count, 1)

    value, gradient = jax.value_and_grad(loss)(prediction)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert not np.asarray(gradient[1]).any()
    assert np.asarray(gradient[0]).any() != everywhere


def test_patch_normalization_divides_by_the_unbiased_deviation():
    target = 3 + 2 * array(2, 4, 16, 3)
    result, mean, deviation = normalize_patches(jnp.asarray(target))
    exact = target.astype(float)
    expected_mean = exact.mean(axis=(2, 3), keepdims=True)
    expected_deviation = np.sqrt(exact.var(axis=(2, 3), keepdims=True, ddof=1) + 1e-6)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-6)
    np.testing.assert_allclose(deviation, expected_deviation, rtol=1e-6)
    np.testing.assert_allclose(result, (exact - expected_mean) / expected_deviation, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result * deviation + mean, target, rtol=1e-5, atol=1e-5)


def test_patch_normalization_over_valid_pixels_alone():
    target, valid = array(1, 3, 16, 2), np.ones((1, 3, 16), np.float32)
    valid[0, 1, 5:], valid[0, 2] = 0, 0
    junk = np.where(valid[..., None] > 0, target, 1e6)
    result, mean, deviation = normalize_patches(jnp.asarray(junk, jnp.float32), jnp.asarray(valid))
    alone = normalize_patches(jnp.asarray(target[:, 1:2, :5]))
    np.testing.assert_allclose(result[0, 1, :5], alone[0][0, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean[0, 1], alone[1][0, 0], rtol=1e-5)
    np.testing.assert_allclose(deviation[0, 1], alone[2][0, 0], rtol=1e-5)
    assert np.isfinite(result).all() and np.isfinite(deviation).all()


def test_a_constant_patch_is_finite():
    result, _, deviation = normalize_patches(jnp.full((1, 1, 16, 3), 0.7))
    np.testing.assert_allclose(result, 0, atol=1e-3)
    np.testing.assert_allclose(deviation, 1e-3, rtol=1e-4)


def exact_standard(values: np.ndarray) -> tuple[np.ndarray, float, float]:
    """One sample's values (any shape) by the definition, in float64."""
    ordered = np.sort(values.astype(float).reshape(-1))
    kept = ordered[int(0.1 * ordered.size) : int(0.9 * ordered.size)]
    deviation = math.sqrt(kept.var(ddof=1) + 1e-6)
    return (values - kept.mean()) / deviation, kept.mean(), deviation


@pytest.mark.parametrize("side", [32, 224, 30])
def test_depth_standardization(side):
    values = (20000 + 8000 * array(2, side, side, 1)) / np.float32(65536)
    result, mean, deviation = standardize_trimmed(jnp.asarray(values))
    for i in range(2):
        expected, expected_mean, expected_deviation = exact_standard(values[i])
        np.testing.assert_allclose(result[i], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose([mean[i].item(), deviation[i].item()], [expected_mean, expected_deviation], rtol=1e-5)


def test_outliers_are_transformed_but_not_counted():
    values = np.zeros((1, 10, 10, 1), np.float32)
    values[0, 5:] = 1
    values[0, 0, :4] = -1e6
    result, mean, _ = standardize_trimmed(jnp.asarray(values))
    np.testing.assert_allclose(mean, 40 / 80, rtol=1e-6)
    assert result.min() < -1e6


@pytest.mark.parametrize("share", [0.05, 0.5, 0.97])
def test_standardizing_with_missing_is_standardizing_the_rest(share):
    values = 0.3 + 0.01 * array(3, 40, 40, 1)
    valid = RNG.random((3, 40, 40, 1)) < share
    result, mean, deviation = standardize_trimmed(jnp.asarray(np.where(valid, values, np.nan)), jnp.asarray(valid))
    for i in range(3):
        expected, expected_mean, expected_deviation = exact_standard(values[i][valid[i]])
        np.testing.assert_allclose(np.asarray(result)[i][valid[i]], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose([mean[i].item(), deviation[i].item()], [expected_mean, expected_deviation], rtol=1e-5)
    assert not np.asarray(result)[~valid].any()


def test_nothing_missing_is_the_plain_standardization():
    values = jnp.asarray(array(2, 32, 32, 1))
    for ours, theirs in zip(standardize_trimmed(values), standardize_trimmed(values, jnp.ones(values.shape, bool)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("known", [0, 1, 2])
def test_hardly_any_valid_pixel_stays_finite(known):
    values = jnp.asarray(array(1, 8, 8, 1))
    valid = jnp.asarray(np.arange(64).reshape(1, 8, 8, 1) < known)
    result, mean, deviation = standardize_trimmed(values, valid)
    assert np.isfinite(result).all() and np.isfinite(mean).all() and (np.asarray(deviation) >= 1e-3 * 0.999).all()


def test_trim_positions_are_exact_for_every_count_of_valid_pixels():
    # Read off the bounds through the mean of 0, 1, 2, ...: only exact bounds give the exact mean.
    side = 230
    values = jnp.arange(side * side, dtype=jnp.float32).reshape(1, side, side, 1) / 1024
    means = jax.jit(jax.vmap(lambda n: standardize_trimmed(values, (values * 1024 < n))[1].reshape(())))
    counts = np.array([10, 100, 990, 1000, 1010, 5017, 9990, 30010, 45150, 50000, 50170, 50176, 52900])
    expected = [(int(0.1 * n) + int(0.9 * n) - 1) / 2 / 1024 for n in counts.tolist()]
    np.testing.assert_allclose(means(jnp.asarray(counts)), expected, rtol=2e-6, atol=2e-5)
