"""Is there room for one more checkpoint?"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

LOG = logging.getLogger("maskvit")
SLACK = 1.1  # a checkpoint's files take a little more than its arrays


class DiskFull(RuntimeError):
    """No room for a checkpoint; nothing was begun."""


def free_bytes(directory: Path) -> float:
    """What process 0 finds free, on every process: one decision for all. Every process must call it."""
    free = float(shutil.disk_usage(directory).free) if jax.process_index() == 0 else 0.0
    return float(multihost_utils.broadcast_one_to_all(np.float32(free))) if jax.process_count() > 1 else free


def warn_of_little_space(directory: Path, checkpoint_bytes: int, keep: int) -> None:
    """At the start: a warning where the checkpoints to come may not fit; DiskFull where not even the first does."""
    free, kept = free_bytes(directory), (keep + 2) * SLACK * checkpoint_bytes
    require_space(directory, checkpoint_bytes, "the first checkpoint")
    if free < kept:
        LOG.warning(
            "%s has %.2f GB free; %d checkpoints of %.2f GB and one being written need up to %.2f GB: free space, or lower "
            "config.checkpoint.keep",
            directory, free / 1e9, keep + 1, SLACK * checkpoint_bytes / 1e9, kept / 1e9,
        )  # fmt: skip


def require_space(directory: Path, checkpoint_bytes: int, what: str) -> None:
    """Raise DiskFull unless one more checkpoint fits."""
    free, needed = free_bytes(directory), SLACK * checkpoint_bytes
    if free < needed:
        raise DiskFull(
            f"{what} needs {needed / 1e9:.2f} GB and {directory} has {free / 1e9:.2f} GB free: nothing was written. Free space and start "
            "the same command again; it resumes from the last checkpoint"
        )
