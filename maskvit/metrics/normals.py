"""Figures of predicted surface normals: pixels counted by their angle on the device, and what they say of a data set."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from maskvit.core.comparison import angles

THRESHOLDS = (11.25, 22.5, 30.0)  # degrees
BINS = 18_000  # of the histogram that the median is read from, 0.01 degrees each


class NormalSums(NamedTuple):
    """Over valid pixels: how many, how many below each threshold, and in each bin of the angle; sums of the angle and its square."""

    pixels: Any  # Int ""
    under: Any  # Int "t"
    histogram: Any  # Int "n"
    angle: Any  # Float "", degrees
    square: Any  # Float "", degrees^2


def sums(
    prediction: Float[Array, "b h w 3"],
    target: Float[Array, "b h w 3"],
    known: Bool[Array, "b h w"] | None = None,
    valid: Bool[Array, " b"] | None = None,
) -> NormalSums:
    """The sums of a batch; directions of any length.

    A pixel counts where `known` is True and its target is finite and has a length; of padding, where `valid` is False, none do. A
    prediction without a length is 90 degrees off.
    """
    counted = jnp.isfinite(target).all(axis=-1) & (jnp.square(target).sum(axis=-1) > 0)
    if known is not None:
        counted &= known
    if valid is not None:
        counted &= valid[:, None, None]
    prediction, target = (jnp.where(counted[..., None], x.astype(jnp.float32), 1.0) for x in (prediction, target))
    angle = jnp.rad2deg(angles(prediction, target))
    below = jnp.stack([(counted & (angle < threshold)).sum(dtype=jnp.int32) for threshold in THRESHOLDS])
    place = jnp.where(counted, jnp.minimum((angle * (BINS / 180)).astype(jnp.int32), BINS - 1), BINS)  # one past the end: dropped
    histogram = jnp.zeros(BINS, jnp.int32).at[place.reshape(-1)].add(1, mode="drop")
    total = lambda values: jnp.where(counted, values, 0.0).sum()  # noqa: E731
    return NormalSums(counted.sum(dtype=jnp.int32), below, histogram, total(angle), total(jnp.square(angle)))


def summarize(sums: NormalSums) -> dict[str, float]:
    """Over all valid pixels of a set as one: "mean", "median" (within 0.01) and "rmse" of the angle in degrees, and "under_11.25" and so
    on, percent of pixels below a threshold. NaN where no pixel counts. Source: Fouhey et al., 2013."""
    sums = NormalSums(*map(np.asarray, sums))
    n = int(sums.pixels)
    names = ("mean", "median", "rmse", *(f"under_{threshold:g}" for threshold in THRESHOLDS))
    if not n:
        return dict.fromkeys(names, math.nan)
    # The middle of the bin that holds the middle pixel.
    median = (int(np.searchsorted(np.cumsum(sums.histogram, dtype=np.int64), (n + 1) // 2)) + 0.5) * 180 / BINS
    shares = [100.0 * int(x) / n for x in sums.under]
    return dict(zip(names, (float(sums.angle) / n, median, math.sqrt(float(sums.square) / n), *shares), strict=True))
