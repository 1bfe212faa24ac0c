"""Metrics summed on the device, exact over micro-batches, devices and steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from maskvit.core.types import Metrics

# ---------------------------------------------------------------------------------------------- accumulation


class Accumulator:
    """Sums the metrics of many steps on the host, in float32 like the steps themselves.

    Args:
      sums: what `as_json` gave, to continue where a run was stopped.
    """

    def __init__(self, sums: Mapping[str, Sequence[str]] | None = None) -> None:
        self._sums = {name: (np.float32(total), np.float32(count)) for name, (total, count) in (sums or {}).items()}

    def add(self, metrics: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> None:
        """Add one step's {name: (numerator, denominator)}. Steps may have different names. Waits until the step is done."""
        with np.errstate(over="ignore", invalid="ignore"):
            for name, (numerator, denominator) in jax.device_get(metrics).items():
                total, count = self._sums.get(name, (np.float32(0), np.float32(0)))
                self._sums[name] = (total + np.float32(numerator), count + np.float32(denominator))

    def sums(self) -> dict[str, tuple[float, float]]:
        """{name: (sum of numerators, sum of denominators)} since the last `summarize`."""
        return {name: (float(total), float(count)) for name, (total, count) in self._sums.items()}

    def as_json(self) -> dict[str, list[str]]:
        """The sums, exactly, for a checkpoint's metadata; text, because JSON has no NaN."""
        return {name: [repr(total), repr(count)] for name, (total, count) in self.sums().items()}

    def summarize(self) -> dict[str, float]:
        """Numerator / denominator of each sum since the last call, then start anew; NaN where nothing was counted."""
        sums, self._sums = self.sums(), {}
        return {name: total / count if count else math.nan for name, (total, count) in sums.items()}


def summarize(metrics: Metrics | Sequence[Metrics]) -> dict[str, float]:
    """Numerator / denominator of one {name: (numerator, denominator)} or of the sum of several."""
    accumulator = Accumulator()
    for one in [metrics] if isinstance(metrics, Mapping) else metrics:
        accumulator.add(one)
    return accumulator.summarize()


def added(total: Any, batch: Any) -> Any:
    """The sums of a batch (a tree of arrays) added to those of the batches before it (None: there are none), on the host.

    Whole numbers become int64 and stay exact however many pixels a data set has, others float64. Waits until the batch is done.
    """
    wide = jax.tree.map(lambda x: np.asarray(x, np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64), jax.device_get(batch))
    return wide if total is None else jax.tree.map(np.add, total, wide)
