"""Guidance that costs less than an exact pass: fewer pixels, fewer tokens, fewer blocks, fewer visits.

All of these stand in for `self_attention`, whose fields (`query`, `block`, `heads`, `renormalise`) they share where they run the whole
encoder. What each costs and how far it agrees with the exact scores: docs/guidance_cost.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from maskvit.core.flops import attention_flops, block_flops, embed_flops
from maskvit.core.keys import stream_keys
from maskvit.core.types import Guidance, Params, TokenBatch, TokenLayout
from maskvit.guidance.attention import SelfAttention, per_modality_sum_one, read_attention
from maskvit.guidance.source import Request
from maskvit.heads.network import Network
from maskvit.masking.plan import gather_tokens

WHERE = "config.objective.guidance"


def check_share(key: str, value: float, least: float = 0.0) -> None:
    """Raise unless it is a share above `least` and at most 1."""
    if not (least < value <= 1):
        raise ValueError(f"{WHERE}.{key} is {value}; it must be above {least:g} and at most 1")


def per_modality(
    function: Callable[..., Float[Array, "b k"]], layout: TokenLayout, scores: Float[Array, "b n"], source: TokenLayout
) -> Float[Array, "b m"]:
    """`function(scores of the modality, its grid in `source`, its grid in `layout`)` of every modality, joined."""
    parts = [function(scores[:, span], *grids) for span, *grids in zip(source.spans(), source.grids, layout.grids, strict=True)]
    return jnp.concatenate(parts, axis=1)


# Fewer pixels


@dataclasses.dataclass(frozen=True)
class CoarseAttention(SelfAttention):
    """The exact attention of the inputs at a lower resolution, resampled to the token grid.

    `resolution`: share of rows and of columns of tokens that the coarse inputs have. Numbers are resized with antialiasing, class
    ids by the nearest one; missing pixels count with the value that stands for them in the model's input.
    """

    resolution: float = 0.75

    def check(self, model: Network) -> None:
        super().check(model)
        check_share("resolution", self.resolution)

    def _grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        return max(1, round(self.resolution * grid[0])), max(1, round(self.resolution * grid[1]))

    def __call__(self, request: Request) -> Guidance:
        model, fine = request.model, request.tokens.layout
        values = {}
        for name, grid in zip(fine.names, fine.grids, strict=True):
            spec = model.modality(name)
            rows, columns = self._grid(grid)
            values[name] = resize_values(request.values[name], (rows * spec.patch_pixels, columns * spec.patch_pixels))
        coarse = model.layout_of(values)
        present = request.tokens.present
        if present is not None:
            # A coarse token exists where any token that it overlaps does.
            there = per_modality(resample_scores, coarse, present.astype(jnp.float32), fine)
            present = there > 1e-3
        tokens = model.embed(request.params, values, present)
        scores = super().__call__(request._replace(tokens=tokens, values=values))
        scores = per_modality(resample_scores, fine, scores, coarse)
        return per_modality_sum_one(scores, fine, request.tokens.present) if self.renormalise else scores

    def flops(self, model: Network, batch: int = 1) -> float:
        tokens = sum(rows * columns for rows, columns in map(self._grid, model.layout.grids))
        embedding = embed_flops(model) * tokens / model.layout.num_tokens
        return embedding + attention_flops(model, self.block, self.query == "global", tokens)


def resize_values(values: Num[Array, "b h w *c"], size: tuple[int, int]) -> Num[Array, "b y x *c"]:
    """Model values at another size: numbers antialiased, class ids (integers) nearest."""
    if not jnp.issubdtype(values.dtype, jnp.integer):
        return jax.image.resize(values, (values.shape[0], *size, *values.shape[3:]), "linear", antialias=True)
    places = [((np.arange(new) + 0.5) * old / new).astype(int) for old, new in zip(values.shape[1:3], size, strict=True)]
    return values[:, places[0][:, None], places[1][None, :]]


def resample_scores(scores: Float[Array, "b n"], grid: tuple[int, int], new: tuple[int, int]) -> Float[Array, "b k"]:
    """Scores of one modality from a grid to another, bilinear."""
    b = scores.shape[0]
    return jax.image.resize(scores.reshape(b, *grid), (b, *new), "linear").reshape(b, -1)


# Fewer tokens


@dataclasses.dataclass(frozen=True)
class SampledAttention(SelfAttention):
    """The exact attention among a random part of the tokens; the others get what the sampled ones near them got.

    `share`: of each modality's tokens, fresh ones for every sample and step.
    """

    share: float = 0.5

    def check(self, model: Network) -> None:
        super().check(model)
        check_share("share", self.share)

    def _counts(self, layout: TokenLayout) -> tuple[int, ...]:
        return tuple(max(1, round(self.share * size)) for size in layout.sizes)

    def __call__(self, request: Request) -> Guidance:
        tokens, layout, present = request.tokens
        noise = jax.vmap(lambda key: jax.random.uniform(key, (layout.num_tokens,)))(stream_keys(request.keys, "sampled"))
        if present is not None:
            noise = jnp.where(present, noise, -1.0)  # absent tokens only where there are too few others
        counts = self._counts(layout)
        ids = [jax.lax.top_k(noise[:, span], count)[1] for span, count in zip(layout.spans(), counts, strict=True)]
        part = TokenLayout(layout.names, tuple((count, 1) for count in counts))
        chosen = jnp.concatenate([own + span.start for own, span in zip(ids, layout.spans(), strict=True)], axis=1)
        exists = None if present is None else jnp.take_along_axis(present, chosen, axis=1)
        scores = super().__call__(request._replace(tokens=TokenBatch(gather_tokens(tokens, chosen), part, exists)))
        spread = []
        for own, span, grid in zip(ids, part.spans(), layout.grids, strict=True):
            known = jnp.ones(own.shape, bool) if exists is None else exists[:, span]
            spread.append(jax.vmap(lambda s, i, k, g=grid: spread_scores(s, i, k, g, self.share))(scores[:, span], own, known))
        full = jnp.concatenate(spread, axis=1)
        return per_modality_sum_one(full, layout, present) if self.renormalise else full

    def flops(self, model: Network, batch: int = 1) -> float:
        return attention_flops(model, self.block, self.query == "global", sum(self._counts(model.layout)))


def spread_scores(
    scores: Float[Array, " k"], ids: Int[Array, " k"], known: Bool[Array, " k"], grid: tuple[int, int], share: float
) -> Float[Array, " n"]:
    """Scores of the tokens `ids` of a grid to all of it: others get the geometric mean of those near them, Gaussian in the distance.

    The Gaussian's deviation is half the mean distance between sampled tokens, 0.5 / sqrt(share) tokens. `known` False: not counted.
    """
    size = grid[0] * grid[1]
    logs = jnp.where(known, jnp.log(jnp.maximum(scores, 1e-12)), 0.0)
    values = jnp.zeros(size).at[ids].set(logs).reshape(grid)
    weights = jnp.zeros(size).at[ids].set(known.astype(jnp.float32)).reshape(grid)
    kernel = lambda n: jnp.exp(-2.0 * share * (jnp.arange(n)[:, None] - jnp.arange(n)[None, :]) ** 2)  # noqa: E731
    rows, columns = kernel(grid[0]), kernel(grid[1])
    # A little of the overall mean decides where no sampled token is near.
    total = rows @ values @ columns.T + 1e-6 * values.mean()
    near = rows @ weights @ columns.T + 1e-6 * weights.mean()
    return jnp.exp(jnp.where(weights > 0, values, total / jnp.maximum(near, 1e-12))).reshape(-1)


@dataclasses.dataclass(frozen=True)
class MergedAttention(SelfAttention):
    """The exact attention after similar tokens were merged; the members of a merged token all get its score.

    After `after` blocks each modality's tokens are merged down to `share` of them, and the later blocks run on those. Source: the
    bipartite soft matching of Bolya et al., "Token Merging: Your ViT But Faster", 2023, here at one depth, on the tokens
    themselves, and without weighting keys by size: a score then stands for one member, not for their sum.
    """

    share: float = 0.5
    after: int = 1

    def check(self, model: Network) -> None:
        super().check(model)
        check_share("share", self.share)
        last = self.block % dict(model.encoder)["depth"]
        if not 0 <= self.after <= last:
            raise ValueError(f"{WHERE}.after is {self.after}; for scores of block {last} merge after 0 ... {last} blocks")

    def _counts(self, layout: TokenLayout) -> tuple[int, ...]:
        return tuple(max(1, round(self.share * size)) for size in layout.sizes)

    def __call__(self, request: Request) -> Guidance:
        model, params = request.model, jax.lax.stop_gradient(request.params)
        (tokens, layout, present), counts = request.tokens, self._counts(request.tokens.layout)
        x = model.features(params, jax.lax.stop_gradient(tokens), (self.after,), present)[0]
        there = jnp.ones(tokens.shape[:2], bool) if present is None else present
        merged, exists, owners = [], [], []
        for span, count in zip(layout.spans(), counts, strict=True):
            own = jax.vmap(lambda t, w, c=count: merge_tokens(t, w, c))(x[:, span], there[:, span].astype(jnp.float32))
            merged.append(own[0])
            exists.append(own[1] > 0)
            owners.append(own[2])
        part = TokenLayout(layout.names, tuple((count, 1) for count in counts))
        n = layout.num_tokens
        joined = TokenBatch(jnp.concatenate([*merged, x[:, n:]], axis=1), part, None)
        if present is not None:
            joined = joined._replace(present=jnp.pad(jnp.concatenate(exists, axis=1), ((0, 0), (0, x.shape[1] - n)), constant_values=True))
        rest, rest_params = from_block(model, params, self.after)
        queries = slice(part.num_tokens, None) if self.query == "global" else slice(None)
        weights = rest.attention(rest_params, joined, queries, self.block % dict(model.encoder)["depth"] - self.after)
        counted = None if joined.present is None else joined.present[:, : part.num_tokens]
        reading = {**self.reading, "renormalise": False}
        scores = read_attention(weights, part, counted, keys=request.keys, **reading)
        spread = [jnp.take_along_axis(scores[:, span], owner, axis=1) for span, owner in zip(part.spans(), owners, strict=True)]
        full = jnp.concatenate(spread, axis=1)
        return per_modality_sum_one(full, layout, present) if self.renormalise else full

    def flops(self, model: Network, batch: int = 1) -> float:
        sizes, counts = dict(model.encoder), self._counts(model.layout)
        ratio, globals_ = sizes.get("mlp_ratio", 4.0), model.num_global_tokens
        before = self.after * block_flops(model.layout.num_tokens + globals_, sizes["width"], ratio)
        similarities = sum(size**2 / 2 * sizes["width"] for size in model.layout.sizes)
        later = attention_flops(model, self.block, self.query == "global", sum(counts))
        return before + similarities + later - self.after * block_flops(sum(counts) + globals_, sizes["width"], ratio)


def merge_tokens(
    tokens: Float[Array, "n d"], weights: Float[Array, " n"], count: int
) -> tuple[Float[Array, "k d"], Float[Array, " k"], Int[Array, " n"]]:
    """Merge the most similar tokens down to `count`: (weighted means, how much each holds, which one each token went to).

    Every second token is matched with the most similar (cosine) of the others, and the best matches are merged; repeated where
    more than half must go. `weights`: 1 per token, 0 for absent ones, which are merged first and change nothing.
    """
    owner = jnp.arange(tokens.shape[0])
    while tokens.shape[0] > count:
        n = tokens.shape[0]
        gone = min(n // 2, n - count)
        centered = tokens - (tokens * weights[:, None]).sum(axis=0) / jnp.maximum(weights.sum(), 1e-6)
        unit = centered / jnp.maximum(jnp.linalg.norm(centered, axis=1, keepdims=True), 1e-6)
        similar = unit[1::2] @ unit[0::2].T
        similar = jnp.where(weights[None, 0::2] > 0, similar, -2.0)
        similar = jnp.where(weights[1::2, None] > 0, similar, 3.0)
        order = jnp.argsort(-similar.max(axis=1), stable=True)
        partner = similar.argmax(axis=1)
        leaving, staying = order[:gone], jnp.sort(order[gone:])
        # Places after this round: the even tokens in their order, then the odd ones that stay.
        even = (n + 1) // 2
        place = jnp.zeros(n, jnp.int32).at[0::2].set(jnp.arange(even, dtype=jnp.int32))
        place = place.at[2 * staying + 1].set(even + jnp.arange(n // 2 - gone, dtype=jnp.int32))
        place = place.at[2 * leaving + 1].set(partner[leaving].astype(jnp.int32))
        held = jnp.zeros(n - gone).at[place].add(weights)
        total = jnp.zeros((n - gone, tokens.shape[1])).at[place].add(tokens * weights[:, None])
        tokens, weights, owner = total / jnp.maximum(held, 1e-6)[:, None], held, place[owner]
    return tokens, weights, owner


def from_block(model: Network, params: Params, first: int) -> tuple[Network, Params]:
    """The encoder from block `first` on as a model of its own, which takes tokens with the global ones already behind them."""
    sizes = dict(model.encoder)
    names = [f"block_{i:02d}" for i in range(sizes["depth"])]
    encoder = {new: params["encoder"][old] for new, old in zip(names, names[first:], strict=False)}
    sizes["depth"] -= first
    rest = dataclasses.replace(model, encoder=tuple(sorted(sizes.items())), num_global_tokens=0, heads=())
    return rest, {"encoder": encoder}
