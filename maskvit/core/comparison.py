"""How a predicted map is held against a true one: angles between directions, and alignment up to scale and shift."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def angles(prediction: Float[Array, "*b 3"], target: Float[Array, "*b 3"]) -> Float[Array, "*b"]:
    """Angle between two directions of any length in radians, 0 to pi; pi / 2 where one has no length.

    By atan2 of cross and dot product: exact at 0, where the arc cosine loses half of its digits and has no finite slope.
    """
    square = jnp.square(jnp.cross(prediction, target)).sum(axis=-1)
    dot = (prediction * target).sum(axis=-1)
    apart = square > 0
    sine = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)
    directed = apart | (dot != 0)
    return jnp.where(directed, jnp.arctan2(sine, jnp.where(directed, dot, 1.0)), 0.5 * jnp.pi)


def aligned(prediction: Float[Array, "b h w"], target: Float[Array, "b h w"], known: Bool[Array, "b h w"]) -> Float[Array, "b h w"]:
    """s prediction + t with each sample's scale s and shift t of least squares over its known pixels; 0 elsewhere.

    A constant prediction gets s = 0 and t = the target's mean; no known pixel: 0 everywhere.
    """
    weights = known.astype(jnp.float32)
    count = jnp.maximum(weights.sum(axis=(1, 2), keepdims=True), 1.0)
    mean = lambda x: (x * weights).sum(axis=(1, 2), keepdims=True) / count  # noqa: E731
    middle, target_middle = mean(prediction), mean(target)
    centered = (prediction - middle) * weights
    variance, covariance = mean(jnp.square(centered)), mean(centered * (target - target_middle))
    varies = variance > 1e-10 * jnp.square(middle)  # less is rounding
    scale = jnp.where(varies, covariance / jnp.where(varies, variance, 1.0), 0.0)
    return (scale * centered + target_middle) * weights
