"""A run whose devices wait for data: what takes the time, and what to do about it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from maskvit.core.processes import cpu_threads
from maskvit.data.costs import describe_stages

LOG = logging.getLogger("maskvit")
SHARE = 0.2  # of the time spent waiting, from which on a run is warned
SECONDS = 30.0  # length of the window that the share is taken over


class Waiting:
    """Adds up a run's figures of speed and warns once, with advice, where the devices spend much of their time waiting for data.

    `local_batch`: images of a step that this process prepares. The first interval, in which workers start, is left out.
    """

    def __init__(self, batches: Any, local_batch: int):
        self._batches, self._local_batch = batches, local_batch
        self._step: int | None = None
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._warned = False

    def look(self, step: int, figures: Mapping[str, float]) -> None:
        """`figures` as of `maskvit.metrics.throughput.Throughput.read`, of the steps since the last call."""
        before, self._step = self._step, step
        if before is None or self._warned or "data_wait" not in figures:
            return
        seconds = (step - before) / figures["steps_per_second"]
        self._steps, self._seconds = self._steps + step - before, self._seconds + seconds
        self._waited += seconds * figures["data_wait"]
        if self._seconds < SECONDS:
            return
        if self._waited >= SHARE * self._seconds:
            self._warned = True
            self._warn(step)
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0

    def _warn(self, step: int) -> None:
        try:
            stages = self._batches.stage_seconds()
        except Exception as error:  # a look at a few records must not end a run
            LOG.warning("step %d: what the loader spends its time on could not be measured: %s", step, error)
            return
        if stages:
            share = min(self._waited / self._seconds, 0.99)
            rate = self._local_batch * self._steps / (self._seconds * (1 - share))
            LOG.warning("step %d: %s", step, advice(stages, share, rate, self._batches.workers, cpu_threads()))


def advice(stages: Mapping[str, float], share: float, rate: float, workers: int, cores: int) -> str:
    """The warning of a run that waits for that share of the time and, without waiting, would take `rate` images a second of this process.

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
        f"the devices wait for data {share:.0%} of the time. A record takes {describe_stages(stages)}. Without waiting they would take "
        f"{rate:,.0f} images/s, which is the work of {wanted:.1f} cores; {workers or 'no'} worker process(es) run on {cores}: "
        + (", or ".join(ways) or "look at the disk")
    )
