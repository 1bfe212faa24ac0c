"""The losses of self-distillation: between views, and on masked patches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


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
    # The softmax of the student is over logits / temperature: its normalizer apart from the product saves an array of all logits.
    scaled = logits / temperature
    losses = jax.nn.logsumexp(scaled, axis=-1) - jnp.einsum("rnk,rnk->rn", targets, scaled)
    return jnp.where(masked, losses, 0.0).sum(axis=1) / jnp.maximum(masked.sum(axis=1), 1)
