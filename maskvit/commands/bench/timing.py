"""Wall time in turns, memory, arithmetic rates, and where they were taken."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maskvit.core.processes import cpu_threads


def in_turns(calls: Mapping[Any, Callable[[], Any]], rounds: int, warmup: int = 0, settle: int = 0) -> dict[Any, list[float]]:
    """Seconds of every call, `rounds` times a, b, ..., a, b, ... after `warmup` untimed rounds. A call ends when its work has.

    `settle`: untimed calls before each timed one, as steps follow their like in training: threads and memory are then its own.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warmup + rounds):
        for name, call in calls.items():
            for _ in range(settle if i >= warmup else 0):
                call()
            start = time.perf_counter()
            call()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: Sequence[float], batch: int) -> dict[str, float]:
    """Median, minimum and maximum seconds per step, and images/s at the median."""
    median = statistics.median(seconds)
    return dict(median_s=median, min_s=min(seconds), max_s=max(seconds), images_per_s=batch / median)


def ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of the ratio inside a round: what slows a whole round cancels out."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def resident_peak_gb() -> float:
    """The largest main memory this process has held so far, in 1e9 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def resident_gb(peak: bool = False) -> float | None:
    """The main memory this process holds, or held at most since `forget_peak`, in 1e9 bytes; None where that is not told (not Linux)."""
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM" if peak else "VmRSS")) / 1e9
    except (OSError, StopIteration):
        return None


def forget_peak() -> None:
    """Let `resident_gb(peak=True)` begin anew, where the system allows it."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def device_peak_gb(device: Any) -> float | None:
    """The largest memory the device has held so far, in 1e9 bytes; None where it does not count (the CPU)."""
    stats = device.memory_stats() or {}
    return stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None


def compiled_gb(compiled: Any) -> float | None:
    """What the compiler plans for one program: arguments, results and temporaries, donated buffers counted once."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    return (plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes) / 1e9


def utilization(flops_per_s: float, device_kind: str, devices: int) -> float | None:
    """Share of the devices' dense bfloat16 peak; None where the peak is not known."""
    from maskvit.metrics.throughput import flops_utilization

    return flops_utilization(flops_per_s, 1.0, device_kind=device_kind, device_count=devices)


def limit_cpu_threads(count: int) -> None:
    """Keep this process to `count` cores. Must run before JAX starts, which then makes that many threads."""
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("--cpu-threads needs Linux; leave it out to use all cores")
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(allowed):
        raise ValueError(f"--cpu-threads {count} is not between 1 and the {len(allowed)} cores of this process")
    os.sched_setaffinity(0, set(allowed[:count]))


def machine() -> dict[str, Any]:
    """Where the figures were taken: they mean little without it."""
    import jax

    device = jax.devices()[0]
    precision = getattr(jax.config, "jax_default_matmul_precision", None) or "default"
    return dict(
        measurement="machine", platform=device.platform, device=device.device_kind, devices=jax.device_count(), cpu_threads=cpu_threads(),
        jax=jax.__version__, python=platform.python_version(), matmul_precision=precision,
    )  # fmt: skip
