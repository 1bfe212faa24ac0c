"""Blocks of `config.objective` as plain data: what is hidden when, what is rebuilt, what weighs how much."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maskvit.core.configuration import check_arguments, hashable
from maskvit.core.modalities import Modality
from maskvit.losses.weights import cosine_between

Duration = str | int | float
ToSteps = Callable[[Duration], int]


def resolved(duration: Duration) -> int | float:
    """A duration that `resolve` has turned into steps. Raises TypeError for one that is still words."""
    if isinstance(duration, str):
        raise TypeError(f"the duration {duration!r} is not in steps yet: call the objective's `resolve` first")
    return duration


@dataclasses.dataclass(frozen=True)
class GuidedShare:
    """Which share of the hidden tokens the scores choose; the rest is hidden at random (`config.objective.guided_share`).

    Attributes:
      share: (first, last), each in [0, 1].
      start: duration before which all are random.
      ramp: duration of the linear way from first to last after `start`; 0 is a step.
    """

    share: tuple[float, float] = (1.0, 1.0)
    start: Duration = 0
    ramp: Duration = 0

    def __post_init__(self) -> None:
        if len(self.share) != 2 or not all(0 <= value <= 1 for value in self.share):
            raise ValueError(f"config.objective.guided_share.share is {self.share}; give (first, last), both between 0 and 1")

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """The share at a step; durations must be in steps (`resolve`)."""
        first, last = self.share
        start, ramp = resolved(self.start), resolved(self.ramp)
        progress = (step - start + 1e-6) / max(ramp, 1e-6)
        return jnp.where(step < start, 0.0, first + (last - first) * jnp.clip(progress, 0.0, 1.0))

    def resolve(self, to_steps: ToSteps) -> GuidedShare:
        """Durations in steps."""
        return dataclasses.replace(self, start=to_steps(self.start) if self.start else 0, ramp=to_steps(self.ramp) if self.ramp else 0)


@dataclasses.dataclass(frozen=True)
class LossWeight:
    """Guidance as weight of a token's loss, gamma * exp(g / tau) with g in [0, 1] per image and modality (`config.objective.loss_weight`).

    Attributes:
      tau: temperature; a pair goes from the first to the second on half a cosine over the run.
      gamma: factor on all weights.
      over: duration of the way between two temperatures.
    """

    tau: float | int | tuple[float, float] = 0.75
    gamma: float | int = 1.0
    over: Duration = "100 percent"

    def __post_init__(self) -> None:
        taus = self.tau if isinstance(self.tau, tuple) else (self.tau,)
        if len(taus) > 2 or min(taus) <= 0.05:
            raise ValueError(
                f"config.objective.loss_weight.tau is {self.tau}; give one or two numbers above 0.05 (weights reach exp(1 / tau))"
            )
        if self.gamma <= 0:
            raise ValueError(f"config.objective.loss_weight.gamma is {self.gamma}; it must be positive")

    def at(self, step: Int[Array, ""]) -> float | Float[Array, ""]:
        """The temperature at a step; durations must be in steps (`resolve`)."""
        if not isinstance(self.tau, tuple):
            return float(self.tau)
        return cosine_between(*self.tau, step / resolved(self.over))

    def resolve(self, to_steps: ToSteps) -> LossWeight:
        """Durations in steps."""
        return dataclasses.replace(self, over=max(1, to_steps(self.over))) if isinstance(self.tau, tuple) else self


@dataclasses.dataclass(frozen=True)
class Predicted:
    """Which hidden tokens are rebuilt (`config.objective.predicted`); the others are thrown away.

    Attributes:
      share: of each modality's hidden tokens.
      by: "scores" rebuilds those with the highest scores (AMT throws the less attended away), "random" any (CrossMAE).
    """

    share: float | int = 1.0
    by: str = "scores"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"config.objective.predicted.share is {self.share}; it must be above 0 and at most 1")
        if self.by not in ("scores", "random"):
            raise ValueError(f"config.objective.predicted.by is {self.by!r}; known: scores, random")


def check_inputs(modalities: Mapping[str, Modality], inputs: Sequence[str]) -> None:
    """Raise ValueError where `config.objective.inputs` is empty, or names what is not declared, or something twice."""
    if not inputs:
        raise ValueError("config.objective.inputs must name at least one modality")
    for name in inputs:
        if name not in modalities:
            raise ValueError(f"config.objective.inputs names {name!r}; declared in config.modalities: {', '.join(modalities)}")
    if len(set(inputs)) < len(inputs):
        raise ValueError(f"config.objective.inputs is {tuple(inputs)}: each modality is named once")


def part_of(key: str, constructor: Any, block: Mapping[str, Any] | None) -> Any:
    """A block of `config.objective` to its dataclass; None where it is empty."""
    if not block:
        return None
    check_arguments(f"config.objective.{key}", constructor, block)
    return constructor(**{name: hashable(value) for name, value in block.items()})
