"""Masks made on the host: the exact block-wise sampler of BEiT, iBOT and AttMask, and its ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool

ATTEMPTS = 10
LOG_ASPECT = math.log(1 / 0.3)


@runtime_checkable
class UniformSource(Protocol):
    """What randomness is drawn from: a `numpy.random.Generator`, a `random.Random`, or a recorded stream."""

    def random(self) -> float:
        """The next number, uniform in [0, 1)."""


def draw_ratio(rng: UniformSource, ratio: float | Sequence[float], ratio_var: float | Sequence[float] = 0.0) -> float:
    """The share of tokens to hide: uniform in ratio -+ ratio_var, or exactly `ratio` where `ratio_var` is 0.

    Sequences hold alternatives (iBOT: ratios 0 and 0.3, variations 0 and 0.2): each is drawn, then one of them is taken.
    """
    ratios = tuple(ratio) if isinstance(ratio, Sequence) else (ratio,)
    variations = tuple(ratio_var) if isinstance(ratio_var, Sequence) else (ratio_var,) * len(ratios)
    if not ratios or len(ratios) != len(variations):
        raise ValueError(f"ratio has {len(ratios)} values and ratio_var {len(variations)}: give as many of each, at least one")
    for center, variation in zip(ratios, variations, strict=True):
        if not 0 <= center - variation <= center + variation <= 1:
            raise ValueError(f"ratio {center} -+ ratio_var {variation} must be in 0 ... 1")
    drawn = [_uniform(rng, c - v, c + v) if v > 0 else float(c) for c, v in zip(ratios, variations, strict=True)]
    return drawn[_integer(rng, len(drawn) - 1)] if len(drawn) > 1 else drawn[0]


def block_mask(rng: UniformSource, height: int, width: int, target: float) -> Bool[np.ndarray, "h w"]:
    """Hide rectangles until `target` tokens (a real number) are hidden or no further rectangle is found; True = hidden.

    Each is tried up to ten times: area uniform between (shorter side // 3)^2 and what is still to hide, aspect log-uniform
    in (0.3, 1 / 0.3), sides rounded half to even and shorter than the grid's, any place; it is taken if it hides something
    new and not more than is still to hide. So at most `target` tokens are hidden, and usually slightly fewer.
    """
    _check(height, width, target)
    masked = np.zeros((height, width), bool)
    hidden = 0
    while hidden < target:
        added = _add_rectangle(rng, masked, target - hidden)
        if not added:
            break
        hidden += added
    return masked


def _add_rectangle(rng: UniformSource, masked: Bool[np.ndarray, "h w"], room: float) -> int:
    """Hide one more rectangle in place that adds at most `room` tokens; how many it added, 0 where none was found."""
    height, width = masked.shape
    smallest = (min(height, width) // 3) ** 2
    for _ in range(ATTEMPTS):
        area = _uniform(rng, smallest, room)
        aspect = math.exp(_uniform(rng, -LOG_ASPECT, LOG_ASPECT))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top, left = _integer(rng, height - h), _integer(rng, width - w)
        rectangle = masked[top : top + h, left : left + w]
        new = h * w - int(rectangle.sum())
        if 0 < new <= room:
            rectangle[:] = True
            return new
    return 0


def _uniform(rng: UniformSource, low: float, high: float) -> float:
    """Uniform between two bounds, whichever is larger: `room` falls below the smallest area near the end."""
    return low + (high - low) * float(rng.random())


def _integer(rng: UniformSource, highest: int) -> int:
    """Uniform in 0 ... highest."""
    return min(int(float(rng.random()) * (highest + 1)), highest)


def _check(height: int, width: int, target: float) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"a mask needs a grid of at least 1 x 1 tokens, not {height} x {width}")
    if not 0 <= target <= height * width:
        raise ValueError(f"{target} tokens to hide of a grid of {height} x {width}: it must be in 0 ... {height * width}")
