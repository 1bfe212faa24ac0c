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


SORTED = 2**21  # data sets of up to so many records are shuffled as a whole
_ROUNDS, _WORD = 6, 2**64 - 1


def record_at(seed: int, epoch: int, position: int, num_records: int) -> int:
    """Which record stands at a position of an epoch's order.

    Up to `SORTED` records that is `epoch_order`. Of more, which would take seconds to sort and hundreds of megabytes in every worker
    process, it is a pseudorandom permutation that is computed place by place.
    """
    if num_records <= SORTED:
        return int(epoch_order(seed, epoch, num_records)[position])
    return scattered(position, num_records, _round_keys(seed, epoch))


@functools.lru_cache(maxsize=2)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(_philox(seed, "order", epoch).random_raw(_ROUNDS).tolist())


def scattered(position: int, count: int, keys: tuple[int, ...]) -> int:
    """A permutation of 0 ... count - 1 at `position`: a Feistel network of as many rounds as there are keys.

    Its domain is the least power of four that holds `count`; places beyond are taken once more until one is within (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002).
    """
    half = ((count - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for key in keys:
            mixed = (right ^ key) * 0x9E3779B97F4A7C15 & _WORD  # the constants are SplitMix64's
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _WORD
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _WORD
            left, right = right, left ^ (mixed ^ mixed >> 31) & mask
        position = left << half | right
        if position < count:
            return position


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
