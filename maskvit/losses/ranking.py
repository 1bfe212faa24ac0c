"""The loss of a head that predicts which tokens are hard."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maskvit.losses.pixels import masked_mean


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
