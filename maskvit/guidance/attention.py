"""The model's own attention as guidance: one pass over all tokens, without gradient, stopping at the last block's softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskvit.models import MultiMaeModel
from maskvit.types import Guidance, Params, TokenBatch

QUERIES = ("global", "mean")


def self_attention(model: MultiMaeModel, params: Params, tokens: TokenBatch, query: str = "global") -> Guidance:
    """Last-block attention received by every token, averaged over heads.

    `query`: "global" reads the global token's row, "mean" averages over all n + 1 queries (absent tokens not counted).
    The global token's own column is dropped and the rest is not renormalised. Source: the attention-guided MultiMAE
    project; which of the two rows it read is not published. The default is the row whose hidden tokens cover more of the
    objects on the demo's checkpoint (README, "Which attention row").
    """
    if query not in QUERIES:
        raise ValueError(f"config.objective.guidance.query is {query!r}; known: {', '.join(QUERIES)}")
    frozen = jax.lax.stop_gradient(params)
    batch = TokenBatch(jax.lax.stop_gradient(tokens.tokens), tokens.layout, tokens.present)
    n = tokens.layout.num_tokens
    queries = slice(n, None) if query == "global" else slice(None)
    weights = model.attention(frozen, batch, queries).mean(axis=1)
    if query == "global":
        return weights[:, -1, :n]
    if tokens.present is None:
        return weights.mean(axis=1)[:, :n]
    counted = jnp.pad(tokens.present, ((0, 0), (0, weights.shape[1] - n)), constant_values=True).astype(weights.dtype)
    return (jnp.einsum("bqn,bq->bn", weights, counted) / counted.sum(axis=1, keepdims=True))[:, :n]
