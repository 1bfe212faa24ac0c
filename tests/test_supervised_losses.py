"""Losses of classes and of maps against float64 numpy and torch; their gradients where nothing is valid; sums over any cut."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.core.comparison import angles
from maskvit.losses import dense
from maskvit.losses.classes import cross_entropy, soft_target_cross_entropy

B, H, W, K = 4, 3, 5, 6


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def log_softmax(logits):
    exact = logits.astype(float)
    return exact - exact.max(axis=-1, keepdims=True) - np.log(np.exp(exact - exact.max(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True))


def mean(sums):
    return float(sums[0].sum() / sums[1].sum())


# Classes


def test_soft_targets_as_mixup_makes_them():
    logits, first, second, share = 4 * draw(B, K), np.array([0, 1, 5, 2]), np.array([2, 5, 1, 0]), 0.3
    hot = lambda label: 0.1 / K + 0.9 * np.eye(K)[label]  # noqa: E731
    target = share * hot(first) + (1 - share) * hot(second)
    losses, weights = soft_target_cross_entropy(jnp.asarray(logits), jnp.asarray(target, jnp.float32))
    np.testing.assert_allclose(losses, -(target * log_softmax(logits)).sum(axis=-1), rtol=1e-5)
    assert weights.tolist() == [1] * B
    valid = jnp.asarray([True, False, True, False])
    some, weights = soft_target_cross_entropy(jnp.asarray(logits), jnp.asarray(target, jnp.float32), valid)
    np.testing.assert_array_equal(some, jnp.where(valid, losses, 0))
    assert weights.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(weighted, smoothing):
    torch = pytest.importorskip("torch")
    logits, label = 3 * draw(9, K), np.array([0, 5, -1, 2, 2, -1, 4, 1, 3])
    class_weights = np.linspace(0.5, 2, K).astype(np.float32) if weighted else None
    reference = torch.nn.CrossEntropyLoss(
        weight=torch.from_numpy(class_weights) if weighted else None, ignore_index=-1, label_smoothing=smoothing
    )
    given = jnp.asarray(class_weights) if weighted else None
    losses, weights = cross_entropy(jnp.asarray(logits), jnp.asarray(label), smoothing, given)
    expected = float(reference(torch.from_numpy(logits), torch.from_numpy(label)))
    np.testing.assert_allclose(losses.sum() / weights.sum(), expected, rtol=1e-5)
    assert losses[2] == weights[2] == losses[5] == weights[5] == 0
    map_of = lambda x: jnp.asarray(x.reshape(1, 3, 3, *x.shape[1:]))  # noqa: E731
    np.testing.assert_allclose(mean(dense.pixel_cross_entropy(map_of(logits), map_of(label), smoothing, given)), expected, rtol=1e-5)


def test_label_smoothing_by_its_definition():
    logits, label = draw(3, K), np.array([4, 0, 2])
    target = 0.1 / K + 0.9 * np.eye(K)[label]
    losses, _ = cross_entropy(jnp.asarray(logits), jnp.asarray(label), 0.1)
    np.testing.assert_allclose(losses, -(target * log_softmax(logits)).sum(axis=-1), rtol=1e-5)


def test_logits_in_bfloat16_are_summed_in_float32():
    logits, label = jnp.asarray(draw(3, K), jnp.bfloat16), jnp.asarray([4, 0, 2])
    losses, _ = cross_entropy(logits, label)
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, cross_entropy(logits.astype(jnp.float32), label)[0])


# Maps

VALID = np.random.default_rng(1).random((B, H, W)) < 0.6
VALID[2] = False
TARGET = np.abs(draw(B, H, W, 1)) + 0.1
PREDICTION = np.abs(draw(B, H, W, 1, seed=1)) + 0.1
NORMALS, NORMALS_TARGET = draw(B, H, W, 3), draw(B, H, W, 3, seed=1)
LOSSES = {
    "l1": (dense.l1, PREDICTION, TARGET),
    "berhu": (dense.berhu, PREDICTION, TARGET),
    "ssi": (dense.scale_and_shift_invariant, PREDICTION, TARGET),
    "silog": (dense.silog, PREDICTION, TARGET),
    "angular": (dense.angular, NORMALS, NORMALS_TARGET),
    "cosine": (dense.cosine, NORMALS, NORMALS_TARGET),
}


def sums_of(name, prediction=None, target=None, valid=VALID):
    loss, standard, standard_target = LOSSES[name]
    given = (standard if prediction is None else prediction), (standard_target if target is None else target)
    return loss(*map(jnp.asarray, given), None if valid is None else jnp.asarray(valid))


def known(array, sample):
    return array[sample][VALID[sample]].astype(float)


def test_l1():
    for channels in (1, 2):
        prediction, target = draw(B, H, W, channels, seed=1), draw(B, H, W, channels)
        sums, counts = sums_of("l1", prediction, target)
        np.testing.assert_allclose(sums, [np.abs(known(prediction, i) - known(target, i)).sum() for i in range(B)], rtol=1e-5)
        assert counts.tolist() == [channels * VALID[i].sum() for i in range(B)]
    assert sums_of("l1", valid=None)[1].tolist() == [H * W] * B


def test_berhu_and_its_threshold_without_gradient():
    errors = (PREDICTION - TARGET)[VALID][:, 0].astype(float)
    c = 0.2 * np.abs(errors).max()
    expected = np.where(np.abs(errors) < c, np.abs(errors), (errors**2 + c**2) / (2 * c))
    assert 0 < (np.abs(errors) < c).sum() < len(errors)
    np.testing.assert_allclose(mean(sums_of("berhu")), expected.mean(), rtol=1e-5)
    gradient = jax.grad(lambda p: dense.berhu(p, jnp.asarray(TARGET), jnp.asarray(VALID))[0].sum())(jnp.asarray(PREDICTION))
    slopes = np.where(np.abs(errors) < c, np.sign(errors), errors / c)
    np.testing.assert_allclose(np.asarray(gradient)[VALID][:, 0], slopes, rtol=1e-4)
    assert not np.asarray(gradient)[~VALID].any()


def test_the_least_threshold_of_berhu():
    """Below errors of 5e-5 it is 1e-5, and no errors at all are no division by zero."""
    target = np.full((1, 1, 3, 1), 0.5, np.float32)
    errors = np.array([0.0, 2e-6, 3e-5]).reshape(target.shape)
    sums, _ = dense.berhu(jnp.asarray(errors, jnp.float32), jnp.zeros(target.shape))
    np.testing.assert_allclose(sums, [2e-6 + (9e-10 + 1e-10) / 2e-5], rtol=1e-5)
    value, gradient = jax.value_and_grad(lambda p: dense.berhu(p, jnp.asarray(target))[0].sum())(jnp.asarray(target))
    assert value == 0 and np.isfinite(gradient).all()


def test_scale_and_shift_invariance_by_least_squares():
    sums, counts = sums_of("ssi")
    for i in range(B):
        p, t = known(PREDICTION, i)[:, 0], known(TARGET, i)[:, 0]
        residual = np.linalg.lstsq(np.stack([p, np.ones_like(p)], axis=1), t, rcond=None)[1] if len(p) else [0.0]
        np.testing.assert_allclose(sums[i], 0.5 * residual[0], rtol=1e-4, atol=1e-7)
    assert counts.tolist() == [VALID[i].sum() for i in range(B)]
    np.testing.assert_allclose(sums_of("ssi", 100 + 7 * PREDICTION)[0], sums, rtol=1e-3)
    np.testing.assert_allclose(sums_of("ssi", PREDICTION, 3 * TARGET + 2)[0], 9 * sums, rtol=1e-3)
    constant, _ = sums_of("ssi", np.full_like(PREDICTION, 0.7))
    np.testing.assert_allclose(constant[0], 0.5 * len(known(TARGET, 0)) * known(TARGET, 0).var(), rtol=1e-4)


@pytest.mark.parametrize("focus", [0.0, 0.5, 0.85, 1.0])
def test_silog(focus):
    prediction = PREDICTION.copy()
    prediction[0, :, 0] = -1.0  # a network's output: taken as 1e-6
    losses, counts = dense.silog(jnp.asarray(prediction), jnp.asarray(TARGET), jnp.asarray(VALID), focus)
    for i in (0, 1, 3):
        d = np.log(np.maximum(known(prediction, i), 1e-6)) - np.log(known(TARGET, i))
        np.testing.assert_allclose(losses[i], np.sqrt((d**2).mean() - focus * d.mean() ** 2), rtol=1e-4)
    assert counts.tolist() == [1, 1, 0, 1] and losses[2] == 0


def test_silog_leaves_out_targets_that_are_no_depth():
    target = TARGET.copy()
    target[0, 0] = 0.0
    target[1, 1] = -3.0
    valid = VALID & (target[..., 0] > 0)
    np.testing.assert_array_equal(sums_of("silog", target=target)[0], sums_of("silog", target=TARGET, valid=valid)[0])
    everywhere = sums_of("silog", target=target, valid=None)[0]
    np.testing.assert_array_equal(everywhere, sums_of("silog", target=TARGET, valid=target[..., 0] > 0)[0])


def test_angles_and_cosines():
    unit = lambda x: x.astype(float) / np.linalg.norm(x.astype(float), axis=-1, keepdims=True)  # noqa: E731
    cosines = (unit(NORMALS) * unit(NORMALS_TARGET)).sum(axis=-1)
    np.testing.assert_allclose(mean(sums_of("angular")), np.arccos(cosines)[VALID].mean(), rtol=1e-5)
    np.testing.assert_allclose(mean(sums_of("cosine")), (1 - cosines)[VALID].mean(), rtol=1e-5)
    assert sums_of("angular")[1].tolist() == [VALID[i].sum() for i in range(B)]


def test_angles_where_the_arc_cosine_is_blind():
    # Two degrees and less: 1 - cos is below the digits of float32 at 1e-4 radians.
    for angle in (0.0, 1e-5, 1e-4, 0.03, np.pi / 2, np.pi):
        found = angles(jnp.asarray([2.0, 0.0, 0.0]), jnp.asarray([3 * np.cos(angle), 3 * np.sin(angle), 0.0], jnp.float32))
        np.testing.assert_allclose(found, angle, rtol=1e-5, atol=1e-6)
    assert angles(jnp.zeros(3), jnp.ones(3)) == np.float32(np.pi / 2)
    for ours in (jnp.zeros(3), jnp.asarray([1.0, 0, 0]), jnp.asarray([-1.0, 0, 0])):
        assert np.isfinite(jax.grad(angles)(ours, jnp.asarray([1.0, 0, 0]))).all()


def test_normals_without_a_length_do_not_count():
    target, prediction = NORMALS_TARGET.copy(), NORMALS.copy()
    target[0, 0] = 0
    prediction[1, 1] = 0
    pixels = VALID.copy()
    pixels[0, 0] = False
    for name, of_zero in (("angular", np.pi / 2), ("cosine", 1.0)):
        sums, counts = sums_of(name, prediction, target)
        assert counts.tolist() == [pixels[i].sum() for i in range(B)]
        rest = VALID.copy()
        rest[1, 1] = False
        expected = sums_of(name, valid=rest)[0][1] + of_zero * VALID[1, 1].sum()
        np.testing.assert_allclose(sums[1], expected, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_not_valid_changes_nothing_and_any_cut_adds_up(name):
    if name == "berhu":  # its threshold is of the batch: keep the largest error in both parts
        largest = lambda x, value: np.where(np.arange(H * W).reshape(1, H, W, 1) == np.argmax(VALID[0] & VALID[1] & VALID[3]), value, x)  # noqa: E731
        assert (VALID[0] & VALID[1] & VALID[3]).any()
        prediction, target = largest(PREDICTION, np.float32(9)), largest(TARGET, np.float32(1))
    else:
        prediction, target = LOSSES[name][1:]
    whole = sums_of(name, prediction, target)
    parts = [sums_of(name, prediction[rows], target[rows], VALID[rows]) for rows in (slice(0, 1), slice(1, 4))]
    for index in (0, 1):
        np.testing.assert_array_equal(whole[index], np.concatenate([part[index] for part in parts]))
    spoiled, spoiled_target = (np.where(VALID[..., None], x, bad).astype(np.float32) for x, bad in ((prediction, 1e30), (target, np.nan)))
    for given in (VALID, None):  # a target of NaN is not valid, whether told or not
        for ours, theirs in zip(sums_of(name, spoiled, spoiled_target, given), whole, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", [*LOSSES, "pixel_cross_entropy"])
def test_gradients_where_nothing_is_valid(name):
    if name == "pixel_cross_entropy":
        label = np.where(VALID, 1, -1)
        start, loss = draw(B, H, W, K), functools.partial(dense.pixel_cross_entropy, target=jnp.asarray(label))
    else:
        function, start, target = LOSSES[name]
        spoiled = jnp.asarray(np.where(VALID[..., None], target, np.nan))
        loss = functools.partial(function, target=spoiled, valid=jnp.asarray(VALID))

    def total(prediction):
        sums, counts = loss(prediction)
        return sums.sum() / counts.sum()

    value, gradient = jax.value_and_grad(total)(jnp.asarray(start))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert not np.asarray(gradient)[~VALID].any() and np.asarray(gradient)[VALID].any()
    # A step against the gradient lowers the loss.
    assert total(jnp.asarray(start) - 1e-2 * gradient) < value


def test_gradients_of_perfect_predictions_are_finite():
    for name, (loss, _, target) in LOSSES.items():
        gradient = jax.grad(lambda p, loss=loss, target=target: loss(p, jnp.asarray(target))[0].sum())(jnp.asarray(target))
        assert np.isfinite(gradient).all(), name
