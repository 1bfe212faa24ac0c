"""Steps that the devices still work on, and what the processes tell each other along with every step."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int32

from maskvit.core.types import Metrics
from maskvit.sharding import batch_sharding, replicated, sample_devices
from maskvit.training.watchdog import Watchdog


class Results(NamedTuple):
    """What a step returns beside the state, on every process alike.

    `told`: the largest of what the processes told along with it: (number of a signal that asks to stop, 1 + index of a process
    that has no batch, which makes the step void). `norm`: of the parameters after the step.
    """

    metrics: Metrics
    told: Any
    norm: Any


class Telling:
    """This process's word along with a step, as an array that the step takes the maximum of over all devices.

    So all processes learn of a signal or of a loader that failed from the results of one and the same step, and no step waits
    for it.
    """

    def __init__(self, mesh: Mesh) -> None:
        alone = jax.process_count() == 1  # then nothing needs to be communicated
        self._sharding = replicated(mesh) if alone else batch_sharding(mesh)
        self._rows = 1 if alone else sample_devices(mesh) // jax.process_count()
        self._last: tuple[tuple[int, int], Int32[Array, "devices 2"]] | None = None

    def __call__(self, signal_number: int, has_batch: bool) -> Int32[Array, "devices 2"]:
        word = (signal_number, 0 if has_batch else 1 + jax.process_index())
        if self._last is None or self._last[0] != word:
            rows = np.tile(np.array(word, np.int32), (self._rows, 1))
            self._last = word, jax.make_array_from_process_local_data(self._sharding, rows)
        return self._last[1]


class Flight:
    """Results of steps that were handed to the devices and not read yet, the oldest first."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        self._steps: collections.deque[tuple[int, Results]] = collections.deque()

    def add(self, step: int, results: Results) -> None:
        """Note a step just handed over; its results start on their way to the host as soon as they are there."""
        jax.tree.map(lambda x: x.copy_to_host_async(), results)
        self._steps.append((step, results))

    def settle(self, keep: int) -> Iterator[tuple[int, Results]]:
        """Wait until no more than the newest `keep` steps are unfinished; yields (step, results on the host) of the others."""
        while len(self._steps) > keep:
            step, results = self._steps.popleft()
            with self._watchdog.watching(f"step {step}"):
                on_host = jax.device_get(results)
            yield step, on_host
