"""The device mesh, where arrays live on it, and how batches get there. The only file that names mesh axes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from maskvit.core.modalities import HOST_FIELDS
from maskvit.core.types import Batch, batch_of, path_name, tree_paths

AXES = ("data", "fsdp", "tensor")

SAMPLES = ("data", "fsdp")  # the axes that the samples of a batch, and what is kept per record, are spread over

# First match wins: (regex on the parameter's path, where its axes live). Data parallelism replicates everything but the maps that
# guidance keeps per record; FSDP and tensor parallelism are rows above the last.
PARAMETER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(.*/)?guidance(/maps)?", PartitionSpec(SAMPLES)),
    (r".*", PartitionSpec()),
)


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """All devices on the data axis, process by process.

    So the rows of a global batch lie as the loader deals them out, and which record gets which mask does not depend on the machine.
    `jax.make_mesh` orders devices by the network between them, and refuses those of several nodes of GPUs.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices).reshape(-1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples spread over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(SAMPLES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf by its path, first matching row of `PARAMETER_RULES`; works for whole train states."""

    def place(path: Any, _: Any) -> NamedSharding:
        name = path_name(path)
        return next(NamedSharding(mesh, spec) for pattern, spec in PARAMETER_RULES if re.fullmatch(pattern, name))

    return jax.tree_util.tree_map_with_path(place, tree)


def record_rows(num_records: int, mesh: Mesh) -> int:
    """Rows of a table that is kept per record: one each, and as many more as make every device's part equally long."""
    devices = sample_devices(mesh)
    return -(-num_records // devices) * devices


def sample_devices(mesh: Mesh) -> int:
    """Over how many devices samples are spread."""
    return math.prod(mesh.shape[axis] for axis in SAMPLES)


def on_each_device(function: Any, mesh: Mesh) -> Any:
    """`function(common, samples, total) -> (sums, rows)` of global arrays, run by every device on its own samples.

    `common` and `sums` are the same on all devices, `samples` and `rows` are spread by their first axis. Nothing is communicated but
    by `total`, which adds a tree of arrays up over the devices.
    """

    def total(tree: Any) -> Any:
        return jax.lax.psum(tree, SAMPLES)

    return jax.shard_map(
        lambda common, samples: function(common, samples, total),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(SAMPLES)),
        out_specs=(PartitionSpec(), PartitionSpec(SAMPLES)),
        check_vma=False,
    )


def check_batch(global_batch: int, mesh: Mesh, micro_batches: int = 1) -> None:
    """Raise unless every device gets the same number of samples in every micro-batch."""
    devices = sample_devices(mesh)
    if global_batch % (devices * micro_batches):
        raise ValueError(
            f"config.global_batch {global_batch} is not divisible by {devices} devices x {micro_batches} micro-batches: "
            f"use a multiple of {devices * micro_batches}"
        )


def place_batch(batch: dict[str, Any], mesh: Mesh) -> Batch:
    """The loader's arrays of this process's samples to a batch of global arrays, sharded by sample. The only host-to-device hop."""
    sharding = batch_sharding(mesh)
    arrays = {key: np.asarray(value) for key, value in batch.items() if key not in HOST_FIELDS and not key.startswith("original/")}
    return batch_of({key: jax.make_array_from_process_local_data(sharding, value) for key, value in arrays.items()})


class ReplicaError(RuntimeError):
    """Devices that must hold the same parameters do not: a device or its memory is faulty."""


@jax.jit
def _checksums(leaves: list[Array]) -> UInt32[Array, " l"]:
    """One number per array that any flipped bit changes; sums of integers are the same in every order."""

    def one(leaf: Array) -> UInt32[Array, ""]:
        bits = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        words = jax.lax.bitcast_convert_type(bits, f"uint{8 * bits.dtype.itemsize}").reshape(-1).astype(jnp.uint32)
        # An odd factor per place: no flipped bit is lost, and values that swapped places are seen.
        return (words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1)).sum(dtype=jnp.uint32)

    return jnp.stack([one(leaf) for leaf in leaves])


def check_replicas(tree: Any) -> None:
    """Compare the copies that devices hold of every replicated array of `tree`. Every process must call it.

    Raises ReplicaError naming the devices whose copies differ from those of the majority, and the first array concerned.
    """
    named = {name: leaf for name, leaf in tree_paths(tree).items() if leaf.sharding.is_fully_replicated and leaf.size}
    if not named or jax.device_count() == 1:
        return
    # Nothing is communicated: each device sums its own copy, and its shard of the "replicated" result is that sum.
    shards = sorted(_checksums(list(named.values())).addressable_shards, key=lambda shard: shard.device.id)
    ids = np.array([shard.device.id for shard in shards])
    sums = np.stack([np.asarray(shard.data) for shard in shards])
    if jax.process_count() > 1:
        ids, sums = (np.concatenate(part) for part in multihost_utils.process_allgather((ids, sums)))
    rows, counts = np.unique(sums, axis=0, return_counts=True)
    if len(rows) == 1:
        return
    sound = rows[counts.argmax()]
    wrong = (sums != sound).any(axis=1)
    first = list(named)[int(np.flatnonzero((sums[wrong] != sound).any(axis=0))[0])]
    devices = {device.id: device for device in jax.devices()}
    faulty = ", ".join(f"{devices[i]} of process {devices[i].process_index}" for i in ids[wrong].tolist())
    raise ReplicaError(
        f"the copies of {first} that the devices hold differ: {faulty} against {(~wrong).sum()} of {len(ids)} devices that agree. "
        "A device or its memory is faulty; take it out and resume from the last checkpoint"
    )
