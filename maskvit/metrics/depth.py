"""Figures of a depth prediction: sums per picture on the device, and what they say of a data set in three ways of averaging."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from maskvit.core.comparison import aligned
from maskvit.core.configuration import look_up

FLOOR = 1e-6  # of denominators and logarithms
NYU_SIZE, NYU_CROP = (480, 640), (slice(45, 471), slice(41, 601))  # Eigen et al., 2014


class DepthSums(NamedTuple):
    """Sums over the valid pixels of every picture, "b". d is the error of the depth, l that of its natural logarithm."""

    pixels: Any  # Int, how many
    under_1: Any  # Int, how many with max(p / t, t / p) below 1.25
    under_2: Any  # the same below 1.25^2
    under_3: Any
    absolute: Any  # Float, |d| / t
    squared_relative: Any  # d^2 / t
    squared: Any  # d^2
    log: Any  # l
    log_spread: Any  # (l - the picture's mean)^2
    absolute_log: Any  # |l|


def sums(
    prediction: Float[Array, "b h w"],
    target: Float[Array, "b h w"],
    known: Bool[Array, "b h w"] | None = None,
    valid: Bool[Array, " b"] | None = None,
    *,
    eigen_crop: bool = False,
    depth_range: tuple[float, float] | None = None,
    align: Literal["median", "least_squares"] | None = None,
) -> DepthSums:
    """The sums of a batch; depths in any unit, both in the same.

    A pixel counts where `known` is True and its target is finite; of padding, where `valid` is False, none do.

    Args:
      eigen_crop: only the part of NYUv2's 480 x 640 pictures that everyone measures, rows 45 to 470 and columns 41 to 600.
      depth_range: (least, greatest): targets count between them, both included; predictions are clamped there, after alignment.
      align: for predictions up to scale: times each picture's ratio of medians; or up to scale and shift: least squares.
    """
    counted = jnp.isfinite(target)
    if known is not None:
        counted &= known
    if valid is not None:
        counted &= valid[:, None, None]
    if eigen_crop:
        if target.shape[1:] != NYU_SIZE:
            raise ValueError(
                f"eigen_crop is for pictures of {NYU_SIZE[0]} x {NYU_SIZE[1]}, not {target.shape[1]} x {target.shape[2]}: leave it out"
            )
        counted &= jnp.zeros(NYU_SIZE, bool).at[NYU_CROP].set(True)
    if depth_range is not None:
        counted &= (target >= depth_range[0]) & (target <= depth_range[1])
    prediction, target = (jnp.where(counted, x.astype(jnp.float32), 0.0) for x in (prediction, target))
    if align is not None:
        prediction = look_up("align", ALIGNMENTS, align)(prediction, target, counted)
    if depth_range is not None:
        prediction = jnp.clip(prediction, *depth_range)
    return _pixel_sums(prediction, target, counted)


def _pixel_sums(prediction: Float[Array, "b h w"], target: Float[Array, "b h w"], counted: Bool[Array, "b h w"]) -> DepthSums:
    total = lambda values: jnp.where(counted, values, 0.0).sum(axis=(1, 2))  # noqa: E731
    number = lambda which: (which & counted).sum(axis=(1, 2), dtype=jnp.int32)  # noqa: E731
    low, low_target = jnp.maximum(prediction, FLOOR), jnp.maximum(target, FLOOR)
    error, ratio = prediction - target, jnp.maximum(prediction / low_target, target / low)
    log_error = jnp.log(low) - jnp.log(low_target)
    mean = total(log_error) / jnp.maximum(number(counted), 1)
    return DepthSums(
        pixels=number(counted), under_1=number(ratio < 1.25), under_2=number(ratio < 1.25**2), under_3=number(ratio < 1.25**3),
        absolute=total(jnp.abs(error) / low_target), squared_relative=total(jnp.square(error) / low_target),
        squared=total(jnp.square(error)), log=total(log_error), log_spread=total(jnp.square(log_error - mean[:, None, None])),
        absolute_log=total(jnp.abs(log_error)),
    )  # fmt: skip


def _times_median(prediction: Float[Array, "b h w"], target: Float[Array, "b h w"], known: Bool[Array, "b h w"]) -> Float[Array, "b h w"]:
    median = lambda x: jnp.nanmedian(jnp.where(known, x, jnp.nan), axis=(1, 2), keepdims=True)  # noqa: E731
    middle = median(prediction)
    positive = middle > 0  # False for NaN, of a picture without valid pixels; no factor makes other predictions depths
    return prediction * jnp.where(positive, median(target) / jnp.where(positive, middle, 1.0), 1.0)


ALIGNMENTS: Mapping[str, Any] = {"median": _times_median, "least_squares": aligned}


def _pooled(part: DepthSums) -> DepthSums:
    """The sums of several pictures as those of one that holds all their pixels."""
    pixels, log = part.pixels, part.log
    total = DepthSums(*(x.sum(keepdims=True) for x in part))
    means = np.divide(log, pixels, out=np.zeros_like(log), where=pixels > 0)
    mean = total.log / np.maximum(total.pixels, 1)
    return total._replace(log_spread=total.log_spread + (pixels * np.square(means - mean)).sum(keepdims=True))


AGGREGATIONS: Mapping[str, Any] = {
    "per_image": lambda batches: batches,
    "per_batch": lambda batches: [_pooled(part) for part in batches],
    "pixels": lambda batches: [_pooled(DepthSums(*map(np.concatenate, zip(*batches, strict=True))))],
}


def summarize(batches: Sequence[DepthSums], aggregation: str = "per_image") -> dict[str, float]:
    """The figures of a data set; NaN where no pixel counts. `batches`: what `sums` gave, in order.

    "delta_1" ... "delta_3": percent of pixels with max(p / t, t / p) below 1.25^k; a prediction not above 0 is a miss. "abs_rel", "sq_rel",
    "rmse". "rmse_log": of natural logarithms (MultiMAE's script calls it log10). "log10": mean |log10 p - log10 t|. "silog": the
    deviation of ln p - ln t, times 100.

    Args:
      aggregation: "per_image": means over the pictures of each one's figures, as of most publications. "per_batch": the same over
        batches of pixels, as MultiMAE's script does: depends on the batch, and one without pixels is none. "pixels": of all pixels as one.
    """
    host = [DepthSums(*(np.asarray(x, np.float64) for x in part)) for part in batches]
    groups = look_up("aggregation", AGGREGATIONS, aggregation)(host) if host else []
    rows = [DepthSums(*(x[part.pixels > 0] for x in part)) for part in groups]
    names = ("delta_1", "delta_2", "delta_3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")
    if not sum(len(part.pixels) for part in rows):
        return dict.fromkeys(names, math.nan)
    n, *under, absolute, squared_relative, squared, log, spread, absolute_log = map(np.concatenate, zip(*rows, strict=True))
    values = (
        *(100.0 * x / n for x in under), absolute / n, squared_relative / n, np.sqrt(squared / n),
        np.sqrt(spread / n + np.square(log / n)), absolute_log / n / math.log(10), 100.0 * np.sqrt(spread / n),
    )  # fmt: skip
    return {name: float(value.mean()) for name, value in zip(names, values, strict=True)}
