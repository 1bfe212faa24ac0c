"""Reconstruction losses over patch vectors, the normalisations of their targets, and the losses of self-distillation.

Every masked loss is a mean over samples of per-sample means, over the pixels of hidden tokens that have a value. It
comes as (sum of the per-sample means, number of samples that have one), so that micro-batches and devices add exactly.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from maskvit.types import TokenLayout


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

    Returns (normalised target, mean, deviation); the latter two undo it for pictures.
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
    """MultiMAE's depth standardisation: mean and unbiased variance of the sorted valid values between the positions
    floor(trim * n) and floor((1 - trim) * n); the whole map is transformed, outliers included.

    Returns (standardised values, 0 where invalid; mean; deviation). A sample with fewer than two kept values keeps
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


# Guidance as loss weight


def normalise_guidance(
    guidance: Float[Array, "b n"], layout: TokenLayout, present: Bool[Array, "b n"] | None = None
) -> Float[Array, "b n"]:
    """Guidance scaled to [0, 1] per image and modality: the least of the present tokens at 0, the most at 1.

    A modality whose guidance is constant is background everywhere (0), absent tokens too.
    """
    parts = []
    for span in layout.spans():
        here = guidance[:, span]
        there = jnp.ones(here.shape, bool) if present is None else present[:, span]
        low = jnp.where(there, here, jnp.inf).min(axis=1, keepdims=True)
        high = jnp.where(there, here, -jnp.inf).max(axis=1, keepdims=True)
        wide = high > low  # also False where nothing is present
        parts.append(jnp.where(there & wide, (here - jnp.where(wide, low, 0.0)) / jnp.where(wide, high - low, 1.0), 0.0))
    return jnp.concatenate(parts, axis=1)


def guidance_weights(
    guidance: Float[Array, "b n"],
    layout: TokenLayout,
    tau: float | Float[Array, ""],
    gamma: float = 1.0,
    present: Bool[Array, "b n"] | None = None,
) -> Float[Array, "b n"]:
    """gamma * exp(g / tau) with g normalised to [0, 1]: background weighs exactly gamma, the most important exp(1 / tau) of it.

    The temperature stands inside the exponential. Source: AttG (Attention-Guided Masked Autoencoders, 2024), whose text gives
    gamma no value.
    """
    return gamma * jnp.exp(normalise_guidance(guidance, layout, present) / tau)


def cosine_between(start: float, end: float, progress: Float[Array, ""]) -> Float[Array, ""]:
    """Half a cosine from `start` at progress 0 to `end` at 1, constant beyond."""
    return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))


def ranking_loss(
    predicted: Float[Array, "b n"], errors: Float[Array, "b n"], counted: Bool[Array, "b n"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Learning which of two tokens is harder: binary cross-entropy of predicted[i] - predicted[j] over all pairs of counted tokens.

    As `masked_mean`: (sum over samples of the mean over pairs, samples with a pair). Pairs of equal error do not count.
    Source: HPM (Hard Patches Mining, 2023).
    """
    errors = jax.lax.stop_gradient(errors)
    difference = predicted[:, :, None] - predicted[:, None, :]
    harder = errors[:, :, None] > errors[:, None, :]
    # A pair (i, j) with i harder stands for (j, i) too: both have the same loss.
    pairs = (harder & counted[:, :, None] & counted[:, None, :]).astype(jnp.float32)
    return masked_mean(jax.nn.softplus(-difference), pairs)


# Self-distillation


def distillation_targets(logits: Float[Array, "*b k"], center: Float[Array, " k"], temperature: Any) -> Float[Array, "*b k"]:
    """What the student is to predict: the teacher's logits less their running mean, sharpened; no gradient (DINO, 2021)."""
    return jax.lax.stop_gradient(jax.nn.softmax((logits - center) / temperature, axis=-1))


def across_views(targets: Float[Array, "b t k"], logits: Float[Array, "b s k"], temperature: float) -> Float[Array, " b"]:
    """Per image, mean cross-entropy over all pairs of a teacher's and another student's view, the first t of which are the same views."""
    log_probabilities = jax.nn.log_softmax(logits / temperature, axis=-1)
    pairs = -jnp.einsum("btk,bsk->bts", targets, log_probabilities)
    different = ~jnp.eye(pairs.shape[1], pairs.shape[2], dtype=bool)
    return jnp.where(different, pairs, 0.0).sum(axis=(1, 2)) / different.sum()


def at_masked_tokens(
    targets: Float[Array, "r n k"], logits: Float[Array, "r n k"], masked: Bool[Array, "r n"], temperature: float
) -> Float[Array, " r"]:
    """Per view, mean cross-entropy over its masked tokens; 0 where none is masked (iBOT, 2022)."""
    # The softmax of the student is over logits / temperature: its normaliser apart from the product saves an array of all logits.
    scaled = logits / temperature
    losses = jax.nn.logsumexp(scaled, axis=-1) - jnp.einsum("rnk,rnk->rn", targets, scaled)
    return jnp.where(masked, losses, 0.0).sum(axis=1) / jnp.maximum(masked.sum(axis=1), 1)
