"""Figures of classifiers against numpy and torch, in any cut and with padding, and ranks of several models."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.metrics import classification
from maskvit.metrics.accumulate import added
from maskvit.metrics.ranking import mean_ranks
from maskvit.sharding import batch_sharding, make_mesh

RNG = np.random.default_rng(0)
K, N = 12, 40
LABEL = RNG.permutation(np.arange(N) % (K - 1))  # the last class has no samples
LOGITS = (3 * RNG.standard_normal((N, K)) + 4 * np.eye(K)[LABEL]).astype(np.float32)
LABEL[[3, 17]] = -1
KNOWN = LABEL >= 0


def summed(cuts, function=classification.counts, logits=LOGITS, label=LABEL):
    """The sums over batches that end at `cuts`, each with two rows of padding that would be right."""
    total = None
    for start, end in zip([0, *cuts], [*cuts, N], strict=True):
        rows = np.r_[start:end, 0, 1]
        valid = np.arange(len(rows)) < end - start
        total = added(total, function(jnp.asarray(logits[rows]), jnp.asarray(label[rows]), jnp.asarray(valid)))
    return total


def test_figures_by_their_definition():
    figures = classification.summarize(summed([]))
    order = np.argsort(-LOGITS, axis=1)[KNOWN]
    label = LABEL[KNOWN, None]
    np.testing.assert_allclose(figures["top1"], 100 * (order[:, :1] == label).mean())
    np.testing.assert_allclose(figures["top5"], 100 * (order[:, :5] == label).any(axis=1).mean())
    per_class = [(order[label[:, 0] == c, 0] == c).mean() for c in range(K - 1)]
    np.testing.assert_allclose(figures["mean_class"], 100 * np.mean(per_class))
    np.testing.assert_allclose(classification.class_accuracy(summed([])), [*(100 * np.array(per_class)), np.nan])
    exact = LOGITS[KNOWN].astype(float)
    losses = np.log(np.exp(exact).sum(axis=1)) - exact[np.arange(len(exact)), label[:, 0]]
    np.testing.assert_allclose(figures["loss"], losses.mean(), rtol=1e-6)


def test_top_one_and_five_are_torchs():
    torch = pytest.importorskip("torch")
    _, order = torch.from_numpy(LOGITS[KNOWN]).topk(5, 1)
    hits = order.eq(torch.from_numpy(LABEL[KNOWN])[:, None])
    figures = classification.summarize(summed([]))
    assert figures["top1"] == pytest.approx(100 * hits[:, 0].float().mean().item(), rel=1e-6)
    assert figures["top5"] == pytest.approx(100 * hits.any(dim=1).float().mean().item(), rel=1e-6)


@pytest.mark.parametrize("cuts", [[1], [7, 8, 30], [20]])
def test_sums_are_the_same_in_any_cut(cuts):
    for ours, whole in zip(summed(cuts), summed([]), strict=True):
        assert ours.dtype == whole.dtype
        (np.testing.assert_array_equal if ours.dtype == np.int64 else functools.partial(np.testing.assert_allclose, rtol=1e-6))(ours, whole)


def test_sums_over_four_devices():
    sharding = batch_sharding(make_mesh())
    assert len(sharding.device_set) == 4
    given = [jax.device_put(x, sharding) for x in (LOGITS, LABEL.astype(np.int32), np.arange(N) < 33)]
    spread = jax.jit(classification.counts)(*given)
    for ours, one in zip(spread, classification.counts(*map(jnp.asarray, (LOGITS, LABEL, np.arange(N) < 33))), strict=True):
        np.testing.assert_allclose(ours, one, rtol=1e-6 if ours.dtype == jnp.float32 else 0)


def test_added_counts_more_than_32_bits_hold():
    many = {"pixels": jnp.asarray(2**31 - 1, jnp.int32), "sum": jnp.float32(1e8)}
    total = None
    for _ in range(5):
        total = added(total, many)
    assert total["pixels"] == 5 * (2**31 - 1) and total["pixels"].dtype == np.int64
    total = added(total, {"pixels": jnp.int32(1), "sum": jnp.float32(1)})
    assert total["sum"] == 5e8 + 1  # float32 would lose the 1


def test_the_confusion_matrix():
    prediction = LOGITS.argmax(axis=1)
    prediction[5] = -1  # of no class
    expected = np.zeros((K, K), int)
    valid = np.arange(N) != 9
    for label, given, here in zip(LABEL, prediction, valid, strict=True):
        if label >= 0 and given >= 0 and here:
            expected[label, given] += 1
    ours = classification.confusion_matrix(*map(jnp.asarray, (prediction, LABEL)), K, jnp.asarray(valid))
    np.testing.assert_array_equal(ours, expected)
    some = classification.confusion_matrix(*map(jnp.asarray, (prediction, LABEL)), 4, jnp.asarray(valid))
    np.testing.assert_array_equal(some, expected[:4, :4])
    dense = classification.confusion_matrix(jnp.asarray(prediction.reshape(2, 4, 5)), jnp.asarray(LABEL.reshape(2, 4, 5)), K)
    np.testing.assert_array_equal(np.asarray(dense).sum(), expected.sum() + 1)


def test_a_test_set_of_some_classes():
    """Only these compete; labels are positions among them."""
    classes = [7, 2, 9, 4, 1, 0]
    label = RNG.integers(0, 6, N)
    figures = classification.summarize(classification.counts(classification.of_classes(jnp.asarray(LOGITS), classes), jnp.asarray(label)))
    np.testing.assert_allclose(figures["top1"], 100 * (LOGITS[:, classes].argmax(axis=1) == label).mean())
    assert figures["top1"] != 100 * (LOGITS.argmax(axis=1) == np.array(classes)[label]).mean()


def test_sets_of_labels():
    sets = RNG.random((N, K)) < 0.2
    sets[[2, 5]] = False
    valid = np.arange(N) != 9
    counted = sets.any(axis=1) & valid
    right = sets[np.arange(N), LOGITS.argmax(axis=1)]
    parts = [classification.set_counts(*(jnp.asarray(x[rows]) for x in (LOGITS, sets, valid))) for rows in (slice(0, 13), slice(13, N))]
    sums = functools.reduce(added, parts, None)
    assert classification.summarize(sums) == {"real": pytest.approx(100 * right[counted].mean())}
    assert int(sums.samples) == counted.sum() and not right[counted].all()


def test_nothing_to_count_and_few_classes():
    figures = classification.summarize(classification.counts(jnp.ones((3, 2)), jnp.full(3, -1)))
    assert list(figures) == ["top1", "mean_class", "loss"] and np.isnan(list(figures.values())).all()
    assert np.isnan(classification.summarize(classification.set_counts(jnp.ones((3, 2)), jnp.zeros((3, 2), bool)))["real"])
    equal = classification.summarize(classification.counts(jnp.ones((2, 2)), jnp.asarray([0, 1])))
    assert equal["top1"] == 50 and equal["loss"] == pytest.approx(np.log(2))


def test_labels_beyond_the_classes_are_an_error():
    with pytest.raises(ValueError, match="2 samples have labels above 11, the last class"):
        classification.summarize(classification.counts(jnp.asarray(LOGITS[:4]), jnp.asarray([0, 12, -1, 900])))


# Ranks


def test_mean_ranks_over_tasks():
    losses = {
        "ours": dict(depth=1.0, normal=2.0, curvature=3.0),
        "other": dict(depth=2.0, curvature=3.0, normal=1.0),
        "third": dict(depth=3.0, normal=float("nan"), curvature=4.0),
    }
    ranks = mean_ranks(losses)
    assert ranks["ours"] == (2.0, pytest.approx((1 + 2 + 1.5) / 3)) and ranks["other"] == (2.0, pytest.approx((2 + 1 + 1.5) / 3))
    assert ranks["third"][1] == 3 and np.isnan(ranks["third"][0])
    del losses["other"]["depth"]
    with pytest.raises(ValueError, match="'other' has losses of .*'curvature', 'normal'.* ranks need the same tasks"):
        mean_ranks(losses)
    with pytest.raises(ValueError, match="at least one"):
        mean_ranks({"ours": {}})
