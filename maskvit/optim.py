"""Schedules and the optimiser as plain functions of the step.

The learning rate is applied by `train_step` at the run's own step, so a skipped update advances the schedule but not the
optimiser's count, and an imported optimiser keeps its own count.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from maskvit.types import Params


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then a half cosine, per step, as MultiMAE precomputes it.

    The run's step s stands at step `start + s` of a schedule of `total` steps. With T total and w warm-up steps: for
    t < w, lr = peak * t / (w - 1), from exactly 0 to exactly the peak; for t >= w,
    lr = floor + (peak - floor) * (1 + cos(pi * (t - w) / (T - w))) / 2. So the first step has lr 0 and the peak comes twice.

    Three ways to continue a run: *tail* (`start` at epoch 1500 of 1600), *restart* (start 0, a schedule of its own),
    *scaled* (the tail with a larger peak).
    """

    peak: float
    total: int
    warmup: int = 0
    start: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.total:
            raise ValueError(
                f"config.schedule: warm-up of {self.warmup} steps does not fit into {self.total} steps in all; "
                "lower warmup_epochs or raise total_epochs"
            )
        if not 0 <= self.start < self.total:
            raise ValueError(f"config.schedule: start_epochs ({self.start} steps) must lie before total_epochs ({self.total} steps)")

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """Learning rate at the run's step."""
        # Integers up to here: near the end of 1,000,000 steps float32 would round the distance to T.
        t = jnp.asarray(step) + self.start
        rising = self.peak * t / max(self.warmup - 1, 1)
        left = (self.total - t).astype(jnp.float32) / (self.total - self.warmup)
        # cos(pi - x) = -cos(x): with the distance to the end in hand the tail keeps full precision.
        falling = self.floor + (self.peak - self.floor) * jnp.square(jnp.sin(0.5 * jnp.pi * jnp.clip(left, 0.0, 1.0)))
        return jnp.where(t < self.warmup, rising, falling).astype(jnp.float32)


class Optimizer(NamedTuple):
    """`tx` turns gradients into steps of learning rate 1 (sign included); `schedule` gives the learning rate."""

    tx: optax.GradientTransformation
    schedule: Any


def decay_mask(params: Params, frozen: Any, decay_all: bool, decayed: tuple[str, ...] = ("kernel",)) -> Any:
    """Which parameters decay: all trainable ones (as MultiMAE pretrains), or only those whose last name is in `decayed`."""
    names = {path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]}
    unknown = [name for name in decayed if name not in names]
    if unknown and not decay_all:
        raise ValueError(f"config.optimizer.decayed names {unknown[0]!r}, but this model's parameters are: {', '.join(sorted(names))}")

    def decays(path: Any, leaf: Any, is_frozen: bool) -> bool:
        if is_frozen:
            return False
        name = path[-1].key
        return decay_all or name in decayed

    return jax.tree_util.tree_map_with_path(decays, params, frozen)


def adamw(
    params: Params,
    frozen: Any,
    schedule: Any,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    decay_all: bool = True,
    decayed: tuple[str, ...] = ("kernel",),
    clip_norm: float | None = None,
) -> Optimizer:
    """AdamW with decoupled decay: p <- p (1 - lr wd) - lr m_hat / (sqrt(v_hat) + eps).

    `params` (arrays or shapes) and `frozen` (True = never trained) fix what decays and what has optimiser state.
    `decay_all=True` decays every trainable tensor, norms and biases included, as the MultiMAE reference does;
    False exempts everything but what is named in `decayed`: the kernels of linear layers, and in MAE the tokens too.
    """
    trainable = jax.tree.map(lambda x: not x, frozen)
    parts = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    decays = decay_mask(params, frozen, decay_all, tuple(decayed))
    parts += [
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=lambda _: jax.tree.map(_masked_out, decays, trainable)),
        optax.scale(-1.0),
    ]
    tx = optax.chain(optax.masked(optax.chain(*parts), trainable), optax.masked(optax.set_to_zero(), frozen))
    return Optimizer(tx, schedule)


def _masked_out(decays: bool, trainable: bool) -> Any:
    """Inside `optax.masked` frozen leaves are `MaskedNode`s, and a mask must have the same holes."""
    return decays if trainable else optax.MaskedNode()


def with_adam_moments(opt_state: Any, moments: dict[str, Any]) -> Any:
    """Put imported moments {"count", "mu", "nu"} (parameter trees without frozen tensors) into a fresh optimiser state."""

    def merge(template: Any, given: Any, path: str) -> Any:
        if isinstance(template, dict):
            given = given or {}
            return {key: merge(value, given.get(key), f"{path}/{key}") for key, value in template.items()}
        if isinstance(template, optax.MaskedNode):
            return template
        if given is None or given.shape != template.shape:
            raise ValueError(f"imported optimiser moments lack {path[1:]!r} of shape {template.shape}")
        return jnp.asarray(given, template.dtype)

    def replace(state: Any) -> Any:
        if not isinstance(state, optax.ScaleByAdamState):
            return state
        mu, nu = (merge(tree, moments[name], "") for name, tree in (("mu", state.mu), ("nu", state.nu)))
        return optax.ScaleByAdamState(jnp.asarray(moments["count"], state.count.dtype), mu, nu)

    return jax.tree.map(replace, opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
