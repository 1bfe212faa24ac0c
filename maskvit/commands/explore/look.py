"""What the page shows, as pure functions: arrays in, arrays out, one compiled program each whatever is clicked.

Every array has the shape of all tokens of all modalities: what a sample lacks is absent (`present`), and the visible tokens are padded
to the number of all, so that no number of tokens is a program of its own.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

from maskvit.core.keys import stream_keys
from maskvit.core.types import Batch, MaskPlan, Params, TokenBatch, TokenLayout
from maskvit.guidance.attention import read_attention
from maskvit.heads.values import Prepared, prepare
from maskvit.masking.budgets import BUDGETS
from maskvit.masking.plan import drop
from maskvit.masking.scores import SCORES

# How many tokens each modality shows: the budgets that take any number and need nothing that a run keeps.
BUDGET_NAMES = ("equal", "dirichlet", "uniform_subsets", "joint")
Options = tuple[tuple[str, Any], ...]


class Seen(NamedTuple):
    """An unmasked pass; `n` tokens of all inputs, `e` those and the global tokens, which come last, `l` blocks.

    `features`: what leaves the last block, normed as the model does; `attention`: of every block, mean over heads; `present`: tokens that
    exist.
    """

    features: Float[Array, "b n d"]
    attention: Float[Array, "b l e e"]
    present: Bool[Array, "b n"]


class Rebuilt(NamedTuple):
    """Every output in stored units or class ids, and its loss on the hidden tokens that have a target: (sum over samples, how many)."""

    maps: dict[str, Num[Array, "b h w *c"]]
    losses: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


def _embedded(model: Any, params: Params, batch: Batch) -> tuple[Prepared, TokenBatch, Bool[Array, "b n"]]:
    """A batch in model values, its tokens, and which of them exist; `batch.present` must be given."""
    prepared = prepare(model, batch)
    if prepared.present is None:
        raise ValueError("the batch does not say which modalities its samples have")
    return prepared, model.embed(params, prepared.values_of(model.inputs), prepared.present), prepared.present


@functools.partial(jax.jit, static_argnames="model")
def see(model: Any, params: Params, batch: Batch) -> Seen:
    """All tokens that a batch has; `batch.present` must be given."""
    _, tokens, present = _embedded(model, params, batch)
    features = model.encode(params, tokens.tokens, tokens.present)
    attention = jnp.stack([weights.mean(axis=1) for weights in model.attentions(params, tokens)], axis=1)
    return Seen(features[:, : tokens.layout.num_tokens].astype(jnp.float32), attention.astype(jnp.float32), present)


@functools.partial(jax.jit, static_argnames=("layout", "query"))
def importance(attention: Float[Array, "b e e"], layout: TokenLayout, present: Bool[Array, "b n"], query: str) -> Float[Array, "b n"]:
    """The guidance that strategies read: what each token receives in one block, by `maskvit.guidance.attention`."""
    rows = attention[:, None, layout.num_tokens :] if query == "global" else attention[:, None]
    return read_attention(rows, layout, present, query)


def plan_of(masked: Bool[Array, "b n"], present: Bool[Array, "b n"]) -> MaskPlan:
    """The plan that hides exactly `masked`, and what is absent, of static shape: as many slots for visible tokens as there are tokens."""
    masked = masked | ~present
    predicted = masked & present
    visible_ids, predicted_ids = (jnp.argsort(~chosen, axis=1, stable=True) for chosen in (~masked, predicted))
    return MaskPlan(
        visible_ids=visible_ids,
        visible_valid=jnp.take_along_axis(~masked, visible_ids, axis=1),
        predicted_ids=predicted_ids,
        predicted_valid=jnp.take_along_axis(predicted, predicted_ids, axis=1),
        masked=masked,
    )


@functools.partial(jax.jit, static_argnames="objective")
def rebuild(objective: Any, params: Params, batch: Batch, masked: Bool[Array, "b n"]) -> Rebuilt:
    """What the decoders make of the tokens that are not `masked`. `objective` is one that rebuilds: `maskvit.objectives.masked`."""
    prepared, tokens, present = _embedded(objective.model, params, batch)
    plan = plan_of(masked, present)
    predictions = objective.reconstruct(params, tokens, plan)
    maps = {name: objective.to_stored(name, prediction, prepared) for name, prediction in predictions.items()}
    return Rebuilt(maps, objective.loss_sums(predictions, prepared, plan, tokens.layout))


@functools.partial(jax.jit, static_argnames=("layout", "strategy", "options"))
def score(
    keys: Key[Array, " b"],
    layout: TokenLayout,
    guidance: Float[Array, "b n"],
    present: Bool[Array, "b n"],
    strategy: str,
    options: Options = (),
) -> Float[Array, "b n"]:
    """What a strategy, a row of `SCORES`, hides first: the higher, the earlier."""
    return SCORES[strategy](stream_keys(keys, "scores"), layout, guidance, present, **dict(options))


@functools.partial(jax.jit, static_argnames=("layout", "budget"))
def spend(
    keys: Key[Array, " b"],
    layout: TokenLayout,
    scores: Float[Array, "b n"],
    present: Bool[Array, "b n"],
    num_visible: Int[Array, ""],
    budget: str,
) -> Bool[Array, "b n"]:
    """What is hidden when `num_visible` tokens, at least 1, are shown under a budget of `BUDGET_NAMES`."""
    counts = BUDGETS[budget](stream_keys(keys, "budget"), layout, num_visible, present, scores)
    return drop(scores, counts, layout, layout.num_tokens, present).masked
