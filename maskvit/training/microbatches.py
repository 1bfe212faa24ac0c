"""Into how many micro-batches a batch is split: as few as fit, decided once for all processes."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

LOG = logging.getLogger("maskvit")
# By default some sums on a GPU (of gradients that meet at one place) are taken in the order in which they happen to arrive.
DETERMINISTIC: dict[str, str | bool] = {"xla_gpu_deterministic_ops": True}


def compile_step(
    step: Any,
    arguments: tuple[Any, ...],
    *,
    global_batch: int,
    micro_batch: int,
    before: int,
    devices: int,
    model: Any,
    deterministic: bool = False,
) -> tuple[Any, int, float]:
    """Compile the train step with as few micro-batches as fit: (compiled step, micro-batches, bytes per device).

    Args:
      arguments: of the step, the state first, which it may use up.
      micro_batch: samples at once over all devices; 0 lets the compiler's own account of memory decide, from an estimate on.
      before: the number of micro-batches before a stop, 0 if there was none: then no fewer, so that sums round alike.
      deterministic: the same numbers in every run on the same GPUs, at some cost; elsewhere that is so anyway.

    Free memory differs between processes: the least of all decides, so that all compile the same program.
    """
    limit = least_memory()
    counts = micro_batch_counts(global_batch, micro_batch, devices)
    if before in counts:
        counts = [n for n in counts if n >= before]
    per_sample = activation_bytes(model)
    counts = [n for n in counts if global_batch / n / devices * per_sample < limit or n == before] or counts[-1:]
    options = DETERMINISTIC if deterministic and jax.default_backend() == "gpu" else None
    for n in counts:
        lowered = jax.jit(functools.partial(step, micro_batches=n), donate_argnums=0).lower(*arguments)
        compiled = lowered.compile(compiler_options=options)
        memory = compiled.memory_analysis()
        needed = _over_all(memory.temp_size_in_bytes + memory.argument_size_in_bytes if memory else 0, max)
        if needed <= limit or n == counts[-1]:
            break
        LOG.info("%d micro-batch(es) would need %.1f GB per device of %.1f GB: trying more", n, needed / 1e9, limit / 1e9)
    if needed > limit:
        LOG.warning(
            "the step needs %.1f GB per device, which has %.1f GB: lower config.micro_batch, or set config.objective.remat or "
            "config.sharding.fsdp", needed / 1e9, limit / 1e9,
        )  # fmt: skip
    return compiled, n, needed


def _over_all(value: float, choose: Any) -> float:
    """`choose` of what the processes say."""
    if jax.process_count() == 1:
        return value
    return float(choose(multihost_utils.process_allgather(np.float32(value)).tolist()))


def micro_batch_counts(global_batch: int, micro_batch: int, devices: int) -> list[int]:
    """Into how many micro-batches a batch may be split, fewest first; just one number where `micro_batch` is given."""
    counts = [n for n in range(1, global_batch // devices + 1) if global_batch % (n * devices) == 0]
    if not micro_batch:
        return counts
    if global_batch % micro_batch or global_batch // micro_batch not in counts:
        sizes = ", ".join(str(global_batch // n) for n in counts[:6])
        raise ValueError(
            f"config.micro_batch is {micro_batch}: it must divide config.global_batch {global_batch} into equal parts on {devices} "
            f"devices, for example {sizes}; 0 takes the largest that fits"
        )
    return [global_batch // micro_batch]


def activation_bytes(model: Any) -> float:
    """A floor for what one sample keeps for the backward pass: eight activations and one attention map per encoder block.

    Only a first guess, which saves compilations; the compiler's account decides.
    """
    encoder = dict(model.encoder)
    tokens = 100 if model.remat else 200
    width = 2 if model.compute_dtype == "bfloat16" else 4
    return tokens * 8 * encoder["width"] * (1 if model.remat else encoder["depth"]) * width


def least_memory() -> float:
    """`memory_limit` of the process that has the least. All processes must ask."""
    return _over_all(memory_limit(), min)


def memory_limit() -> float:
    """Bytes one device may use: its own limit, or its share of the free main memory on the CPU; infinite where nobody tells."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
    return 0.8 * free / jax.local_device_count()
