"""Figures of segmentations against numpy and scikit-learn, in any cut and with padding."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.metrics import segmentation
from maskvit.metrics.accumulate import added

RNG = np.random.default_rng(0)
K, N = 7, 6
# Class 4 is never labeled but predicted, class 5 labeled and never predicted, class 6 neither.
TARGET = RNG.choice([-1, 0, 1, 2, 3, 5], (N, 8, 9))
PREDICTION = np.where(RNG.random(TARGET.shape) < 0.6, TARGET, RNG.choice([0, 1, 2, 3, 4], TARGET.shape))
PREDICTION[(PREDICTION < 0) | (PREDICTION == 5)] = 3
PREDICTION[TARGET < 0] = 6  # where it must not count


def summed(cuts, prediction=PREDICTION, target=TARGET):
    """The sums over batches that end at `cuts`, each with a picture of padding."""
    total = None
    for start, end in zip([0, *cuts], [*cuts, N], strict=True):
        rows = np.r_[start:end, 0]
        valid = np.arange(len(rows)) < end - start
        total = added(total, segmentation.counts(jnp.asarray(prediction[rows]), jnp.asarray(target[rows]), K, jnp.asarray(valid)))
    return total


def reference(prediction, target):
    """(IoU per class, accuracy per labeled class, accuracy of pixels) in percent, pixel by pixel."""
    prediction, target = prediction[target >= 0], target[target >= 0]
    iou, accuracy = [], []
    for c in range(K):
        both, either = ((prediction == c) & (target == c)).sum(), ((prediction == c) | (target == c)).sum()
        iou.append(100 * both / either if either else np.nan)
        if (target == c).any():
            accuracy.append(100 * both / (target == c).sum())
    return iou, accuracy, 100 * (prediction == target).mean()


def test_figures_by_their_definition():
    iou, accuracy, pixels = reference(PREDICTION, TARGET)
    assert iou[4] == iou[5] == 0 and np.isnan(iou[6]) and len(accuracy) == 5
    sums = summed([])
    np.testing.assert_allclose(segmentation.class_iou(sums), iou)
    figures = segmentation.summarize(sums)
    np.testing.assert_allclose(figures["mean_iou"], np.nanmean(iou))
    np.testing.assert_allclose(figures["mean_accuracy"], np.mean(accuracy))
    np.testing.assert_allclose(figures["pixel_accuracy"], pixels)
    assert figures["macro_jaccard"] == figures["mean_iou"]


GIVING_VOID = PREDICTION.copy()  # a predictor that may give the ignored label
GIVING_VOID[1, 2:5] = -1


def test_the_macro_average_knows_the_ignored_label():
    prediction, labeled = GIVING_VOID, TARGET >= 0
    classes = [c for c in range(-1, K) if ((prediction == c) | (TARGET == c))[labeled].any()]
    share = lambda c: ((prediction == c) & (TARGET == c))[labeled].sum() / ((prediction == c) | (TARGET == c))[labeled].sum()  # noqa: E731
    expected = 100 * np.mean([share(c) for c in classes])
    figures = segmentation.summarize(summed([2], prediction))
    np.testing.assert_allclose(figures["macro_jaccard"], expected)
    assert figures["macro_jaccard"] < figures["mean_iou"] == pytest.approx(np.nanmean(reference(prediction, TARGET)[0]))


@pytest.mark.parametrize("prediction", [PREDICTION, GIVING_VOID], ids=["classes", "classes and void"])
def test_the_macro_average_is_scikit_learns(prediction):
    metrics = pytest.importorskip("sklearn.metrics")
    theirs = metrics.jaccard_score(TARGET[TARGET >= 0], prediction[TARGET >= 0], average="macro")
    np.testing.assert_allclose(segmentation.summarize(summed([2], prediction))["macro_jaccard"], 100 * theirs)


@pytest.mark.parametrize("cuts", [[1], [2, 3], [5]])
def test_sums_are_the_same_in_any_cut(cuts):
    for ours, whole in zip(summed(cuts), summed([]), strict=True):
        assert ours.dtype == np.int64
        np.testing.assert_array_equal(ours, whole)


def test_a_hundred_thousand_pictures_do_not_overflow():
    batch = segmentation.counts(jnp.zeros((1, 512, 512), jnp.int32), jnp.zeros((1, 512, 512), jnp.int32), 2)
    wide = functools.reduce(added, [batch] * 3, None)
    many = type(wide)(*(x * (100_000 // 3) for x in wide))
    total = added(many, batch)
    assert total.labeled[0] == (99_999 + 1) * 512 * 512 > 2**32
    assert segmentation.summarize(total)["mean_iou"] == 100


def test_nothing_labeled_and_wrong_labels():
    nothing = segmentation.summarize(segmentation.counts(jnp.zeros((1, 2, 2), jnp.int32), jnp.full((1, 2, 2), -1), K))
    assert len(nothing) == 4 and np.isnan(list(nothing.values())).all()
    with pytest.raises(ValueError, match="4 pixels have targets above 6, the last class: store void pixels as negative numbers"):
        segmentation.summarize(segmentation.counts(jnp.zeros((1, 2, 2), jnp.int32), jnp.full((1, 2, 2), 255), K))
