"""Mixup, CutMix, soft targets and random erasing against their rules in numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.core.keys import sample_keys, stream_keys
from maskvit.objectives.mixing import check_mixing, erase, erased_box, mix, soft_targets
from maskvit.sharding import make_mesh, on_each_device

CLASSES, SIDE = 5, 12
LABELS = np.array([0, 3, 4, 1], np.int32)


def images(count: int = 4, dtype: type = np.float32) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE + 4, 3))
    return values.astype(dtype)


def reference_targets(labels: np.ndarray, share: float, smoothing: float) -> np.ndarray:
    rows = np.full((len(labels), CLASSES), smoothing / CLASSES)
    rows[np.arange(len(labels)), labels] = 1 - smoothing + smoothing / CLASSES
    return share * rows + (1 - share) * rows[::-1]


@functools.cache
def many(count: int, **settings):
    """`count` batches mixed with keys of their own."""
    run = jax.jit(jax.vmap(lambda key: mix(key, jnp.asarray(images()), jnp.asarray(LABELS), num_classes=CLASSES, **settings)))
    return jax.tree.map(np.asarray, run(jax.random.split(jax.random.key(0), count)))


def box_of(mixed: np.ndarray) -> np.ndarray | None:
    """Where a batch is its own reverse and nowhere else; None where it was blended instead."""
    own, other = (np.isclose(mixed, source).all(axis=(0, 3)) for source in (images(), images()[::-1]))
    return other if (own | other).all() else None


def test_mixup_blends_with_the_reversed_batch_as_the_targets_say():
    mixed, targets = many(200, mixup=0.8, cutmix=0.0)
    for batch, rows in zip(mixed, targets, strict=True):
        share = (rows[0, 0] - 0.02) / 0.9  # of label 0, which its partner has not
        np.testing.assert_allclose(batch, share * images() + (1 - share) * images()[::-1], atol=1e-2)
        np.testing.assert_allclose(rows, reference_targets(LABELS, share, 0.1), atol=1e-5)
    shares = (targets[:, 0, 0] - 0.02) / 0.9
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 (2 * 0.8 + 1)).
    assert abs(shares.mean() - 0.5) < 0.07 and abs(shares.var() - 1 / (4 * 2.6)) < 0.02


def test_cutmix_box_follows_its_rules():
    mixed, targets = many(300, mixup=0.0, cutmix=1.0)
    heights, widths = set(), set()
    for batch, rows in zip(mixed, targets, strict=True):
        inside = box_of(batch)
        assert inside is not None
        share = 1 - inside.mean()  # corrected to the area that is really replaced
        np.testing.assert_allclose(rows, reference_targets(LABELS, share, 0.1), atol=1e-5)
        down, along = inside.any(axis=1), inside.any(axis=0)
        assert (inside == down[:, None] & along[None]).all()
        for line in (down, along):
            assert (np.diff(np.flatnonzero(line)) == 1).all()  # one stretch
        heights.add(int(down.sum()))
        widths.add(int(along.sum()))
        if inside.any() and not (down[0] or down[-1]):
            assert down.sum() % 2 == 0  # twice the half that was rounded down
    assert heights >= set(range(0, SIDE, 2)) and max(heights) <= SIDE and max(widths) <= SIDE + 4
    # Before cutting at the edges the area is 1 - lambda, uniform; numpy draws the same.
    rng, areas = np.random.default_rng(0), []
    for _ in range(20000):
        side = np.sqrt(rng.random())
        area = 1
        for size in (SIDE, SIDE + 4):
            half, center = int(size * side) // 2, rng.integers(0, size)
            area *= np.clip(center + half, 0, size) - np.clip(center - half, 0, size)
        areas.append(area / (SIDE * (SIDE + 4)))
    ours = np.array([box_of(batch).mean() for batch in mixed])
    assert abs(ours.mean() - np.mean(areas)) < 0.03 and abs(ours.std() - np.std(areas)) < 0.03


@pytest.mark.parametrize(("switch", "expected"), [(0.5, 0.5), (0.0, 0.0), (1.0, 1.0)])
def test_switch_chooses(switch, expected):
    mixed, _ = many(200, mixup=0.8, cutmix=1.0, switch=switch)
    assert abs(np.mean([box_of(batch) is not None for batch in mixed]) - expected) < (0.12 if expected == 0.5 else 0.02)


def test_stored_bytes_are_not_rounded_and_may_be_normalized_afterwards():
    settings = dict(num_classes=CLASSES, mixup=0.8, cutmix=0.0, smoothing=0.1)
    key, mean, std = jax.random.key(3), 120.0, 60.0
    from_bytes, rows = mix(key, jnp.asarray(images(dtype=np.uint8)), jnp.asarray(LABELS), **settings)
    from_floats, _ = mix(key, jnp.asarray(images()), jnp.asarray(LABELS), **settings)
    normalized, _ = mix(key, (jnp.asarray(images()) - mean) / std, jnp.asarray(LABELS), **settings)
    assert from_bytes.dtype == jnp.float32 and rows.dtype == jnp.float32
    np.testing.assert_array_equal(from_bytes, from_floats)
    assert (np.asarray(from_bytes) % 1 != 0).mean() > 0.5
    np.testing.assert_allclose((from_bytes - mean) / std, normalized, atol=1e-4)


def test_without_mixing_only_targets_are_soft():
    made, rows = mix(jax.random.key(0), jnp.asarray(images(3)), jnp.asarray(LABELS[:3]), num_classes=CLASSES, mixup=0, cutmix=0)
    np.testing.assert_array_equal(made, images(3))
    np.testing.assert_allclose(rows, reference_targets(LABELS[:3], 1.0, 0.1), atol=1e-6)


def test_soft_targets():
    rows = np.asarray(soft_targets(jnp.array([2, -1, 5]), CLASSES, 0.1))
    np.testing.assert_allclose(rows[0], [0.02, 0.02, 0.92, 0.02, 0.02], atol=1e-6)
    assert (rows[1:] == 0).all()  # no label, no loss
    np.testing.assert_array_equal(np.asarray(soft_targets(jnp.array([1]), 3)), [[0, 1, 0]])


def test_each_device_draws_for_its_own_samples():
    """With the keys of the samples, as the module says: the same step draws the same, and every device something else."""
    mesh = make_mesh()
    batch, labels = jnp.asarray(np.tile(images(2), (4, 1, 1, 1))), jnp.asarray(np.tile(LABELS[:2], 4))

    def on_device(params, shared, samples, exchange):
        keys, own, classes = samples
        return (), (), mix(stream_keys(keys, "mixing")[0], own, classes, num_classes=CLASSES)

    run = jax.jit(lambda keys: on_each_device(on_device, mesh)((), (), (keys, batch, labels))[2])
    mixed, rows = run(sample_keys(0, 7, 8))
    np.testing.assert_array_equal(mixed, run(sample_keys(0, 7, 8))[0])
    assert len({np.asarray(rows[2 * device]).tobytes() for device in range(4)}) == 4
    alone = mix(stream_keys(sample_keys(0, 7, 8), "mixing")[2], batch[:2], labels[:2], num_classes=CLASSES)
    np.testing.assert_allclose(mixed[2:4], alone[0], atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(mixup=-0.1), "mixing.mixup is -0.1; it is the parameter of a Beta distribution"),
        (dict(cutmix=float("nan")), "mixing.cutmix is nan"),
        (dict(switch=1.5), "mixing.switch is 1.5; it must be between 0 and 1"),
        (dict(smoothing=-1), "mixing.smoothing is -1"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        check_mixing("mixing", **dict(dict(mixup=0.8, cutmix=1.0, switch=0.5, smoothing=0.1), **settings))
    with pytest.raises(ValueError, match=message):
        mix(jax.random.key(0), jnp.asarray(images()), jnp.asarray(LABELS), num_classes=CLASSES, **settings)


def test_an_odd_batch_has_no_pairs():
    with pytest.raises(ValueError, match="now 3: make config.global_batch, or config.micro_batch, an even number per device"):
        mix(jax.random.key(0), jnp.asarray(images(3)), jnp.asarray(LABELS[:3]), num_classes=CLASSES)


# --- random erasing -----------------------------------------------------------------------------------------------------


def reference_boxes(height: int, width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(heights, widths) by the rule; 0 where ten draws do not fit."""
    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        made.append((0, 0))
        for _ in range(10):
            area = height * width * rng.uniform(0.02, 1 / 3)
            ratio = np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
            h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if h < height and w < width:
                made[-1] = (h, w)
                break
    return tuple(np.array(made).T)


@pytest.mark.parametrize("size", [(32, 32), (6, 48)])
def test_boxes_have_the_rules_distribution(size):
    count = 3000
    boxes = np.asarray(jax.jit(jax.vmap(lambda key: erased_box(key, *size)))(jax.random.split(jax.random.key(0), count)))
    down, along = boxes.any(axis=2), boxes.any(axis=1)
    assert (boxes == (down[:, :, None] & along[:, None, :])).all()
    heights, widths = down.sum(axis=1), along.sum(axis=1)
    theirs = reference_boxes(*size, 20000)
    for ours, expected, side in zip((heights, widths), theirs, size, strict=True):
        assert abs(ours.mean() - expected.mean()) < 0.03 * side and abs(ours.std() - expected.std()) < 0.03 * side
        assert ours.max() < side  # never a whole side
    assert abs((heights == 0).mean() - (theirs[0] == 0).mean()) < 0.03
    # Uniform over all places where the box fits, the last included.
    free = size[1] - widths[widths > 0]
    left = along[widths > 0].argmax(axis=1)
    assert abs((left / free).mean() - 0.5) < 0.03 and (left == free).any() and (left == 0).any()


def test_erasing_writes_noise_into_the_box_and_nothing_else():
    pictures = jnp.full((400, 16, 16, 3), 7.0)
    keys = jax.random.split(jax.random.key(1), 400)
    made = np.asarray(jax.jit(lambda keys, x: erase(keys, x, 0.25))(keys, pictures))
    changed = (made != 7.0).all(axis=-1)
    assert ((made != 7.0).any(axis=-1) == changed).all()  # all channels of a pixel
    assert abs(changed.any(axis=(1, 2)).mean() - 0.25) < 0.07
    noise = made[changed]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.08  # every channel on its own
    # A sample's draw depends on its key alone.
    np.testing.assert_array_equal(np.asarray(erase(keys[7:9], pictures[7:9], 0.25)), made[7:9])
    np.testing.assert_array_equal(erase(keys, pictures, 0.0), pictures)
    assert (np.asarray(erase(keys[:8], pictures[:8], 1.0)) != 7.0).any(axis=(1, 2, 3)).all()


def test_erasing_with_no_probability():
    with pytest.raises(ValueError, match="the probability of random erasing is 1.5; it must be between 0 and 1"):
        erase(jax.random.split(jax.random.key(0), 1), jnp.zeros((1, 8, 8, 3)), 1.5)
