"""Throughput, and which share of the devices' peak it is."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator

import jax
from absl import logging

# ---------------------------------------------------------------------------------------------- throughput


class MeasurementError(ValueError):
    """A figure that cannot be true: the clock or the FLOP count is wrong."""


# Dense bfloat16 FLOP/s of one JAX device by the start of its `device_kind`; the longest start counts. Makers' data
# sheets, without sparsity, with float32 accumulation (GeForce: half the tensor rate of float16 accumulation). V100 and
# T4 have no bfloat16: float16. A device of TPU v2 and v3 is a core, half a chip.
PEAK_FLOPS = {
    "NVIDIA GB200": 2500e12,  # NVIDIA GB200 NVL72
    "NVIDIA B200": 2250e12,  # NVIDIA DGX B200
    "NVIDIA H200": 989e12,  # NVIDIA H200
    "NVIDIA GH200": 989e12,  # NVIDIA GH200
    "NVIDIA H100": 989e12,  # NVIDIA H100, SXM ("NVIDIA H100 80GB HBM3")
    "NVIDIA H100 NVL": 835e12,  # the same
    "NVIDIA H100 PCIe": 756e12,  # the same
    "NVIDIA A100": 312e12,  # NVIDIA A100
    "NVIDIA A40": 149.7e12,  # NVIDIA A40
    "NVIDIA A10": 125e12,  # NVIDIA A10
    "NVIDIA L40S": 362e12,  # NVIDIA L40S
    "NVIDIA L4": 121e12,  # NVIDIA L4
    "NVIDIA RTX A6000": 154.8e12,  # NVIDIA Ampere GA102 whitepaper
    "NVIDIA RTX 6000 Ada": 364e12,  # NVIDIA RTX 6000 Ada
    "NVIDIA GeForce RTX 3080": 59.5e12,  # NVIDIA Ampere GA102 whitepaper
    "NVIDIA GeForce RTX 3090": 71e12,  # the same
    "NVIDIA GeForce RTX 4080": 97.5e12,  # NVIDIA Ada whitepaper
    "NVIDIA GeForce RTX 4090": 165.2e12,  # the same
    "NVIDIA GeForce RTX 5090": 209.5e12,  # NVIDIA RTX Blackwell whitepaper
    "Tesla V100": 125e12,  # NVIDIA V100, SXM2
    "Tesla V100-PCIE": 112e12,  # the same
    "Tesla T4": 65e12,  # NVIDIA T4
    "TPU v2": 22.5e12,  # Google Cloud TPU system architecture, for this and all below
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


# No device of any kind computes faster: a figure above it was measured before the devices had finished.
NO_DEVICE_FLOPS = 1e17


# Words after such a start that make it another model.
_VARIANTS = ("Ti", "SUPER", "Laptop", "D", "lite")


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device of this kind, None where it is not known (the CPU among them)."""
    starts = [start for start in PEAK_FLOPS if re.match(re.escape(start) + r"(?![A-Za-z0-9])", device_kind)]
    if not starts:
        return None
    start = max(starts, key=len)
    rest = device_kind[len(start) :].split()
    return None if rest and rest[0] in _VARIANTS else PEAK_FLOPS[start]


def flops_utilization(
    flops_per_step: float, steps_per_second: float, *, device_kind: str | None = None, device_count: int | None = None
) -> float | None:
    """MFU: the share of all devices' dense bfloat16 peak that the model's arithmetic uses; None where the peak is unknown.

    `flops_per_step` counts the model's useful arithmetic over all devices (forward, backward and guidance pass; not
    what remat computes again). Kind and count are those of this run unless given. Raises MeasurementError above 1, and for a
    device of unknown peak above what any device can do.
    """
    peak = peak_flops(device_kind or jax.devices()[0].device_kind)
    share = flops_per_step * steps_per_second / ((peak or NO_DEVICE_FLOPS) * (device_count or jax.device_count()))
    if share > 1:
        raise MeasurementError(
            f"{flops_per_step:.3g} FLOPs x {steps_per_second:.3g} steps/s would be {share:.0%} of the devices' peak: "
            "the clock was read before the devices had finished, or the FLOPs are counted wrong"
        )
    return share if peak else None


class Throughput:
    """Images per second, and the share of the time spent waiting for data, over the steps since the last `read`.

    The time inside `paused` (first compilation, evaluation, saving, drawing) counts nowhere, nor do steps counted in it.

    Args:
      global_batch: images per step over all processes.
      flops_per_step: the model's arithmetic per step; None leaves "mfu" out.
      clock: seconds, monotonic.
    """

    def __init__(self, global_batch: int, flops_per_step: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._global_batch = global_batch
        self._flops_per_step = flops_per_step
        self._clock = clock
        self._is_paused = False
        self._start_anew()

    def _start_anew(self) -> None:
        self._start = self._clock()
        self._steps = 0
        self._waited = 0.0
        self._paused = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around `next(batches)`."""
        start = self._clock()
        try:
            yield
        finally:
            if not self._is_paused:
                self._waited += self._clock() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around all that is not training. The devices should be idle at its start: block on the last step first."""
        if self._is_paused:
            yield
            return
        start, self._is_paused = self._clock(), True
        try:
            yield
        finally:
            self._is_paused = False
            self._paused += self._clock() - start

    def step(self) -> None:
        """Count one finished step."""
        if not self._is_paused:
            self._steps += 1

    def read(self) -> dict[str, float]:
        """{"images_per_second", "steps_per_second", "data_wait" (0 ... 1), "mfu" where known} since the last call; {} before
        the first step. Fetch the last step's metrics before, or the clock is ahead of the devices.
        """
        seconds = self._clock() - self._start - self._paused
        steps, waited = self._steps, self._waited
        self._start_anew()
        if not steps or seconds <= 0:
            return {}
        rate = steps / seconds
        figures = {"images_per_second": rate * self._global_batch, "steps_per_second": rate, "data_wait": waited / seconds}
        if self._flops_per_step is not None:
            try:
                utilization = flops_utilization(self._flops_per_step, rate)
            except MeasurementError as error:
                logging.error("throughput not reported: %s", error)
                return {}
            if utilization is not None:
                figures["mfu"] = utilization
        return figures
