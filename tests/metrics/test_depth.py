"""Figures of depth against float64 numpy: ways of averaging, alignment, crop and range, padding and cuts."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.metrics import depth

RNG = np.random.default_rng(0)
N, H, W = 5, 6, 7
TARGET = RNG.uniform(0.5, 9, (N, H, W)).astype(np.float32)
PREDICTION = (TARGET * np.exp(0.3 * RNG.standard_normal(TARGET.shape))).astype(np.float32)
PREDICTION[0, 0, :3] = (-1.0, 0.0, 1e-9)  # predictions that are no depths
KNOWN = RNG.random(TARGET.shape) < 0.7
KNOWN[3] = False


def figures_of(prediction, target):
    """Of pixels in one row, by their definitions."""
    p, t = prediction.astype(float), target.astype(float)
    ratio = np.maximum(p / np.maximum(t, 1e-6), t / np.maximum(p, 1e-6))
    log = np.log(np.maximum(p, 1e-6)) - np.log(np.maximum(t, 1e-6))
    return {
        **{f"delta_{k}": 100 * (ratio < 1.25**k).mean() for k in (1, 2, 3)},
        "abs_rel": (np.abs(p - t) / t).mean(),
        "sq_rel": ((p - t) ** 2 / t).mean(),
        "rmse": np.sqrt(((p - t) ** 2).mean()),
        "rmse_log": np.sqrt((log**2).mean()),
        "log10": np.abs(log / np.log(10)).mean(),
        "silog": 100 * np.sqrt((log**2).mean() - log.mean() ** 2),
    }


def mean_of(figures):
    return {name: np.mean([of_one[name] for of_one in figures]) for name in figures[0]}


def assert_same(ours, expected, rtol=1e-5):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=rtol, err_msg=name)


def batches(cuts, prediction=PREDICTION, target=TARGET, known=KNOWN, **options):
    """The sums of batches that end at `cuts`, each with a picture of padding."""
    found = []
    for start, end in zip([0, *cuts], [*cuts, N], strict=True):
        rows = np.r_[start:end, 1]
        given = (jnp.asarray(x[rows]) for x in (prediction, target, known))
        found.append(depth.sums(*given, jnp.arange(len(rows)) < end - start, **options))
    return found


def test_per_image():
    images = [i for i in range(N) if KNOWN[i].any()]
    expected = mean_of([figures_of(PREDICTION[i][KNOWN[i]], TARGET[i][KNOWN[i]]) for i in images])
    assert len(images) == 4 and expected["delta_1"] < expected["delta_2"] < expected["delta_3"] < 100
    for cuts in ([], [1], [2, 4]):
        assert_same(depth.summarize(batches(cuts)), expected)


def test_all_pixels_as_one():
    expected = figures_of(PREDICTION[KNOWN], TARGET[KNOWN])
    for cuts in ([], [1], [2, 4]):
        assert_same(depth.summarize(batches(cuts), "pixels"), expected)


def test_per_batch_as_multimaes_script():
    """Unweighted means over batches of the figures of a batch's pixels; a batch without pixels is none."""
    rows = [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    parts = [figures_of(PREDICTION[r][KNOWN[r]], TARGET[r][KNOWN[r]]) for r in rows if KNOWN[r].any()]
    assert len(parts) == 3
    assert_same(depth.summarize(batches([2, 3, 4]), "per_batch"), mean_of(parts))
    assert depth.summarize(batches([2, 3, 4]), "per_batch")["rmse"] != depth.summarize(batches([1]), "per_batch")["rmse"]


def test_predictions_that_are_no_depth_are_misses():
    sums = depth.sums(jnp.asarray([[[-5.0, 0.0, 1.0, 1.0]]]), jnp.asarray([[[5.0, 1.0, 1.0, np.nan]]]))
    assert sums.pixels.tolist() == [3] and sums.under_3.tolist() == [1]
    assert all(np.isfinite(x).all() for x in sums)


def test_range_and_crop_choose_pixels():
    target = TARGET.copy()
    target[1, 2, 3], target[2, 0, 0] = 2.0, 8.0  # the limits themselves count
    inside = KNOWN & (target >= 2) & (target <= 8)
    expected = mean_of([figures_of(np.clip(PREDICTION[i], 2, 8)[inside[i]], target[i][inside[i]]) for i in range(N) if inside[i].any()])
    assert_same(depth.summarize(batches([2], target=target, depth_range=(2.0, 8.0))), expected)

    frame = RNG.uniform(1, 5, (1, 480, 640)).astype(np.float32)
    ones = np.ones_like(frame)
    cropped = depth.sums(jnp.asarray(ones), jnp.asarray(frame), eigen_crop=True)
    assert cropped.pixels.tolist() == [426 * 560]
    np.testing.assert_allclose(cropped.squared, ((1 - frame[0, 45:471, 41:601].astype(float)) ** 2).sum(), rtol=1e-5)
    with pytest.raises(ValueError, match="eigen_crop is for pictures of 480 x 640, not 6 x 7"):
        depth.sums(jnp.asarray(PREDICTION), jnp.asarray(TARGET), eigen_crop=True)


def test_alignment_by_medians():
    aligned = [PREDICTION[i][KNOWN[i]] * np.median(TARGET[i][KNOWN[i]]) / np.median(PREDICTION[i][KNOWN[i]]) for i in (0, 1, 2, 4)]
    expected = mean_of([figures_of(p, TARGET[i][KNOWN[i]]) for p, i in zip(aligned, (0, 1, 2, 4), strict=True)])
    for factor in (1, 37):
        assert_same(depth.summarize(batches([2], factor * PREDICTION, align="median")), expected)
    assert depth.summarize(batches([2], 37 * PREDICTION))["delta_1"] < 10


def test_alignment_by_least_squares():
    expected = []
    for i in (0, 1, 2, 4):
        p, t = (x[i][KNOWN[i]].astype(float) for x in (PREDICTION, TARGET))
        scale, shift = np.linalg.lstsq(np.stack([p, np.ones_like(p)], axis=1), t, rcond=None)[0]
        expected.append(figures_of(scale * p + shift, t))
    for prediction in (PREDICTION, 5 * PREDICTION - 2):
        assert_same(depth.summarize(batches([3], prediction, align="least_squares")), mean_of(expected), rtol=1e-4)


def test_what_is_unknown_may_hold_anything():
    target, prediction = np.where(KNOWN, TARGET, np.nan), np.where(KNOWN, PREDICTION, np.inf)
    for align in (None, "median", "least_squares"):
        options = dict(align=align, depth_range=(0.1, 10.0))
        for ours, theirs in zip(batches([2], prediction, target, np.ones_like(KNOWN), **options), batches([2], **options), strict=True):
            for mine, other in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(mine, other)


def test_nothing_and_slips():
    nothing = depth.summarize(batches([], known=np.zeros_like(KNOWN)), "per_batch")
    assert len(nothing) == 9 and np.isnan(list(nothing.values())).all()
    assert np.isnan(depth.summarize([])["rmse"])
    with pytest.raises(ValueError, match="aggregation is 'mean'; known: per_image, per_batch, pixels"):
        depth.summarize(batches([]), "mean")
    assert depth.summarize(batches([], TARGET), "pixels")["delta_1"] == 100
