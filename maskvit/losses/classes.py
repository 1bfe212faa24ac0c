"""Losses of classifiers.

Each comes as (losses, weights) of the samples or pixels: the loss of a batch is the sum of losses over the sum of weights, and as
both are sums, micro-batches and devices add exactly. What has no label has loss and weight 0. Computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def soft_target_cross_entropy(
    logits: Float[Array, "*b k"], target: Float[Array, "*b k"], valid: Bool[Array, "*b"] | None = None
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """Against a distribution over classes, as mixup and cutmix make them: - sum target log softmax(logits), in nats; weight 1.

    Source: timm's SoftTargetCrossEntropy, with which MAE and MultiMAE fine-tune. `valid`: False for samples that do not count.
    """
    losses = -(target * jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)).sum(axis=-1)
    if valid is None:
        return losses, jnp.ones_like(losses)
    return jnp.where(valid, losses, 0.0), valid.astype(jnp.float32)


def cross_entropy(
    logits: Float[Array, "*b k"],
    label: Int[Array, "*b"],
    smoothing: float = 0.0,
    class_weights: Sequence[float] | Float[Array, " k"] | None = None,
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """Against class ids, in nats; negative ids (no label) are ignored.

    `smoothing` s mixes the target with the uniform distribution over all k classes: (1 - s) + s / k for the label, s / k for each
    other. `class_weights` multiply each class's part; a sample's weight is that of its label. Both as torch's CrossEntropyLoss.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    known, label = label >= 0, jnp.maximum(label, 0)
    weights = jnp.ones(logits.shape[-1]) if class_weights is None else jnp.asarray(class_weights, jnp.float32)
    weight = weights[label]
    losses = -weight * jnp.take_along_axis(log_probabilities, label[..., None], axis=-1)[..., 0]
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * (weights * log_probabilities).mean(axis=-1)
    return jnp.where(known, losses, 0.0), jnp.where(known, weight, 0.0)
