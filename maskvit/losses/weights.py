"""Guidance as weight of a token's loss (AttG)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maskvit.core.types import TokenLayout


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
