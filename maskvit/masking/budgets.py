"""Token budgets: how many tokens each modality may show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from maskvit.core.types import TokenLayout
from maskvit.masking.plan import present_counts

Count = int | Int[Array, ""]  # traced, one compiled program serves every number of visible tokens


def _as_alphas(alphas: float | tuple[float, ...], layout: TokenLayout) -> Float[Array, " m"]:
    modalities = len(layout.names)
    values = (float(alphas),) * modalities if isinstance(alphas, (int, float)) else tuple(alphas)
    if len(values) != modalities:
        raise ValueError(f"config.objective.budget.alphas has {len(values)} values for {modalities} modalities {layout.names}")
    if min(values) <= 0:
        raise ValueError(f"config.objective.budget.alphas must be positive, not {alphas}")
    return jnp.array(values)


def _spend_shares(
    keys: Key[Array, " b"], shares: Float[Array, "b m"], layout: TokenLayout, num_visible: Count, sizes: Int[Array, "b m"]
) -> Int[Array, "b m"]:
    """Shares of `num_visible` to whole counts that add up to it, as the MultiMAE reference does.

    Counts round(num_visible * share), half to even, at most what the modality has (`sizes`). Where they do not add up,
    tokens drawn uniformly from all hidden ones become visible, or uniformly from all visible ones become hidden. A sample
    with fewer tokens than `num_visible` shows all.
    """
    column = jnp.concatenate([jnp.arange(size) for size in layout.sizes])  # index of a token inside its modality
    repeat = lambda x: jnp.concatenate([jnp.broadcast_to(x[i], (n,)) for i, n in enumerate(layout.sizes)])  # noqa: E731

    def one_sample(key: Key[Array, ""], share: Float[Array, " m"], size: Int[Array, " m"]) -> Int[Array, " m"]:
        total = jnp.minimum(num_visible, size.sum())
        counts = jnp.minimum(jnp.round(total * share).astype(jnp.int32), size)
        # Repair. Inside a modality tokens are exchangeable, so its first `count` slots stand for its visible ones.
        chosen, exists = column < repeat(counts), column < repeat(size)
        noise = jax.random.uniform(key, (layout.num_tokens,))
        order = jnp.argsort(jnp.where(chosen, noise, jnp.where(exists, 1 + noise, 2 + noise)))
        visible = jnp.zeros(layout.num_tokens, jnp.int32).at[order].set(jnp.arange(layout.num_tokens) < total)
        return jnp.stack([visible[span].sum() for span in layout.spans()])

    return jax.vmap(one_sample)(keys, shares, sizes)


def _dirichlet(
    keys: Key[Array, " b"], layout: TokenLayout, num_visible: Count, present: Bool[Array, "b n"] | None, alphas: Float[Array, " m"]
) -> Int[Array, "b m"]:
    sizes = present_counts(layout, present, keys.shape[0])
    both = jax.vmap(jax.random.split)(keys)
    # Softmax of log-gamma draws: a Dirichlet sample that survives alphas near zero in float32.
    log_gamma = jax.vmap(lambda key: jax.random.loggamma(key, alphas))(both[:, 0])
    shares = jax.nn.softmax(jnp.where(sizes > 0, log_gamma, -jnp.inf), axis=1)
    return _spend_shares(both[:, 1], shares, layout, num_visible, sizes)


def dirichlet_budget(
    keys: Key[Array, " b"],
    layout: TokenLayout,
    num_visible: Count,
    present: Bool[Array, "b n"] | None = None,
    scores: Float[Array, "b n"] | None = None,
    averages: Float[Array, " m"] | None = None,
    *,
    alphas: float | tuple[float, ...] = 1.0,
) -> Int[Array, "b m"]:
    """Shares p ~ Dirichlet(alphas), rounded and repaired as the MultiMAE reference does (`_spend_shares`).

    `alphas`: one number for all modalities (symmetric) or one for each (asymmetric). Absent modalities get nothing.
    """
    return _dirichlet(keys, layout, num_visible, present, _as_alphas(alphas, layout))


def adaptive_alphas(averages: Float[Array, " m"], alphas: Float[Array, " m"], strength: float) -> Float[Array, " m"]:
    """`alphas` times (loss / mean loss) ** strength, scaled to keep their sum; unchanged before the first average (all 0)."""
    ratio = averages / jnp.maximum(averages.mean(), 1e-12)
    weights = jnp.where((averages > 0).all(), jnp.maximum(ratio, 1e-6) ** strength, 1.0)
    scaled = alphas * weights
    return jnp.maximum(scaled * alphas.sum() / scaled.sum(), 1e-3)


def moved_averages(
    averages: Mapping[str, Array], losses: Sequence[tuple[Float[Array, ""], Float[Array, ""]]], momentum: float
) -> dict[str, Array]:
    """The averages {"loss" "m", "weight" ""} after a step with these (sum of losses, number of samples); those without samples stay."""
    means = jnp.stack([total / jnp.maximum(count, 1.0) for total, count in losses])
    seen = jnp.stack([count > 0 for _, count in losses])
    loss = jnp.where(seen, momentum * averages["loss"] + (1 - momentum) * means, averages["loss"])
    return {"loss": loss, "weight": momentum * averages["weight"] + (1 - momentum)}


def adaptive_dirichlet_budget(
    keys: Key[Array, " b"],
    layout: TokenLayout,
    num_visible: Count,
    present: Bool[Array, "b n"] | None = None,
    scores: Float[Array, "b n"] | None = None,
    averages: Float[Array, " m"] | None = None,
    *,
    alphas: float | tuple[float, ...] = 1.0,
    strength: float = -1.0,
    momentum: float = 0.99,
) -> Int[Array, "b m"]:
    """A Dirichlet draw whose alphas follow moving averages of the modalities' losses.

    `strength` > 0 shows more of the modalities with the higher loss, < 0 less; 0 is `dirichlet`. `momentum` of the averages,
    which the objective keeps (`averages`). Losses of different kinds are compared as they are, in their own units.
    """
    base = _as_alphas(alphas, layout)
    averages = jnp.zeros(len(layout.names)) if averages is None else averages
    return _dirichlet(keys, layout, num_visible, present, adaptive_alphas(averages, base, strength))


def uniform_subsets_budget(
    keys: Key[Array, " b"],
    layout: TokenLayout,
    num_visible: Count,
    present: Bool[Array, "b n"] | None = None,
    scores: Float[Array, "b n"] | None = None,
    averages: Float[Array, " m"] | None = None,
) -> Int[Array, "b m"]:
    """A non-empty subset of the present modalities, each equally likely, shows everything, in equal parts.

    Where the subset has fewer tokens than `num_visible`, the others fill up.
    """
    sizes = present_counts(layout, present, keys.shape[0])
    m = len(layout.names)
    both = jax.vmap(jax.random.split)(keys)
    subsets = (jnp.arange(1, 2**m)[:, None] >> jnp.arange(m)) & 1  # every non-empty subset as a row

    def one_sample(key: Key[Array, ""], size: Int[Array, " m"]) -> Float[Array, " m"]:
        possible = ~((subsets == 1) & (size == 0)).any(axis=1)
        noise = jnp.where(possible, jax.random.uniform(key, (len(subsets),)), -1.0)
        return subsets[jnp.argmax(noise)] * jnp.ones(m)

    chosen = jax.vmap(one_sample)(both[:, 0], sizes) * (sizes > 0)
    shares = chosen / jnp.maximum(chosen.sum(axis=1, keepdims=True), 1.0)
    return _spend_shares(both[:, 1], shares, layout, num_visible, sizes)


def equal_budget(
    keys: Key[Array, " b"],
    layout: TokenLayout,
    num_visible: Count,
    present: Bool[Array, "b n"] | None = None,
    scores: Float[Array, "b n"] | None = None,
    averages: Float[Array, " m"] | None = None,
) -> Int[Array, "b m"]:
    """The same number of visible tokens for every present modality; what does not divide goes to random ones."""
    sizes = present_counts(layout, present, keys.shape[0])
    there = (sizes > 0).astype(jnp.float32)
    share = there / jnp.maximum(there.sum(axis=1, keepdims=True), 1.0)
    # Rounded down, so that the rest is filled up and nothing is taken away again.
    whole = jnp.floor(share * num_visible + 1e-4) / num_visible
    return _spend_shares(keys, whole, layout, num_visible, sizes)


def fixed_budget(
    keys: Key[Array, " b"],
    layout: TokenLayout,
    num_visible: int,
    present: Bool[Array, "b n"] | None = None,
    scores: Float[Array, "b n"] | None = None,
    averages: Float[Array, " m"] | None = None,
    *,
    counts: tuple[int, ...],
) -> Int[Array, "b m"]:
    """Given counts, one per modality, that add up to `num_visible`; where a sample lacks tokens, random others fill up."""
    if len(counts) != len(layout.names) or sum(counts) != num_visible or min(counts) < 0:
        raise ValueError(
            f"config.objective.budget.counts is {tuple(counts)}: give one number for each of {layout.names}, "
            f"together config.objective.num_visible = {num_visible}"
        )
    too_many = [name for name, count, size in zip(layout.names, counts, layout.sizes, strict=True) if count > size]
    if too_many:
        raise ValueError(f"config.objective.budget.counts {tuple(counts)} shows more tokens of {too_many[0]!r} than it has")
    sizes = present_counts(layout, present, keys.shape[0])
    shares = jnp.broadcast_to(jnp.array(counts) / num_visible, (keys.shape[0], len(counts)))
    return _spend_shares(keys, shares, layout, num_visible, sizes)


def joint_budget(
    keys: Key[Array, " b"],
    layout: TokenLayout,
    num_visible: Count,
    present: Bool[Array, "b n"] | None = None,
    scores: Float[Array, "b n"] | None = None,
    averages: Float[Array, " m"] | None = None,
) -> Int[Array, "b m"]:
    """No budget: the lowest scores of all modalities together are shown, so scores must compare across modalities."""
    if scores is None:
        raise ValueError("the joint budget needs scores")
    here = scores if present is None else jnp.where(present, scores, jnp.inf)
    # Ties as in `drop`: the lower index is hidden first, so the higher one is shown first.
    rank = jnp.argsort(jnp.argsort(here[:, ::-1], axis=1, stable=True), axis=1)[:, ::-1]
    sizes = present_counts(layout, present, scores.shape[0])
    total = jnp.minimum(num_visible, sizes.sum(axis=1, keepdims=True))
    return jnp.stack([(rank[:, span] < total).sum(axis=1, dtype=jnp.int32) for span in layout.spans()], axis=1)


BUDGETS: dict[str, Callable[..., Int[Array, "b m"]]] = {
    "dirichlet": dirichlet_budget,
    "adaptive_dirichlet": adaptive_dirichlet_budget,
    "uniform_subsets": uniform_subsets_budget,
    "equal": equal_budget,
    "fixed": fixed_budget,
    "joint": joint_budget,
}
