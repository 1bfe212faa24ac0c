"""Reconstruction losses over patch vectors, the normalizations of their targets, and the losses of self-distillation.

Every masked loss is a mean over samples of per-sample means, over the pixels of hidden tokens that have a value. It
comes as (sum of the per-sample means, number of samples that have one), so that micro-batches and devices add exactly.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def masked_mean(values: Float[Array, "b n p"], weights: Float[Array, "b n p"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum over samples of their weighted means, number of samples with any weight).

    The denominator is guarded before dividing: a sample without weight has a zero gradient, where 0/0 would have NaN.
    """
    total = weights.sum(axis=(1, 2))
    counted = total > 0
    means = jnp.where(counted, (values * weights).sum(axis=(1, 2)) / jnp.where(counted, total, 1.0), 0.0)
    return means.sum(), counted.sum().astype(jnp.float32)


def squared_error(prediction: Float[Array, "b n p c"], target: Float[Array, "b n p c"]) -> Float[Array, "b n p"]:
    """Per pixel, mean over channels."""
    return jnp.square(prediction - target).mean(axis=-1)


def absolute_error(prediction: Float[Array, "b n p c"], target: Float[Array, "b n p c"]) -> Float[Array, "b n p"]:
    """Per pixel, mean over channels."""
    return jnp.abs(prediction - target).mean(axis=-1)


def cross_entropy(logits: Float[Array, "b n p k"], target: Int[Array, "b n p"]) -> Float[Array, "b n p"]:
    """Per pixel, in nats, without label smoothing. Negative targets (no label) give 0 and must have no weight."""
    picked = jnp.take_along_axis(logits, jnp.maximum(target, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(target >= 0, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)


PIXEL_LOSSES = {"mse": squared_error, "l1": absolute_error, "cross_entropy": cross_entropy}


def normalize_patches(
    target: Float[Array, "b n p c"], valid: Float[Array, "b n p"] | None = None, eps: float = 1e-6
) -> tuple[Float[Array, "b n p c"], Float[Array, "b n 1 1"], Float[Array, "b n 1 1"]]:
    """Each patch minus its mean, over its deviation: (t - mean) / sqrt(var + eps), unbiased, pixels and channels together.

    Returns (normalized target, mean, deviation); the latter two undo it for pictures.
    """
    weights = jnp.ones(target.shape[:3], target.dtype) if valid is None else valid
    weights = jnp.broadcast_to(weights[..., None], target.shape)
    count = weights.sum(axis=(2, 3), keepdims=True)
    mean = (target * weights).sum(axis=(2, 3), keepdims=True) / jnp.maximum(count, 1)
    variance = (jnp.square(target - mean) * weights).sum(axis=(2, 3), keepdims=True) / jnp.maximum(count - 1, 1)
    deviation = jnp.sqrt(variance + eps)
    return (target - mean) / deviation, mean, deviation


def standardize_trimmed(
    values: Float[Array, "b h w c"], valid: Bool[Array, "b h w 1"] | None = None, trim: float = 0.1, eps: float = 1e-6
) -> tuple[Float[Array, "b h w c"], Float[Array, "b 1 1 1"], Float[Array, "b 1 1 1"]]:
    """MultiMAE's depth standardization: mean and unbiased variance of the sorted valid values between the positions
    floor(trim * n) and floor((1 - trim) * n); the whole map is transformed, outliers included.

    Returns (standardized values, 0 where invalid; mean; deviation). A sample with fewer than two kept values keeps
    deviation sqrt(eps).
    """
    b = values.shape[0]
    flat = values.reshape(b, -1)
    if valid is None:
        low, high = (jnp.full((b, 1), int(share * flat.shape[1])) for share in (trim, 1 - trim))
        ordered = jnp.sort(flat, axis=1)
    else:
        known = jnp.broadcast_to(valid, values.shape).reshape(b, -1)
        n = known.sum(axis=1, keepdims=True)
        # A small push keeps floor(0.1 * n) from falling short in float32 where 0.1 * n is whole.
        low, high = (jnp.floor(share * n + 1e-3).astype(jnp.int32) for share in (trim, 1 - trim))
        ordered = jnp.where(jnp.arange(flat.shape[1]) < n, jnp.sort(jnp.where(known, flat, jnp.inf), axis=1), 0.0)
    position = jnp.arange(flat.shape[1])
    kept = ((position >= low) & (position < high)).astype(flat.dtype)
    count = kept.sum(axis=1, keepdims=True)
    mean = (ordered * kept).sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
    variance = (jnp.square(ordered - mean) * kept).sum(axis=1, keepdims=True) / jnp.maximum(count - 1, 1)
    mean, deviation = mean.reshape(b, 1, 1, 1), jnp.sqrt(variance + eps).reshape(b, 1, 1, 1)
    standard = (values - mean) / deviation
    return standard if valid is None else jnp.where(valid, standard, 0.0), mean, deviation
