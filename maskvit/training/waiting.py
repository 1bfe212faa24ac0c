"""A run whose devices wait for data: what takes the time, and what to do about it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from maskvit.core.processes import cpu_threads
from maskvit.data.costs import told

LOG = logging.getLogger("maskvit")
SHARE = 0.2  # of the time that devices may wait before a word is said
SECONDS = 30.0  # of a run that are looked at


class Waiting:
    """Adds up the figures of speed of a run's intervals, and says once what the devices wait for.

    `local_batch`: images of a step that this process prepares. The first interval, in which workers start, counts nowhere.
    """

    def __init__(self, batches: Any, local_batch: int):
        self._batches, self._local_batch = batches, local_batch
        self._step: int | None = None
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._told = False

    def look(self, step: int, figures: Mapping[str, float]) -> None:
        """`figures` as of `maskvit.metrics.throughput.Throughput.read`, of the steps since the last call."""
        before, self._step = self._step, step
        if before is None or self._told or "data_wait" not in figures:
            return
        seconds = (step - before) / figures["steps_per_second"]
        self._steps, self._seconds = self._steps + step - before, self._seconds + seconds
        self._waited += seconds * figures["data_wait"]
        if self._seconds < SECONDS:
            return
        if self._waited >= SHARE * self._seconds:
            self._told = True
            stages = self._batches.stage_seconds()
            if stages:
                rate = self._local_batch * self._steps / (self._seconds - self._waited)
                share = self._waited / self._seconds
                LOG.warning("step %d: %s", step, advice(stages, share, rate, self._batches.workers, cpu_threads()))
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0


def advice(stages: Mapping[str, float], share: float, rate: float, workers: int, cores: int) -> str:
    """What to say where devices wait for that share of the time, and would take `rate` images a second of this process if they did not.

    `stages`: seconds per record (`maskvit.data.costs.stage_seconds`); `workers` processes on `cores` cores prepare them.
    """
    slowest, wanted = max(stages, key=lambda name: stages[name]), rate * sum(stages.values())
    enough = min(cores, math.ceil(round(wanted, 2)))
    ways = [f"set config.data.workers to {enough}"] if workers < enough else []
    if slowest.startswith(("decode", "crop", "views")):
        ways.append("pack smaller pictures (--short_side 256)")
    if wanted > cores:
        ways.append("use more cores")
    return (
        f"the devices wait for data {share:.0%} of the time. A record takes {told(stages)}. Without waiting they would take {rate:,.0f} "
        f"images/s, which is the work of {wanted:.1f} cores; {workers or 'no'} worker process(es) run on {cores}: "
        + (", or ".join(ways) or "look at the disk")
    )
