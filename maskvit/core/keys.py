"""Randomness as a function of (seed, step, sample, name): nothing is threaded through state."""

from __future__ import annotations

import zlib

import jax
from jaxtyping import Array, Int, Key


def stream_keys(keys: Key[Array, "*b"], name: str) -> Key[Array, "*b"]:
    """Independent keys for the purpose `name` (crc32, as Python's own hash differs between processes)."""
    fold = lambda key: jax.random.fold_in(key, zlib.crc32(name.encode()))  # noqa: E731
    return fold(keys) if keys.ndim == 0 else jax.vmap(fold)(keys)


def step_key(seed: Int[Array, ""] | int, step: Int[Array, ""] | int) -> Key[Array, ""]:
    """The key of a step: for draws that all samples of its batch share."""
    return jax.random.fold_in(jax.random.key(seed), step)


def sample_keys(seed: Int[Array, ""] | int, step: Int[Array, ""] | int, batch_size: int) -> Key[Array, " b"]:
    """One key per sample of the global batch of `step`."""
    return jax.random.split(step_key(seed, step), batch_size)
