"""Guidance that does not come from the model in training: maps stored beside the data, and random maps as their control."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from maskvit.core.keys import stream_keys
from maskvit.core.types import DataNeeds, Guidance, Params, TokenLayout
from maskvit.guidance.source import Request, Source
from maskvit.heads.network import Network


def maps_to_tokens(maps: Float[Array, "b m h w"], layout: TokenLayout) -> Float[Array, "b n"]:
    """Maps on one grid to tokens: resampled (bilinear) to each modality's grid; m is 1 (for all modalities) or their number."""
    b, m = maps.shape[:2]
    if m not in (1, len(layout.names)):
        raise ValueError(f"the stored maps are for {m} modalities, the model has the inputs {', '.join(layout.names)}")
    parts = []
    for i, grid in enumerate(layout.grids):
        here = maps[:, 0 if m == 1 else i]
        parts.append((here if here.shape[1:] == grid else jax.image.resize(here, (b, *grid), "linear")).reshape(b, -1))
    return jnp.concatenate(parts, axis=1)


@dataclasses.dataclass(frozen=True)
class Stored(Source):
    """Maps made beforehand (`python -m maskvit maps`), cropped and flipped with the picture.

    `path`: the folder of the map set.
    """

    path: str = ""

    @property
    def needs(self) -> DataNeeds:
        return DataNeeds(maps=self.path)

    def check(self, model: Network) -> None:
        if not self.path:
            raise ValueError("config.objective.guidance.path is empty: give the folder of stored maps (python -m maskvit maps)")

    def __call__(self, request: Request) -> Guidance:
        return maps_to_tokens(request.batch.maps, request.tokens.layout)


@dataclasses.dataclass(frozen=True)
class BlockMask(Source):
    """The exact block-wise masks of BEiT and iBOT, made by the loader: 1 to 2 inside the blocks, 0 to 1 outside, random.

    `ratio`, `ratio_var`: the share of the grid that blocks cover is uniform in ratio -+ ratio_var; sequences hold alternatives
    (iBOT: ratios 0 and 0.3, variations 0 and 0.2). All modalities share a sample's blocks. With scores `attention_high` the blocks
    are hidden first; what the budget hides beyond them is random.
    """

    ratio: float | tuple[float, ...] = 0.3
    ratio_var: float | tuple[float, ...] = 0.2

    @property
    def needs(self) -> DataNeeds:
        return DataNeeds(blocks=(self.ratio, self.ratio_var))

    def check(self, model: Network) -> None:
        for ratio in self.ratio if isinstance(self.ratio, tuple) else (self.ratio,):
            if not 0 <= ratio <= 1:
                raise ValueError(f"config.objective.guidance.ratio is {self.ratio}; it must lie in 0 ... 1")

    def __call__(self, request: Request) -> Guidance:
        blocks = maps_to_tokens(request.batch.maps, request.tokens.layout)
        noise = jax.vmap(lambda key: jax.random.uniform(key, blocks.shape[1:]))(stream_keys(request.keys, "block mask"))
        return (blocks > 0.5) + noise


@dataclasses.dataclass(frozen=True)
class RandomMap(Source):
    """The control of the published ablation: a map of the same values in the wrong places.

    `of`: the block of another source, whose values are shuffled inside each sample and modality; without it the values are
    uniform in [`low`, `high`].
    """

    of: Source | None = None
    low: float = 0.0
    high: float = 1.0

    # What the shuffled source needs, this one needs.

    @property
    def needs(self) -> DataNeeds:
        return self.of.needs if self.of else DataNeeds()

    @property
    def observes(self) -> bool:  # type: ignore[override]
        return bool(self.of and self.of.observes)

    @property
    def predicts_errors(self) -> bool:  # type: ignore[override]
        return bool(self.of and self.of.predicts_errors)

    def check(self, model: Network) -> None:
        if self.of:
            self.of.check(model)
        elif not self.low < self.high:
            raise ValueError(f"config.objective.guidance: low {self.low} must be below high {self.high}")

    def init(self, model: Network, params: Params, num_records: int) -> Any:
        return self.of.init(model, params, num_records) if self.of else ()

    def recall(self, memory: Any, index: Int[Array, " b"] | None) -> tuple[Any, Any]:
        return self.of.recall(memory, index) if self.of else (memory, None)

    def __call__(self, request: Request) -> Guidance:
        shape = request.tokens.tokens.shape[:2]
        keys = stream_keys(request.keys, "random map")
        noise = jax.vmap(lambda key: jax.random.uniform(key, shape[1:]))(keys)
        if self.of is None:
            return self.low + (self.high - self.low) * noise
        return shuffle(self.of(request), noise, request.tokens.layout, request.tokens.present)

    def update(self, request: Request, step: Int[Array, ""], errors: Float[Array, "b n"] | None) -> Any:
        return self.of.update(request, step, errors) if self.of else ()

    def flops(self, model: Network, batch: int = 1) -> float:
        return self.of.flops(model, batch) if self.of else 0.0


def shuffle(
    values: Float[Array, "b n"], noise: Float[Array, "b n"], layout: TokenLayout, present: Bool[Array, "b n"] | None = None
) -> Float[Array, "b n"]:
    """Values of the present tokens in the order of the noise, inside each sample and modality."""

    def one_modality(x: Float[Array, " k"], order: Float[Array, " k"], there: Bool[Array, " k"]) -> Float[Array, " k"]:
        picked = jnp.argsort(jnp.where(there, order, jnp.inf))  # present tokens in random order, then the others
        places = jnp.argsort(~there, stable=True)  # present places, then the others
        return x.at[places].set(x[picked])

    everywhere = jnp.ones(values.shape, bool) if present is None else present
    return jnp.concatenate([jax.vmap(one_modality)(values[:, s], noise[:, s], everywhere[:, s]) for s in layout.spans()], axis=1)
