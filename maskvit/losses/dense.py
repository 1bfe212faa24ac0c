"""Losses of maps: segmentation, depth, normals and other regression at full resolution.

Each comes as (sums, counts) per sample, so that micro-batches and devices add exactly: the loss of a batch is sums.sum() /
counts.sum(), a mean over all its valid pixels. Only the threshold of `berhu` depends on what is in a batch. A pixel counts where
`valid` is True (None: everywhere) and all channels of its target are finite; what is stored elsewhere may be anything, and has no
gradient. A sample without valid pixels has sum, count and gradient 0. Computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from maskvit.core.comparison import aligned, angles
from maskvit.losses.classes import cross_entropy

Sums = tuple[Float[Array, " b"], Float[Array, " b"]]

FLOOR = 1e-6  # the least depth that a logarithm sees, as MultiMAE's figures have it


def pixel_cross_entropy(
    logits: Float[Array, "b h w k"],
    target: Int[Array, "b h w"],
    smoothing: float = 0.0,
    class_weights: Sequence[float] | Float[Array, " k"] | None = None,
) -> Sums:
    """`cross_entropy` of every pixel in nats; negative ids (void, padding) are ignored."""
    losses, weights = cross_entropy(logits, target, smoothing, class_weights)
    return losses.sum(axis=(1, 2)), weights.sum(axis=(1, 2))


def _prepared(
    prediction: Float[Array, "b h w c"], target: Float[Array, "b h w c"], valid: Bool[Array, "b h w"] | None, filler: float = 0.0
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"], Bool[Array, "b h w"]]:
    """Both maps in float32, `filler` where nothing is known, and where something is: no NaN gets into values or gradients."""
    known = jnp.isfinite(target).all(axis=-1)
    known = known if valid is None else known & valid
    fill = lambda x: jnp.where(known[..., None], x.astype(jnp.float32), filler)  # noqa: E731
    return fill(prediction), fill(target), known


def _summed(values: Float[Array, "b h w c"], known: Bool[Array, "b h w"]) -> Sums:
    """Sums over valid pixels and channels, and how many values they are of."""
    sums = jnp.where(known[..., None], values, 0.0).sum(axis=(1, 2, 3))
    return sums, known.sum(axis=(1, 2)).astype(jnp.float32) * values.shape[-1]


def l1(prediction: Float[Array, "b h w c"], target: Float[Array, "b h w c"], valid: Bool[Array, "b h w"] | None = None) -> Sums:
    """Absolute error over valid pixels and channels, as MultiMAE trains and measures the tasks of Taskonomy."""
    prediction, target, known = _prepared(prediction, target, valid)
    return _summed(jnp.abs(prediction - target), known)


def berhu(prediction: Float[Array, "b h w c"], target: Float[Array, "b h w c"], valid: Bool[Array, "b h w"] | None = None) -> Sums:
    """Reverse Huber: |d| below the threshold c, (d^2 + c^2) / (2 c) from there on.

    c = max(0.2 max |d|, 1e-5) over the valid pixels of the batch given, without gradient, as MultiMAE's depth script takes it over
    each GPU's part: another cut into micro-batches or devices is another c. Source: Laina et al., 2016.
    """
    prediction, target, known = _prepared(prediction, target, valid)
    error = jnp.abs(prediction - target)
    c = jax.lax.stop_gradient(jnp.maximum(0.2 * error.max(), 1e-5))
    return _summed(jnp.where(error < c, error, (jnp.square(error) + c * c) / (2 * c)), known)


def scale_and_shift_invariant(
    prediction: Float[Array, "b h w 1"], target: Float[Array, "b h w 1"], valid: Bool[Array, "b h w"] | None = None
) -> Sums:
    """Half the squared error after each sample's prediction is aligned to its target by least squares (`aligned`).

    It is MiDaS's "ssimse" (Ranftl et al., 2020), aligned over all valid pixels: not the trimmed variant by median and mean deviation.
    """
    prediction, target, known = _prepared(prediction, target, valid)
    error = aligned(prediction[..., 0], target[..., 0], known) - target[..., 0]
    return _summed(0.5 * jnp.square(error)[..., None], known)


def silog(
    prediction: Float[Array, "b h w 1"],
    target: Float[Array, "b h w 1"],
    valid: Bool[Array, "b h w"] | None = None,
    variance_focus: float = 0.5,
) -> Sums:
    """Scale-invariant logarithmic error: sqrt(mean d^2 - f (mean d)^2) with d = ln prediction - ln target, of each sample; count 1.

    f = `variance_focus`: 0 is the RMS of d, 1 its deviation. A loss per sample, where AdaBins, Pixio and others pool the pixels of a
    batch. Targets that are not above 0 do not count, predictions are taken as at least 1e-6. Source: Eigen et al., 2014.
    """
    valid = (target[..., 0] > 0) if valid is None else valid & (target[..., 0] > 0)
    prediction, target, known = _prepared(prediction, target, valid, filler=1.0)
    difference = (jnp.log(jnp.maximum(prediction, FLOOR)) - jnp.log(jnp.maximum(target, FLOOR)))[..., 0]
    weights = known.astype(jnp.float32)
    number = weights.sum(axis=(1, 2))
    mean = (difference * weights).sum(axis=(1, 2)) / jnp.maximum(number, 1.0)
    centered = (difference - mean[:, None, None]) * weights
    square = jnp.square(centered).sum(axis=(1, 2)) / jnp.maximum(number, 1.0) + (1 - variance_focus) * jnp.square(mean)
    wrong = square > 0  # the root has no gradient at 0
    return jnp.where(wrong, jnp.sqrt(jnp.where(wrong, square, 1.0)), 0.0), (number > 0).astype(jnp.float32)


def angular(prediction: Float[Array, "b h w 3"], target: Float[Array, "b h w 3"], valid: Bool[Array, "b h w"] | None = None) -> Sums:
    """Angle between predicted and true normals in radians, whatever their lengths; targets of length 0 do not count."""
    prediction, target, known = _prepared(prediction, target, _has_direction(target, valid))
    return _summed(angles(prediction, target)[..., None], known)


def cosine(prediction: Float[Array, "b h w 3"], target: Float[Array, "b h w 3"], valid: Bool[Array, "b h w"] | None = None) -> Sums:
    """1 - cosine of the angle between predicted and true normals; targets of length 0 do not count, predictions of length 0 have 1."""
    prediction, target, known = _prepared(prediction, target, _has_direction(target, valid))
    square = jnp.square(prediction).sum(axis=-1) * jnp.square(target).sum(axis=-1)
    directed = square > 0
    similarity = (prediction * target).sum(axis=-1) * jnp.where(directed, jax.lax.rsqrt(jnp.where(directed, square, 1.0)), 0.0)
    return _summed((1 - similarity)[..., None], known)


def _has_direction(target: Float[Array, "b h w 3"], valid: Bool[Array, "b h w"] | None) -> Bool[Array, "b h w"]:
    """Where a normal has a length, and is valid."""
    there = jnp.square(target).sum(axis=-1) > 0
    return there if valid is None else there & valid
