"""Schedules as plain functions of the step."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What all schedules share: the run's step s stands at step `start + s` of `total`, the first `warmup` of which rise to `peak`.

    `floor`: the rate at the end.

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
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """Linear warm-up, then a half cosine, per step, as MultiMAE precomputes it.

    With T total and w warm-up steps: for t < w, lr = peak * t / (w - 1), from exactly 0 to exactly the peak; for t >= w,
    lr = floor + (peak - floor) * (1 + cos(pi * (t - w) / (T - w))) / 2. So the first step has lr 0 and the peak comes twice.

    MAE rises by peak * t / w, and so has the peak once: its rates of the warm-up are (w - 1) / w of these, and all others the same.
    """

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        # Integers up to here: near the end of 1,000,000 steps float32 would round the distance to T.
        t = jnp.asarray(step) + self.start
        rising = self.peak * t / max(self.warmup - 1, 1)
        left = (self.total - t).astype(jnp.float32) / (self.total - self.warmup)
        # cos(pi - x) = -cos(x): with the distance to the end in hand the tail keeps full precision.
        falling = self.floor + (self.peak - self.floor) * jnp.square(jnp.sin(0.5 * jnp.pi * jnp.clip(left, 0.0, 1.0)))
        return jnp.where(t < self.warmup, rising, falling).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Polynomial(Schedule):
    """Linear warm-up from `start_factor` of the peak, then a power of the distance to the end, as MMSegmentation 1.x trains.

    For t < w, lr = peak * (f + (1 - f) * t / (w - 1)); for t >= w, lr = floor + (peak - floor) * (1 - (t - w) / (T - w - 1))^power, so
    that the peak comes twice and the last step has exactly the floor. MMSegmentation 0.x differs: there the power is of t / T.
    """

    power: float = 1.0
    start_factor: float = 1e-6

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        t = jnp.asarray(step) + self.start
        rising = self.peak * (self.start_factor + (1 - self.start_factor) * t / max(self.warmup - 1, 1))
        left = (self.total - 1 - t).astype(jnp.float32) / max(self.total - self.warmup - 1, 1)
        falling = self.floor + (self.peak - self.floor) * jnp.clip(left, 0.0, 1.0) ** self.power
        return jnp.where(t < self.warmup, rising, falling).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class CosinePerEpoch(Schedule):
    """A half cosine of the epoch, constant inside one, as DINO's and iBOT's linear probes have it: no warm-up.

    In epoch e of E, lr = floor + (peak - floor) * (1 + cos(pi * e / E)) / 2, E = total / steps_per_epoch.
    """

    steps_per_epoch: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup:
            raise ValueError(f"config.schedule.name 'cosine_per_epoch' has no warm-up, here {self.warmup} steps: remove warmup_epochs")

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        begun = (jnp.asarray(step) + self.start) // self.steps_per_epoch * self.steps_per_epoch
        left = (self.total - begun).astype(jnp.float32) / self.total
        return self.floor + (self.peak - self.floor) * jnp.square(jnp.sin(0.5 * jnp.pi * jnp.clip(left, 0.0, 1.0)))


@dataclasses.dataclass(frozen=True)
class CosineDecay:
    """Weight decay from `first` to `last` on half a cosine over all steps of a schedule."""

    first: float
    last: float
    schedule: Schedule

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The weight at the run's step."""
        progress = (jnp.asarray(step) + self.schedule.start) / self.schedule.total
        return self.last + (self.first - self.last) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
