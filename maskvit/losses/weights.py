"""Guidance as weight of a token's loss (AttG)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maskvit.core.types import TokenLayout


def unit_range(values: Float[Array, "*b n"], there: Bool[Array, "*b n"] | None = None) -> Float[Array, "*b n"]:
    """Values scaled to [0, 1] along the last axis; 0 where all are the same, and for those that are not `there`."""
    there = jnp.ones(values.shape, bool) if there is None else there
    low = jnp.where(there, values, jnp.inf).min(axis=-1, keepdims=True)
    high = jnp.where(there, values, -jnp.inf).max(axis=-1, keepdims=True)
    wide = high > low  # also False where nothing is there
    return jnp.where(there & wide, (values - jnp.where(wide, low, 0.0)) / jnp.where(wide, high - low, 1.0), 0.0)


def normalize_guidance(
    guidance: Float[Array, "b n"], layout: TokenLayout, present: Bool[Array, "b n"] | None = None
) -> Float[Array, "b n"]:
    """Guidance scaled to [0, 1] per image and modality: the least of the present tokens at 0, the most at 1.

    A modality whose guidance is constant is background everywhere (0), absent tokens too.
    """
    parts = [unit_range(guidance[:, span], None if present is None else present[:, span]) for span in layout.spans()]
    return jnp.concatenate(parts, axis=1)


def guidance_weights(
    guidance: Float[Array, "b n"],
    layout: TokenLayout,
    tau: float | Float[Array, ""],
    gamma: float = 1.0,
    present: Bool[Array, "b n"] | None = None,
) -> Float[Array, "b n"]:
    """gamma * exp(g / tau) with g normalized to [0, 1]: background weighs exactly gamma, the most important exp(1 / tau) of it.

    The temperature stands inside the exponential. Source: AttG (Attention-Guided Masked Autoencoders, 2024), whose text gives
    gamma no value.
    """
    return gamma * jnp.exp(normalize_guidance(guidance, layout, present) / tau)


def cosine_between(start: float, end: float, progress: Float[Array, ""]) -> Float[Array, ""]:
    """Half a cosine from `start` at progress 0 to `end` at 1, constant beyond."""
    return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
