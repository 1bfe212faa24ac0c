"""Where a self-supervised ViT looks: the last block's attention of the class token as a map of objects (DINO)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maskvit.core.types import Params, TokenBatch
from maskvit.heads.network import Network


def heaviest(weights: Float[Array, "*b n"], mass: float) -> Float[Array, "*b n"]:
    """The smallest set of tokens that holds at least `mass` of the sum; the others' weights become 0."""
    order = jnp.argsort(-weights, axis=-1, stable=True)
    ordered = jnp.take_along_axis(weights, order, axis=-1)
    share_before = (jnp.cumsum(ordered, axis=-1) - ordered) / jnp.maximum(ordered.sum(axis=-1, keepdims=True), 1e-30)
    kept = jnp.take_along_axis(share_before < mass, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, weights, 0.0)


def attention_map(
    model: Network,
    params: Params,
    batch: TokenBatch,
    head: int | None = None,
    mass: float | int | None = None,
    block: int = -1,
    modality: str | None = None,
) -> Float[Array, "b gh gw"]:
    """The class (last global) token's attention to the patches of one modality (the first by default), 0 ... 1 per picture.

    Args:
      head: one head; None for the mean over all.
      mass: keep only the smallest set of patches that holds this share of the attention, as in the visualization of Caron et
        al., "Emerging Properties in Self-Supervised Vision Transformers", 2021; background is then exactly 0. None keeps all,
        and the least attended patch becomes 0.
    """
    sizes = dict(model.encoder)
    if not model.num_global_tokens:
        raise ValueError("attention maps read the global token's row, but the model has none")
    if head is not None and not 0 <= head < sizes["heads"]:
        raise ValueError(f"head is {head}; the encoder has heads 0 ... {sizes['heads'] - 1}")
    if mass is not None and not 0 < mass <= 1:
        raise ValueError(f"mass is {mass}; it is a share of the attention: above 0 and at most 1")
    if not -sizes["depth"] <= block < sizes["depth"]:
        raise ValueError(f"block is {block}; the encoder has blocks 0 ... {sizes['depth'] - 1} (or -1 for the last)")
    name = batch.layout.names[0] if modality is None else modality
    if name not in batch.layout.names:
        raise ValueError(f"modality {name!r} is none of the inputs {', '.join(batch.layout.names)}")
    rows = model.attention(params, batch, slice(batch.layout.num_tokens, None), block)[:, :, -1, batch.layout.span(name)]
    rows = rows.mean(axis=1) if head is None else rows[:, head]
    if mass is None:
        rows = rows - rows.min(axis=1, keepdims=True)
    else:
        rows = heaviest(rows, mass)
    rows = rows / jnp.maximum(rows.max(axis=1, keepdims=True), 1e-30)
    return jax.lax.stop_gradient(rows.reshape(-1, *batch.layout.grids[batch.layout.names.index(name)]))
