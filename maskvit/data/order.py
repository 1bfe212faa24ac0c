"""The global order of records, a function of (seed, step) alone."""

from __future__ import annotations

import functools
import zlib

import numpy as np
from jaxtyping import Int


def _philox(seed: int, use: str, *numbers: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(use.encode()), *numbers]))


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_records: int) -> Int[np.ndarray, " num_records"]:
    """The permutation of records of one epoch: a stable sort of raw Philox bits, which no NumPy release may change."""
    order = np.argsort(_philox(seed, "order", epoch).random_raw(num_records), kind="stable").astype(np.int32)
    order.setflags(write=False)
    return order


def record_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator that augments record `index` in `epoch`."""
    return np.random.Generator(_philox(seed, "augment", epoch, index))


def steps_per_epoch(num_records: int, global_batch: int) -> int:
    """Whole global batches in the data; the shuffle drops another remainder in every epoch. Raises where there is none."""
    if global_batch < 1:
        raise ValueError(f"config.global_batch is {global_batch}; it must be at least 1")
    if num_records < global_batch:
        raise ValueError(
            f"the training data hold {num_records} records, fewer than config.global_batch = {global_batch}: "
            f"set it to {num_records} or less, or use more data"
        )
    return num_records // global_batch
