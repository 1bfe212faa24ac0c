"""From scores and counts to a plan: the one function that spends scores under a budget.

Randomness comes as one key per sample, so a sample's mask depends neither on its place in the batch nor on the number of devices or
micro-batches.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from maskvit.core.types import MaskPlan, TokenLayout

# Budgets


def present_counts(layout: TokenLayout, present: Bool[Array, "b n"] | None, batch_size: int) -> Int[Array, "b m"]:
    """How many tokens of each modality a sample has."""
    if present is None:
        return jnp.broadcast_to(jnp.array(layout.sizes, jnp.int32), (batch_size, len(layout.sizes)))
    return jnp.stack([present[:, span].sum(axis=1, dtype=jnp.int32) for span in layout.spans()], axis=1)


# Spending


def drop(
    scores: Float[Array, "b n"],
    counts: Int[Array, "b m"],
    layout: TokenLayout,
    num_visible: int,
    present: Bool[Array, "b n"] | None = None,
    predict_share: float = 1.0,
    predict_scores: Float[Array, "b n"] | None = None,
) -> MaskPlan:
    """Show `counts` tokens of each modality, those with the lowest scores, and hide the others.

    Ties: the lower index is hidden first. Absent tokens are hidden and never predicted. `counts` must not exceed what a
    modality has nor add up to more than `num_visible`; the budgets see to that. Of each modality's hidden tokens only
    round(predict_share * hidden) are predicted, those with the highest `predict_scores` (by default the scores themselves).
    """
    sizes = present_counts(layout, present, scores.shape[0])
    parts = []
    for i, span in enumerate(layout.spans()):
        here = scores[:, span] if present is None else jnp.where(present[:, span], scores[:, span], -jnp.inf)
        rank = jnp.argsort(jnp.argsort(-here, axis=1, stable=True), axis=1)  # 0 = hide first; absent tokens come last
        hidden = rank < (sizes[:, i] - counts[:, i])[:, None]
        parts.append(hidden if present is None else hidden | ~present[:, span])
    masked = jnp.concatenate(parts, axis=1)
    predicted = masked if present is None else masked & present
    if predict_share < 1:
        order = scores if predict_scores is None else predict_scores
        predicted = jnp.concatenate([_top_share(order[:, s], predicted[:, s], predict_share) for s in layout.spans()], axis=1)
    visible_ids = jnp.argsort(masked, axis=1, stable=True)[:, :num_visible]
    predicted_ids = jnp.argsort(~predicted, axis=1, stable=True)[:, : layout.num_tokens - num_visible]
    return MaskPlan(
        visible_ids=visible_ids,
        visible_valid=~jnp.take_along_axis(masked, visible_ids, axis=1),
        predicted_ids=predicted_ids,
        predicted_valid=jnp.take_along_axis(predicted, predicted_ids, axis=1),
        masked=masked,
    )


def _top_share(scores: Float[Array, "b n"], among: Bool[Array, "b n"], share: float) -> Bool[Array, "b n"]:
    """The round(share * count) highest of the tokens `among`, at least one where there is any."""
    count = among.sum(axis=1, keepdims=True)
    wanted = jnp.maximum(jnp.round(share * count), jnp.minimum(count, 1))
    rank = jnp.argsort(jnp.argsort(-jnp.where(among, scores, -jnp.inf), axis=1, stable=True), axis=1)
    return among & (rank < wanted)


def mix_with_random(
    keys: Key[Array, " b"],
    scores: Float[Array, "b n"],
    counts: Int[Array, "b m"],
    layout: TokenLayout,
    share: float | Float[Array, ""],
    present: Bool[Array, "b n"] | None = None,
) -> Float[Array, "b n"]:
    """Scores under which round(share * hidden) tokens of each modality are hidden by `scores` and the rest at random.

    Easy to hard as in HPM: a share of 0 is random masking, 1 leaves the ranking as it is.
    """
    sizes = present_counts(layout, present, scores.shape[0])
    noise = jax.vmap(lambda key: jax.random.uniform(key, (layout.num_tokens,)))(keys)
    parts = []
    for i, span in enumerate(layout.spans()):
        here = scores[:, span] if present is None else jnp.where(present[:, span], scores[:, span], -jnp.inf)
        rank = jnp.argsort(jnp.argsort(-here, axis=1, stable=True), axis=1)
        guided = jnp.round(share * (sizes[:, i] - counts[:, i]))[:, None]
        parts.append(jnp.where(rank < guided, 2.0 + (rank.shape[1] - rank), noise[:, span]))
    return jnp.concatenate(parts, axis=1)


def show_all(layout: TokenLayout, batch_size: int, present: Bool[Array, "b n"] | None = None) -> MaskPlan:
    """A plan that hides nothing but absent tokens."""
    counts = present_counts(layout, present, batch_size)
    return drop(jnp.zeros((batch_size, layout.num_tokens)), counts, layout, layout.num_tokens, present)


def predicted_mask(plan: MaskPlan) -> Bool[Array, "b n"]:
    """True for the tokens a loss is taken on."""
    rows = jnp.arange(plan.masked.shape[0])[:, None]
    return jnp.zeros_like(plan.masked).at[rows, plan.predicted_ids].max(plan.predicted_valid)


def gather_tokens(tokens: Float[Array, "b n d"], ids: Int[Array, "b v"]) -> Float[Array, "b v d"]:
    """Select tokens by id. Ids are unique in a sample, which keeps the backward scatter free of atomics."""

    def one_sample(rows: Any, index: Any) -> Any:
        return rows.at[index].get(unique_indices=True, mode="promise_in_bounds")

    return jax.vmap(one_sample)(tokens, ids)
