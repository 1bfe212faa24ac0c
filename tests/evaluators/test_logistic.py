"""Logistic regression by L-BFGS against scipy's in float64; the evaluator chooses a strength and is fitted anew."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy.optimize import minimize

from maskvit.evaluators import logistic
from maskvit.evaluators.frozen import held_out
from maskvit.evaluators.logistic import Regression, Scaler
from maskvit.sharding import make_mesh
from tests.evaluators.test_probe import evaluator, objective, params  # noqa: F401 (fixtures)

CLASSES = 3


def by_scipy(x: np.ndarray, y: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """(Kernel, bias) that minimize |W|^2 / 2 + C sum of losses."""
    x = x.astype(np.float64)

    def loss(flat):
        kernel, bias = flat[:-CLASSES].reshape(x.shape[1], CLASSES), flat[-CLASSES:]
        logits = x @ kernel + bias
        logits -= logits.max(1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        residual = strength * (np.exp(log_p) - np.eye(CLASSES)[y])
        slopes = np.concatenate([(x.T @ residual + kernel).ravel(), residual.sum(0)])
        return 0.5 * (kernel**2).sum() - strength * log_p[np.arange(len(y)), y].sum(), slopes

    options = dict(maxiter=5000, ftol=1e-15, gtol=1e-9)
    found = minimize(loss, np.zeros((x.shape[1] + 1) * CLASSES), jac=True, method="L-BFGS-B", options=options)
    return found.x[:-CLASSES].reshape(x.shape[1], CLASSES), found.x[-CLASSES:]


def test_the_minimum_is_scipys_on_any_number_of_devices(monkeypatch):
    rng = np.random.default_rng(0)
    y = np.arange(50) % CLASSES
    x = (rng.normal(0, 1, (50, 6)) + np.eye(CLASSES)[y].repeat(2, 1)).astype(np.float32)
    monkeypatch.setattr(logistic, "CHUNK", 4)  # several, the last one padded
    for devices, strengths in ((1, (0.1, 2.0)), (4, (2.0,))):
        regression, weights = Regression(x, y, CLASSES, make_mesh(jax.devices()[:devices]), 500, 1e-7), None
        for strength in strengths:
            weights = regression(strength, weights)
            kernel, bias = by_scipy(x, y, strength)
            np.testing.assert_allclose(weights["kernel"], kernel, atol=2e-4)
            np.testing.assert_allclose(weights["bias"] - np.mean(weights["bias"]), bias - bias.mean(), atol=2e-4)


def test_the_scaler_is_the_standard_one(monkeypatch):
    monkeypatch.setattr(logistic, "CHUNK", 7)
    x = np.random.default_rng(1).normal(3, 2, (20, 4)).astype(np.float32)
    x[:, 2] = 5
    scaled = Scaler(x)(x)
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.std(0), [1, 1, 0, 1], atol=1e-5)
    np.testing.assert_array_equal(Scaler(x, on=False)(x), x)


def test_the_strength_is_chosen_and_the_regression_fitted_anew(objective, params):  # noqa: F811
    strengths = (0.01, 1.0, 100.0)
    block = dict(type="logistic", options=dict(features=("mean",), strengths=strengths, standardize=True, iterations=300), seed=1)
    found = evaluator(objective, **block)
    figures = dict(found.run(params, {}))
    assert set(figures) == {name for name in found.names if "top5" not in name}
    train, test = (found.extractions[split](params, {}, ("mean",)) for split in ("train", "test"))
    fitted, chosen_by = held_out(np.arange(70), 0.1, 1)

    def right(index, x, y, strength):
        known = train.features["mean"][index].astype(np.float64)
        scaled = lambda values: (values - known.mean(0)) / known.std(0)  # noqa: E731
        kernel, bias = by_scipy(scaled(known), train.labels[index], strength)
        return 100 * ((scaled(x) @ kernel + bias).argmax(1) == y).mean()

    scores = [right(fitted, train.features["mean"][chosen_by], train.labels[chosen_by], c) for c in strengths]
    best = strengths[int(np.argmax(scores))]
    assert figures["mean/c"] == best and figures["mean/held_out_top1"] == pytest.approx(max(scores))
    assert figures["mean/top1"] == pytest.approx(right(np.arange(70), test.features["mean"], test.labels, best))


def test_pixels_are_a_baseline(objective, params):  # noqa: F811
    found = evaluator(objective, type="logistic", options=dict(features=("both", "raw_pixels"), strengths=(1.0,), standardize=True))
    figures = dict(found.run(params, {}))
    assert {"both/top1", "raw_pixels/top1", "raw_pixels/c"} <= set(figures) and "global/top1" not in figures
    train = found.extractions["train"](params, {}, ("raw_pixels",))
    test = found.extractions["test"](params, {}, ("raw_pixels",))
    known = train.features["raw_pixels"].astype(np.float64)
    mean, deviation = known.mean(0), np.where(known.std(0) > 0, known.std(0), 1)
    kernel, bias = by_scipy((known - mean) / deviation, train.labels, 1.0)
    answers = (((test.features["raw_pixels"] - mean) / deviation) @ kernel + bias).argmax(1)
    assert figures["raw_pixels/top1"] == pytest.approx(100 * (answers == test.labels).mean(), abs=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(strengths=(0.0, 1.0)), "strengths is .*; give numbers above 0"),
        (dict(iterations=0), "iterations is 0; it must be at least 1"),
        (dict(features=("tokens",)), "logistic regression features names 'tokens'; known: mean, global, both, mean_colour, raw_pixels"),
    ],
)
def test_mistakes_are_named(objective, options, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        evaluator(objective, type="logistic", options=options)


def test_examples_that_are_left_out_change_nothing():
    rng = np.random.default_rng(2)
    y = np.arange(40) % CLASSES
    x = rng.normal(0, 1, (40, 5)).astype(np.float32)
    left_out = rng.random(40) < 0.3
    weights = Regression(x, y, CLASSES, make_mesh(jax.devices()[:1]), 500, 1e-7)(0.5, left_out=left_out)
    kernel, bias = by_scipy(x[~left_out], y[~left_out], 0.5)
    np.testing.assert_allclose(weights["kernel"], kernel, atol=2e-4)
    np.testing.assert_allclose(weights["bias"] - np.mean(weights["bias"]), bias - bias.mean(), atol=2e-4)
