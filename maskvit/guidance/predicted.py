"""Guidance predicted from early tokens: the encoder's first blocks for all samples, an exact pass for a few.

Stands in for `self_attention`. What it costs and how far it agrees with the exact scores: docs/guidance_cost.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from maskvit.core.flops import block_flops, embed_flops
from maskvit.core.keys import stream_keys
from maskvit.core.types import DataNeeds, Guidance, Params, Record
from maskvit.guidance.attention import SelfAttention, check_momentum, moving_average, per_modality_sum_one
from maskvit.guidance.canvas import (
    Rows,
    averaged_rows,
    blank,
    check_grid,
    in_turn,
    no_rows,
    read,
    rows_of,
    standard_logs,
    store,
    thinned,
)
from maskvit.guidance.cheap import WHERE
from maskvit.guidance.source import Request
from maskvit.heads.network import Network
from maskvit.optim.transforms import guarded


@dataclasses.dataclass(frozen=True)
class PredictedAttention(SelfAttention):
    """The scores as a linear function of early tokens and of the scores of earlier visits, fitted as training goes on.

    One sample in `every` gets an exact pass. Its scores (logarithms, standardized per sample and modality) are the targets of a
    ridge regression per modality on `token_features` and `map_features`, and go into the record's map as in `reused_attention`. The
    normal equations are moving averages, so the fit follows the model. Before the first update scores are random.

    The other fields say how attention is read in the exact pass.

    Attributes:
      after: blocks that all tokens run through; 0 reads the embedded tokens.
      every: how many samples share one exact pass (see `canvas.stride`).
      ridge: penalty, relative to each feature's mean square.
      momentum: how much of the normal equations stays at each of their updates.
      solve_every: steps between two solutions.
      grid: side of the maps kept per record (2 grid^2 bytes per record and modality); 0 keeps none and predicts from tokens alone.
      map_momentum: how much of the old map stays where a crop is averaged in.
    """

    after: int = 1
    every: int = 24
    ridge: float = 0.003
    momentum: float = 0.99
    solve_every: int = 8
    grid: int = 32
    map_momentum: float = 0.8

    @property
    def needs(self) -> DataNeeds:
        return DataNeeds(record=Record._fields if self.grid else ())

    def check(self, model: Network) -> None:
        super().check(model)
        check_momentum(self.momentum)
        check_momentum(self.map_momentum)
        if self.grid:
            check_grid("grid", self.grid)
        last = self.block % dict(model.encoder)["depth"]
        if not 0 <= self.after <= last:
            raise ValueError(f"{WHERE}.after is {self.after}; scores of block {last} can be predicted after 0 ... {last} blocks")
        for key in ("every", "solve_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{WHERE}.{key} is {getattr(self, key)}; it must be at least 1")
        if self.ridge <= 0:
            raise ValueError(f"{WHERE}.ridge is {self.ridge}; it must be positive")

    def init(self, model: Network, params: Params, num_records: int) -> dict[str, Array]:
        modalities, size = len(model.inputs), self._num_features(model)
        state = {
            "gram": jnp.zeros((modalities, size, size)),
            "moment": jnp.zeros((modalities, size)),
            "solution": jnp.zeros((modalities, size)),
        }
        return state | ({"maps": blank(num_records, model.layout, self.grid)} if self.grid else {})

    def recall(self, memory: dict[str, Array], index: Int[Array, " b"] | None) -> tuple[Any, Any]:
        shared = {key: value for key, value in memory.items() if key != "maps"}
        return shared, rows_of(memory["maps"], index, self.grid) if self.grid else None

    def _num_features(self, model: Network) -> int:
        products = 1 + bool(model.num_global_tokens) + bool(self.grid)
        return (2 + products) * model.width + (MAP_FEATURES if self.grid else 0) + 1

    def _read(self, request: Request) -> list[tuple[Float[Array, "b h w d"], Float[Array, "b c d"], Float[Array, "b h w f"] | None]]:
        """Of every modality: (normed tokens on their grid, their mean and the normed global token, features of the record's map)."""
        model, params = request.model, jax.lax.stop_gradient(request.params)
        tokens, layout, present = request.tokens
        x = model.features(params, jax.lax.stop_gradient(tokens), (self.after,), present)[0]
        x = jax.nn.standardize(x.astype(jnp.float32), axis=-1, epsilon=1e-6)
        there = jnp.ones(tokens.shape[:2], bool) if present is None else present
        known = None
        if self.grid:
            record = request.batch.record
            known = read(request.batch.kept, record.box, record.flip, layout)
        found = []
        for span, grid in zip(layout.spans(), layout.grids, strict=True):
            own = jnp.where(there[:, span, None], x[:, span], 0.0)
            context = own.sum(axis=1, keepdims=True) / jnp.maximum(there[:, span].sum(axis=1), 1)[:, None, None]
            if model.num_global_tokens:
                context = jnp.concatenate([context, x[:, -1:]], axis=1)
            maps = None if known is None else map_features(known[:, span].reshape(-1, *grid))
            found.append((own.reshape(-1, *grid, model.width), context, maps))
        return found

    def __call__(self, request: Request) -> Guidance:
        layout = request.tokens.layout
        read_off = [linear_read_out(w, *own) for w, own in zip(request.state["solution"], self._read(request), strict=True)]
        # Without a solution the noise alone decides.
        noise = 1e-6 * jax.vmap(lambda key: jax.random.normal(key, (layout.num_tokens,)))(stream_keys(request.keys, "unpredicted"))
        scores = jnp.exp(jnp.clip(jnp.concatenate(read_off, axis=1) + noise, -20.0, 20.0))
        return per_modality_sum_one(scores, layout, request.tokens.present) if self.renormalise else scores

    def update(self, request: Request, step: Int[Array, ""], errors: Float[Array, "b n"] | None) -> dict[str, Array]:
        old = {key: request.state[key] for key in ("gram", "moment")}

        def learn() -> tuple[dict[str, Array], Rows | None]:
            part = thinned(request, self.every)
            targets = standard_logs(SelfAttention(self.query, self.block, self.heads), part)
            return self._equations(part, targets), self._rows(part, targets)

        def otherwise() -> tuple[dict[str, Array], Rows | None]:
            return old, no_rows(request, self.every) if self.grid else None

        new, rows = in_turn(learn, otherwise, request, step, self.every)
        # The first solution comes with the first update: until then scores are random.
        solution = request.state["solution"]
        new["solution"] = jax.lax.cond(step % self.solve_every == 0, self._solution, lambda _: solution, new)
        state = guarded(request.accepted, new, {**old, "solution": solution})
        return state if rows is None else state | {"maps": store(request.state["maps"], rows[0], rows[1], request.accepted)}

    def _solution(self, equations: dict[str, Array]) -> Float[Array, "m e"]:
        one_modality = lambda pair: ridge_solution(pair[0], pair[1], self.ridge)  # noqa: E731
        return jax.lax.map(one_modality, (equations["gram"], equations["moment"]))

    def solved(self, state: dict[str, Array]) -> dict[str, Array]:
        """The memory with the solution of its normal equations."""
        return state | {"solution": self._solution(state)}

    def learn(self, request: Request, targets: Float[Array, "b n"]) -> dict[str, Array]:
        """The memory after the exact scores of these samples (`standard_logs`) were seen, but for the solution."""
        state, rows = dict(request.state) | self._equations(request, targets), self._rows(request, targets)
        return state if rows is None else state | {"maps": store(state["maps"], *rows)}

    def _rows(self, request: Request, targets: Float[Array, "b n"]) -> Rows | None:
        return averaged_rows(request, targets, self.map_momentum) if self.grid else None

    def _equations(self, request: Request, targets: Float[Array, "b n"]) -> dict[str, Array]:
        """The normal equations after these targets."""
        state, layout = request.state, request.tokens.layout
        grams, moments = [], []
        for own, span in zip(self._read(request), layout.spans(), strict=True):
            target, counted = targets[:, span], ~jnp.isnan(targets[:, span])
            features = jnp.where(counted[..., None], all_features(*own), 0.0)
            total = jnp.maximum(counted.sum(), 1)
            grams.append(jnp.einsum("bkf,bkg->fg", features, features) / total)
            moments.append(jnp.einsum("bkf,bk->f", features, jnp.where(counted, target, 0.0)) / total)
        new = {"gram": jnp.stack(grams), "moment": jnp.stack(moments)}
        return moving_average({key: state[key] for key in new}, new, self.momentum)

    def flops(self, model: Network, batch: int = 1) -> float:
        sizes, size, tokens = dict(model.encoder), self._num_features(model), model.layout.num_tokens
        blocks = self.after * block_flops(tokens + model.num_global_tokens, sizes["width"], sizes.get("mlp_ratio", 4.0))
        # The samples with an exact pass go through the first blocks once more, for their features.
        exact = embed_flops(model) + super().flops(model) + blocks + 2 * tokens * size**2
        solve = len(model.inputs) * (size**3 / 3 + 4 * size**2) / (self.solve_every * batch)
        return blocks + 2 * tokens * size + exact / self.every + solve


def all_features(
    normed: Float[Array, "b h w d"], context: Float[Array, "b c d"], maps: Float[Array, "b h w f"] | None
) -> Float[Array, "b k e"]:
    """Layer-normalized tokens, their means over 3 x 3 tokens, their products with the contexts (the modality's mean, the global token),
    and a constant; where the record's map is known also the tokens times its relative value, and `map_features`.
    """
    parts = [normed, box_mean(normed, 3), *(normed * context[:, i, None, None] for i in range(context.shape[1]))]
    if maps is not None:
        parts += [normed * maps[..., RELATIVE, None], maps]
    parts.append(jnp.ones((*normed.shape[:3], 1)))
    joined = jnp.concatenate(parts, axis=-1)
    return joined.reshape(joined.shape[0], -1, joined.shape[-1])


def linear_read_out(
    weights: Float[Array, " e"], normed: Float[Array, "b h w d"], context: Float[Array, "b c d"], maps: Float[Array, "b h w f"] | None
) -> Float[Array, "b k"]:
    """`all_features` times weights, without making the features: for a whole batch they would not fit into memory."""
    d, c = normed.shape[-1], context.shape[1]
    own, near, products = weights[:d], weights[d : 2 * d], weights[2 * d : (2 + c) * d].reshape(c, d)
    scores = jnp.einsum("bhwd,bd->bhw", normed, own + (context * products).sum(axis=1)) + weights[-1]
    scores += box_mean((normed @ near)[..., None], 3)[..., 0]
    if maps is not None:
        rest = weights[(2 + c) * d : -1]
        scores += maps[..., RELATIVE] * (normed @ rest[:d]) + maps @ rest[d:]
    return scores.reshape(scores.shape[0], -1)


MAP_FEATURES, RELATIVE = 6, 1


def map_features(known: Float[Array, "b h w"]) -> Float[Array, "b h w f"]:
    """What a record's map says under the crop (NaN where it knows nothing): the value, its place among the crop's other values and
    that squared, means over 3 x 3 and 5 x 5 tokens, and whether it is known. Unknown values stand at the mean of the known ones.
    """
    missing = jnp.isnan(known)
    count = jnp.maximum((~missing).sum(axis=(1, 2), keepdims=True), 1)
    mean = jnp.where(missing, 0.0, known).sum(axis=(1, 2), keepdims=True) / count
    value = jnp.where(missing, mean, known)
    deviation = jnp.sqrt(((value - mean) ** 2).mean(axis=(1, 2), keepdims=True))
    relative = (value - mean) / (deviation + 0.05)
    near = [box_mean(relative[..., None], side)[..., 0] for side in (3, 5)]
    return jnp.stack([value, relative, relative**2, *near, missing.astype(jnp.float32)], axis=-1)


def box_mean(maps: Float[Array, "b h w c"], side: int) -> Float[Array, "b h w c"]:
    """Mean over the tokens at most side // 2 rows and columns away, those outside the grid not counted."""
    rows, columns = (np.abs(np.arange(n)[:, None] - np.arange(n)) <= side // 2 for n in maps.shape[1:3])
    rows, columns = rows / rows.sum(axis=1, keepdims=True), columns / columns.sum(axis=1, keepdims=True)
    return jnp.einsum("oh,bhwc,pw->bopc", rows.astype(np.float32), maps, columns.astype(np.float32))


def ridge_solution(gram: Float[Array, "f f"], moment: Float[Array, " f"], ridge: float) -> Float[Array, " f"]:
    """Weights of the regression whose normal equations these are, penalized by `ridge` times each feature's mean square.

    Solved for features of mean square 1, which is what float32 needs; features that were never seen get weight 0.
    """
    scale = jax.lax.rsqrt(jnp.maximum(jnp.diagonal(gram), 1e-12))
    scaled = gram * scale[:, None] * scale[None, :] + (ridge + 1e-6) * jnp.eye(gram.shape[0])
    factor = jax.scipy.linalg.cho_factor(scaled, lower=True)
    return scale * jax.scipy.linalg.cho_solve(factor, moment * scale)
