"""Which tokens to hide: score functions, token budgets, and the one function that spends scores under a budget.

A masking strategy is a score function, high = hide first. A budget says how many tokens each modality may show. `drop`
turns both into a `MaskPlan` of static shape. Randomness comes as one key per sample, so a sample's mask depends neither
on its place in the batch nor on the number of devices or micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from maskvit.types import Guidance, MaskPlan, TokenLayout

# Scores


def random_scores(keys: Key[Array, " b"], layout: TokenLayout, guidance: Guidance | None = None) -> Float[Array, "b n"]:
    """Uniform noise: every token of a modality is equally likely to be hidden (MAE, MultiMAE)."""
    return jax.vmap(lambda key: jax.random.uniform(key, (layout.num_tokens,)))(keys)


def attention_high(keys: Key[Array, " b"], layout: TokenLayout, guidance: Guidance | None = None) -> Float[Array, "b n"]:
    """Hide what the guidance ranks highest (AttMask-High; attention-guided MultiMAE)."""
    return _need(guidance, "attention_high")


def attention_low(keys: Key[Array, " b"], layout: TokenLayout, guidance: Guidance | None = None) -> Float[Array, "b n"]:
    """Hide what the guidance ranks lowest (AttMask-Low)."""
    return -_need(guidance, "attention_low")


def _need(guidance: Guidance | None, name: str) -> Guidance:
    if guidance is None:
        raise ValueError(f"scores {name!r} need a guidance source: set config.objective.guidance, for example name='self_attention'")
    return guidance


SCORES: dict[str, Callable[..., Float[Array, "b n"]]] = {
    "random": random_scores,
    "attention_high": attention_high,
    "attention_low": attention_low,
}
GUIDED_SCORES = ("attention_high", "attention_low")


# Budgets


def present_counts(layout: TokenLayout, present: Bool[Array, "b n"] | None, batch_size: int) -> Int[Array, "b m"]:
    """How many tokens of each modality a sample has."""
    if present is None:
        return jnp.broadcast_to(jnp.array(layout.sizes, jnp.int32), (batch_size, len(layout.sizes)))
    return jnp.stack([present[:, span].sum(axis=1, dtype=jnp.int32) for span in layout.spans()], axis=1)


def dirichlet_budget(
    keys: Key[Array, " b"],
    layout: TokenLayout,
    num_visible: int,
    present: Bool[Array, "b n"] | None = None,
    alphas: float | tuple[float, ...] = 1.0,
) -> Int[Array, "b m"]:
    """Visible tokens per modality from a Dirichlet draw, rounded and repaired as the MultiMAE reference does.

    Shares p ~ Dirichlet(alphas); counts round(num_visible * p), half to even, at most what the modality has. Where they
    do not add up to `num_visible`, tokens drawn uniformly from all hidden ones become visible, or uniformly from all
    visible ones become hidden. Absent modalities get nothing; a sample with fewer tokens than `num_visible` shows all.
    """
    modalities = len(layout.names)
    if isinstance(alphas, (int, float)):
        alphas = (float(alphas),) * modalities
    if len(alphas) != modalities:
        raise ValueError(f"config.objective.budget.alphas has {len(alphas)} values for {modalities} modalities {layout.names}")
    if min(alphas) <= 0:
        raise ValueError(f"config.objective.budget.alphas must be positive, not {alphas}")
    sizes = present_counts(layout, present, keys.shape[0])
    column = jnp.concatenate([jnp.arange(size) for size in layout.sizes])  # index of a token inside its modality

    def one_sample(key: Key[Array, ""], size: Int[Array, " m"]) -> Int[Array, " m"]:
        share_key, repair_key = jax.random.split(key)
        total = jnp.minimum(num_visible, size.sum())
        # Softmax of log-gamma draws: a Dirichlet sample that survives alphas near zero in float32.
        log_gamma = jax.random.loggamma(share_key, jnp.array(alphas))
        share = jax.nn.softmax(jnp.where(size > 0, log_gamma, -jnp.inf))
        counts = jnp.minimum(jnp.round(total * share).astype(jnp.int32), size)
        # Repair. Inside a modality tokens are exchangeable, so its first `count` slots stand for its visible ones.
        repeat = lambda x: jnp.concatenate([jnp.broadcast_to(x[i], (n,)) for i, n in enumerate(layout.sizes)])  # noqa: E731
        chosen, exists = column < repeat(counts), column < repeat(size)
        noise = jax.random.uniform(repair_key, (layout.num_tokens,))
        order = jnp.argsort(jnp.where(chosen, noise, jnp.where(exists, 1 + noise, 2 + noise)))
        visible = jnp.zeros(layout.num_tokens, jnp.int32).at[order].set(jnp.arange(layout.num_tokens) < total)
        return jnp.stack([visible[span].sum() for span in layout.spans()])

    return jax.vmap(one_sample)(keys, sizes)


BUDGETS: dict[str, Callable[..., Int[Array, "b m"]]] = {"dirichlet": dirichlet_budget}


# Spending


def drop(
    scores: Float[Array, "b n"],
    counts: Int[Array, "b m"],
    layout: TokenLayout,
    num_visible: int,
    present: Bool[Array, "b n"] | None = None,
) -> MaskPlan:
    """Show `counts` tokens of each modality, those with the lowest scores, and hide the others.

    Ties: the lower index is hidden first. Absent tokens are hidden and never predicted. `counts` must not exceed what a
    modality has nor add up to more than `num_visible`; the budgets see to that.
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
    visible_ids = jnp.argsort(masked, axis=1, stable=True)[:, :num_visible]
    predicted_ids = jnp.argsort(~predicted, axis=1, stable=True)[:, : layout.num_tokens - num_visible]
    return MaskPlan(
        visible_ids=visible_ids,
        visible_valid=~jnp.take_along_axis(masked, visible_ids, axis=1),
        predicted_ids=predicted_ids,
        predicted_valid=jnp.take_along_axis(predicted, predicted_ids, axis=1),
        masked=masked,
    )


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
