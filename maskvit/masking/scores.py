"""Score functions: which tokens to hide first. High = hide first.

A score function maps one key per sample, the token layout and, where it needs it, guidance to one number per token. It is
pure and of static shape, treats every modality on its own grid, and a sample's scores depend on that sample alone. Only the
order inside a modality matters, unless the budget ranks the tokens of all modalities together: then scores are compared
across modalities, which is why those without guidance have the same range in each.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from maskvit.core.keys import stream_keys
from maskvit.core.types import Guidance, TokenLayout

# Without guidance


def random_scores(
    keys: Key[Array, " b"], layout: TokenLayout, guidance: Guidance | None = None, present: Bool[Array, "b n"] | None = None
) -> Float[Array, "b n"]:
    """Uniform noise: every token of a modality is equally likely to be hidden (MAE, MultiMAE)."""
    return jax.vmap(lambda key: jax.random.uniform(key, (layout.num_tokens,)))(keys)


def block(
    keys: Key[Array, " b"],
    layout: TokenLayout,
    guidance: Guidance | None = None,
    present: Bool[Array, "b n"] | None = None,
    *,
    max_area: float = 0.4,
    min_aspect: float = 0.3,
    rectangles: int = 32,
) -> Float[Array, "b n"]:
    """The order in which random rectangles cover the grid (BEiT's blocks, for any number of hidden tokens).

    Each rectangle has an area uniform between (shorter side // 3)^2 tokens and `max_area` of the grid, an aspect
    log-uniform in (`min_aspect`, 1 / `min_aspect`), any place, and is shorter than the grid on both axes. What an earlier
    one covers is hidden earlier, and at random inside one, so that a budget thins the last one it reaches; what none of
    the `rectangles` covers comes last, at random. The exact sampler, which rejects a rectangle that would exceed the
    amount wanted, is `maskvit.data.block`.
    """
    _require(0 < max_area <= 1, "max_area", max_area, "a share in (0, 1]")
    _require(0 < min_aspect <= 1, "min_aspect", min_aspect, "in (0, 1]")
    _require(rectangles >= 1, "rectangles", rectangles, "at least 1")

    def one(key: Key[Array, ""], grid: tuple[int, int]) -> Float[Array, " n"]:
        rows, columns = grid
        area_key, aspect_key, place_key, order_key = jax.random.split(key, 4)
        smallest = max((min(grid) // 3) ** 2, 1)
        area = jax.random.uniform(area_key, (rectangles,), minval=smallest, maxval=max(max_area * rows * columns, smallest))
        limit = -math.log(min_aspect)
        aspect = jnp.exp(jax.random.uniform(aspect_key, (rectangles,), minval=-limit, maxval=limit))
        height, width = _sides(area, aspect, (max(rows - 1, 1), max(columns - 1, 1)))
        inside = _rectangles(place_key, grid, height, width)
        first = jnp.where(inside.any(axis=0), jnp.argmax(inside, axis=0), rectangles)
        return 1 - (first + jax.random.uniform(order_key, first.shape)) / (rectangles + 1)

    return _each_modality(one, keys, layout)


# A color is a sum of signed Gaussian blurs of one white noise; deviation None stands for the unfiltered noise.
COLORS = {
    "red": lambda fine, coarse: ((1, coarse),),
    "green": lambda fine, coarse: ((1, fine), (-1, coarse)),
    "blue": lambda fine, coarse: ((1, None), (-1, fine)),
    "purple": lambda fine, coarse: ((1, None), (-1, fine), (1, coarse)),
}


def color(
    keys: Key[Array, " b"],
    layout: TokenLayout,
    guidance: Guidance | None = None,
    present: Bool[Array, "b n"] | None = None,
    *,
    kind: str = "green",
    sigmas: tuple[float, float] = (0.5, 2.0),
) -> Float[Array, "b n"]:
    """Filtered white noise (ColorMAE, arXiv 2407.13036), drawn for each modality, with mean 0 and variance 1.

    With G the Gaussian blur of white noise W by a deviation of `sigmas` = (fine, coarse), in tokens: "red" G_coarse W keeps
    what is slow; "green" G_fine W - G_coarse W a middle band; "blue" W - G_fine W what is fast; "purple" W - green W all but
    the middle. The noise reaches beyond the grid, so that the grid is a crop of a larger filtered field, as published.
    The filters are the paper's, the deviations are not (its code ships finished patterns): they split W into three bands on
    a grid of 14 x 14. (The paper shows the highest values and hides the rest; the noise is symmetric, so that is the same thing.)
    """
    _require(kind in COLORS, "kind", kind, f"one of {', '.join(COLORS)}")
    _require(len(sigmas) == 2 and 0 < sigmas[0] < sigmas[1], "sigmas", sigmas, "(fine, coarse) with 0 < fine < coarse, in tokens")
    kernels = [(sign, _gaussian(sigma)) for sign, sigma in COLORS[kind](*sigmas)]
    margin = max(len(kernel) for _, kernel in kernels) // 2
    padded = [(sign, np.pad(kernel, margin - len(kernel) // 2)) for sign, kernel in kernels]
    deviation = float(np.linalg.norm(np.sum([sign * np.outer(kernel, kernel) for sign, kernel in padded], axis=0)))

    def one(key: Key[Array, ""], grid: tuple[int, int]) -> Float[Array, " n"]:
        noise = jax.random.normal(key, (grid[0] + 2 * margin, grid[1] + 2 * margin))
        return _add(sign * _filtered(noise, kernel, grid) for sign, kernel in kernels).reshape(-1) / deviation

    return _each_modality(one, keys, layout)


def multi_block(
    keys: Key[Array, " b"],
    layout: TokenLayout,
    guidance: Guidance | None = None,
    present: Bool[Array, "b n"] | None = None,
    *,
    num_targets: int = 4,
    target_area: tuple[float, float] = (0.15, 0.2),
    target_aspect: tuple[float, float] = (0.75, 1.5),
    context_area: tuple[float, float] = (0.85, 1.0),
) -> Float[Array, "b n"]:
    """Target blocks first, then what lies outside the context block, then the context (I-JEPA, arXiv 2301.08243).

    The `num_targets` blocks of an image share one size, of an area uniform in `target_area` (shares of the grid) and an
    aspect uniform in `target_aspect`, and may overlap. The context block has an area uniform in `context_area` and the
    grid's own aspect. Inside each of the three classes the order is random.
    """
    _require(num_targets >= 1, "num_targets", num_targets, "at least 1")
    for name, bounds, top in (
        ("target_area", target_area, 1.0),
        ("target_aspect", target_aspect, math.inf),
        ("context_area", context_area, 1.0),
    ):
        _require(len(bounds) == 2 and 0 < bounds[0] <= bounds[1] <= top, name, bounds, f"(low, high) with 0 < low <= high <= {top:g}")

    def one(key: Key[Array, ""], grid: tuple[int, int]) -> Float[Array, " n"]:
        rows, columns = grid
        area_key, aspect_key, target_key, size_key, context_key, order_key = jax.random.split(key, 6)
        draw = lambda key, bounds: jax.random.uniform(key, (1,), minval=bounds[0], maxval=bounds[1])  # noqa: E731
        height, width = _sides(draw(area_key, target_area) * rows * columns, draw(aspect_key, target_aspect), grid)
        target = _rectangles(target_key, grid, jnp.repeat(height, num_targets), jnp.repeat(width, num_targets)).any(axis=0)
        side = jnp.sqrt(draw(size_key, context_area))
        sides = (jnp.clip(jnp.round(side * length).astype(jnp.int32), 1, length) for length in grid)
        context = _rectangles(context_key, grid, *sides)[0]
        return (jnp.where(target, 2, jnp.where(context, 0, 1)) + jax.random.uniform(order_key, target.shape)) / 3

    return _each_modality(one, keys, layout)


# With guidance


def attention_high(
    keys: Key[Array, " b"], layout: TokenLayout, guidance: Guidance | None = None, present: Bool[Array, "b n"] | None = None
) -> Float[Array, "b n"]:
    """Hide what the guidance ranks highest (AttMask-High, arXiv 2203.12719; attention-guided MultiMAE)."""
    return _need(guidance, "attention_high")


def attention_low(
    keys: Key[Array, " b"], layout: TokenLayout, guidance: Guidance | None = None, present: Bool[Array, "b n"] | None = None
) -> Float[Array, "b n"]:
    """Hide what the guidance ranks lowest (AttMask-Low)."""
    return -_need(guidance, "attention_low")


def attention_hint(
    keys: Key[Array, " b"],
    layout: TokenLayout,
    guidance: Guidance | None = None,
    present: Bool[Array, "b n"] | None = None,
    *,
    show_max: float = 0.1,
    ratio: float = 0.3,
    ratio_var: float = 0.2,
) -> Float[Array, "b n"]:
    """`attention_high`, but a random few of the most important tokens are shown first: hints (AttMask-Hint).

    Which and how many: `hint_reveals`. A budget of fewer visible tokens than hints shows some of them, at random.
    """
    guidance = _need(guidance, "attention_hint")
    reveals = hint_reveals(keys, layout, guidance, present, show_max=show_max, ratio=ratio, ratio_var=ratio_var)
    exists = jnp.ones_like(reveals) if present is None else present
    lowest = jnp.min(guidance, axis=1, keepdims=True, where=exists, initial=jnp.inf)
    largest = jnp.max(jnp.abs(guidance), axis=1, keepdims=True, where=exists, initial=0.0)
    below = lowest - jnp.where(largest > 0, largest, 1.0) * (1 + random_scores(stream_keys(keys, "hints"), layout))
    return jnp.where(reveals, below, guidance)


def hint_reveals(
    keys: Key[Array, " b"],
    layout: TokenLayout,
    guidance: Guidance,
    present: Bool[Array, "b n"] | None = None,
    *,
    show_max: float = 0.1,
    ratio: float = 0.3,
    ratio_var: float = 0.2,
    amounts: Float[Array, " b"] | None = None,
) -> Bool[Array, "b n"]:
    """The tokens that `attention_hint` shows first.

    Of a modality with N tokens, k = floor(N * `show_max` * r) drawn uniformly from its floor(N * `show_max`) highest ones,
    with r uniform in `ratio` -+ `ratio_var`, drawn apart from the amount of masking. (The published code draws one r for all
    images of a step; here every image and modality has its own, unless `amounts` gives each image's r.)
    """
    _require(0 < show_max <= 1, "show_max", show_max, "a share in (0, 1]")
    _require(
        0 <= ratio - ratio_var <= ratio + ratio_var <= 1, "ratio_var", ratio_var, f"such that ratio ({ratio}) -+ ratio_var is in 0 ... 1"
    )

    def one(
        key: Key[Array, ""], grid: tuple[int, int], guidance: Float[Array, " n"], present: Bool[Array, " n"], amount: Float[Array, " n"]
    ) -> Bool[Array, " n"]:
        ratio_key, choice_key = jax.random.split(key)
        count = present.sum()
        # A table, as float32 may round the product to another integer than the published double precision.
        top = jnp.array([int(size * show_max) for size in range(grid[0] * grid[1] + 1)])[count]
        own = jax.random.uniform(ratio_key, minval=ratio - ratio_var, maxval=ratio + ratio_var)
        drawn = show_max * (own if amounts is None else amount[0])
        shown = jnp.minimum(jnp.floor(count * drawn + 1e-5).astype(jnp.int32), top)  # 1e-5: a rounding error is not a token
        candidate = _rank(jnp.where(present, guidance, -jnp.inf)) < top
        return _rank(jnp.where(candidate, jax.random.uniform(choice_key, candidate.shape), -1.0)) < shown

    exists = jnp.ones(guidance.shape, bool) if present is None else present
    amount = jnp.broadcast_to(jnp.zeros(()) if amounts is None else amounts[:, None], guidance.shape)
    return _each_modality(one, keys, layout, guidance, exists, amount)


def attention_stochastic(
    keys: Key[Array, " b"],
    layout: TokenLayout,
    guidance: Guidance | None = None,
    present: Bool[Array, "b n"] | None = None,
    *,
    alpha: float,
) -> Float[Array, "b n"]:
    """alpha * N(mean(A), std(A)) + (1 - alpha) * A, for guidance A (attention-guided MultiMAE).

    Mean and (population) standard deviation are those of an image's tokens of one modality that are present. 0 is
    `attention_high`, 1 is random.
    """
    guidance = _need(guidance, "attention_stochastic")
    _require(0 <= alpha <= 1, "alpha", alpha, "in 0 ... 1")

    def one(key: Key[Array, ""], grid: tuple[int, int], guidance: Float[Array, " n"], present: Bool[Array, " n"]) -> Float[Array, " n"]:
        count = jnp.maximum(present.sum(), 1)
        mean = jnp.where(present, guidance, 0.0).sum() / count
        deviation = jnp.sqrt(jnp.where(present, jnp.square(guidance - mean), 0.0).sum() / count)
        return alpha * (mean + deviation * jax.random.normal(key, guidance.shape)) + (1 - alpha) * guidance

    exists = jnp.ones(guidance.shape, bool) if present is None else present
    return _each_modality(one, keys, layout, guidance, exists)


def gumbel(
    keys: Key[Array, " b"],
    layout: TokenLayout,
    guidance: Guidance | None = None,
    present: Bool[Array, "b n"] | None = None,
    *,
    temperature: float = 1.0,
    hide: str = "high",
) -> Float[Array, "b n"]:
    """Draw tokens one after the other without replacement, with probability proportional to guidance^(1 / `temperature`).

    hide="high": those drawn first are hidden first (AMT, arXiv 2211.15362); "low": they are shown first (MILAN's semantic
    aware sampling, arXiv 2208.06049; temperature 1 in both). Near 0 this is top-k, towards infinity random. Guidance at or
    below zero is drawn last, among itself at random.
    """
    guidance = _need(guidance, "gumbel")
    _require(temperature > 0, "temperature", temperature, "greater than 0")
    _require(hide in ("high", "low"), "hide", hide, "'high' or 'low'")
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (layout.num_tokens,)))(keys)
    # Gumbel noise on log guidance / temperature, multiplied by whatever keeps both terms in range at any temperature.
    log_guidance = jnp.log(jnp.maximum(guidance, jnp.finfo(guidance.dtype).tiny))
    drawn = min(1.0, 1 / temperature) * log_guidance + min(1.0, temperature) * noise
    return drawn if hide == "high" else -drawn


_GUIDED: dict[str, Callable[..., Float[Array, "b n"]]] = {  # those that cannot be without guidance
    "attention_high": attention_high,
    "attention_low": attention_low,
    "attention_hint": attention_hint,
    "attention_stochastic": attention_stochastic,
    "gumbel": gumbel,
}
SCORES: dict[str, Callable[..., Float[Array, "b n"]]] = {
    "random": random_scores,
    "block": block,
    "color": color,
    "multi_block": multi_block,
    **_GUIDED,
}
GUIDED_SCORES = tuple(_GUIDED)


# Parts


def _need(guidance: Guidance | None, name: str) -> Guidance:
    if guidance is None:
        raise ValueError(f"scores {name!r} need a guidance source: set config.objective.guidance, for example name='self_attention'")
    return guidance


def _require(condition: bool, key: str, value: Any, wanted: str) -> None:
    if not condition:
        raise ValueError(f"config.objective.scores.{key} is {value!r}; it must be {wanted}")


def _each_modality(one: Callable[..., Array], keys: Key[Array, " b"], layout: TokenLayout, *tokens: Array) -> Array:
    """`one(key, grid, *tokens)` for every sample and modality, with a key and its part of `tokens` ("b n") each, joined."""
    parts = []
    for name, grid, span in zip(layout.names, layout.grids, layout.spans(), strict=True):
        batched = jax.vmap(lambda key, *here, grid=grid: one(key, grid, *here))
        parts.append(batched(stream_keys(keys, name), *(array[:, span] for array in tokens)))
    return jnp.concatenate(parts, axis=1)


def _rank(values: Float[Array, " n"]) -> Int[Array, " n"]:
    """0 for the highest; of equal values the lower index first."""
    return jnp.argsort(jnp.argsort(-values, stable=True))


def _sides(area: Float[Array, " r"], aspect: Float[Array, " r"], limits: tuple[int, int]) -> tuple[Int[Array, " r"], Int[Array, " r"]]:
    """Whole heights and widths, in tokens, of rectangles with aspect = height / width, at least 1 and at most `limits`."""
    height, width = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    return jnp.clip(height, 1, limits[0]).astype(jnp.int32), jnp.clip(width, 1, limits[1]).astype(jnp.int32)


def _rectangles(key: Key[Array, ""], grid: tuple[int, int], height: Int[Array, " r"], width: Int[Array, " r"]) -> Bool[Array, "r n"]:
    """Rectangles of the given sizes at uniformly drawn places of the grid: True inside."""
    spans = []
    for side_key, size, length in zip(jax.random.split(key), grid, (height, width), strict=True):
        start = jnp.floor(jax.random.uniform(side_key, length.shape) * (size - length + 1))[:, None]
        spans.append((jnp.arange(size) >= start) & (jnp.arange(size) < start + length[:, None]))
    return (spans[0][:, :, None] & spans[1][:, None, :]).reshape(height.shape[0], -1)


def _gaussian(sigma: float | None) -> Float[np.ndarray, " k"]:
    """A Gaussian of sum 1, cut off at four deviations; for None the unit impulse."""
    if sigma is None:
        return np.ones(1)
    radius = math.ceil(4 * sigma)
    weights = np.exp(-0.5 * np.square(np.arange(-radius, radius + 1) / sigma))
    return weights / weights.sum()


def _add(parts: Iterable[Array]) -> Array:
    """The sum, from the first to the last."""
    return functools.reduce(operator.add, parts)


def _filtered(noise: Float[Array, "padded_h padded_w"], kernel: Float[np.ndarray, " k"], grid: tuple[int, int]) -> Float[Array, "h w"]:
    """The middle `grid` of `noise`, filtered along both axes.

    Shifted sums: a matrix product would add up in an order that depends on the size of the batch.
    """
    for axis, size in enumerate(grid):
        start = (noise.shape[axis] - size) // 2 - len(kernel) // 2
        shifted = (jax.lax.slice_in_dim(noise, start + i, start + i + size, axis=axis) for i in range(len(kernel)))
        noise = _add(float(weight) * part for weight, part in zip(kernel, shifted, strict=True))
    return noise
