"""A backbone with the head of a downstream task: a class, or a value for every pixel, out of the features of chosen blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from maskvit.core.types import Params, TokenBatch
from maskvit.heads import HEADS
from maskvit.heads.network import Network, Pairs
from maskvit.nn.layers import apply_with_statistics


@dataclasses.dataclass(frozen=True)
class TaskNetwork(Network):
    """A network with one head that reads many tokens (parameters under the head's name), or the classifier "head" on pooled ones.

    Attributes:
      task_head, task_options: the row of `HEADS` and all arguments of its module; "" for the classifier, which stands in `heads`.
      layers: the blocks it reads, as `Backbone.features` counts them.
      read_from: inputs whose token maps a dense head reads, side by side on the channel axis.
    """

    task_head: str = ""
    task_options: Pairs = ()
    layers: tuple[int, ...] = ()
    read_from: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        grids = {name: self.modality(name).grid(self.image_size) for name in self.read_from}
        if len(set(grids.values())) > 1:
            raise ValueError(f"config.objective.read_from names inputs of different grids, {grids}: they cannot lie side by side")

    def _task_module(self) -> Any:
        return HEADS[self.task_head].module(dtype=self._dtype(), **dict(self.task_options))

    def _initial(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Parameters and running statistics of the task's head."""
        row, grid = HEADS[self.task_head], self.modality(self.read_from[0]).grid(self.image_size)
        width = self.width * (len(self.read_from) if row.reads == "maps" else 1)
        example = row.example(width, grid, self.num_global_tokens, len(self.layers))
        return self._task_module().init(jax.random.fold_in(key, row.stream), *example)

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters, initialized as the reference does."""
        params = super().init(key)
        return params | {self.task_head: self._initial(key)["params"]} if self.task_head else params

    def init_statistics(self) -> dict[str, Any]:
        """Running means (0) and variances (1) of the head; empty where it keeps none."""
        if not self.task_head or not HEADS[self.task_head].statistics:
            return {}
        shapes = jax.eval_shape(self._initial, jax.random.key(0)).get("statistics", {})
        start = {"mean": jnp.zeros, "variance": jnp.ones}
        return jax.tree_util.tree_map_with_path(lambda path, leaf: start[path[-1].key](leaf.shape), shapes)

    def read(
        self,
        params: Params,
        batch: TokenBatch,
        size: tuple[int, int],
        statistics: Mapping[str, Any],
        branches: Float[Array, "depth two b"] | None = None,
        train: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Any, Mapping[str, Any]]:
        """What the head makes of tokens, and its running statistics after it: "b k" classes, or "b h w k" at `size` in pixels.

        `branches`: stochastic depth (`maskvit.nn.encoder.drop_path`); `key`: of what the head drops in training.
        """
        if not self.task_head:
            return self.logits(params, self.encode(params, batch.tokens, batch.present, branches)), {}
        row, module = HEADS[self.task_head], self._task_module()
        features = self.features(params, batch.tokens, self.layers, batch.present, branches)
        features = tuple(self.normed(params, x) for x in features)
        n = batch.layout.num_tokens
        if row.reads == "pooled":
            # Global tokens of several blocks side by side, the patches of the last.
            arguments: tuple[Any, ...] = features[-1][:, :n], jnp.concatenate([x[:, n:] for x in features], axis=-1)
        else:
            arguments = tuple(self._maps(x, batch) for x in features), size
        rngs = None if key is None else {"dropout": key}
        return apply_with_statistics(module, params[self.task_head], statistics, *arguments, train=train, rngs=rngs if train else None)

    def _maps(self, encoded: Float[Array, "b e d"], batch: TokenBatch) -> Float[Array, "b h w c"]:
        """The tokens of `read_from` on their grid, side by side."""
        grids = dict(zip(batch.layout.names, batch.layout.grids, strict=True))
        missing = [name for name in self.read_from if name not in grids]
        if missing:
            raise ValueError(f"the head reads the tokens of {missing[0]!r}, but the model was shown {', '.join(grids)} alone")
        maps = [encoded[:, batch.layout.span(name)].reshape(encoded.shape[0], *grids[name], -1) for name in self.read_from]
        return jnp.concatenate(maps, axis=-1)
