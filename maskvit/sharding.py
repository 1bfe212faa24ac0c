"""The device mesh, where arrays live on it, and how batches get there. The only file that names mesh axes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maskvit.types import Batch, path_name

AXES = ("data", "fsdp", "tensor")

# First match wins: (regex on the parameter's path, where its axes live). Data parallelism replicates everything; FSDP
# and tensor parallelism are rows above the last.
PARAMETER_RULES: tuple[tuple[str, PartitionSpec], ...] = ((r".*", PartitionSpec()),)

# Keys of a host batch that describe it but do not go to the devices.
HOST_ONLY = ("id",)


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """All devices on the data axis, process by process.

    So the rows of a global batch lie as the loader deals them out, and which record gets which mask does not depend on the machine.
    `jax.make_mesh` orders devices by the network between them, and refuses those of several nodes of GPUs.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices).reshape(-1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples spread over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf by its path, first matching row of `PARAMETER_RULES`; works for whole train states."""

    def place(path: Any, _: Any) -> NamedSharding:
        name = path_name(path)
        return next(NamedSharding(mesh, spec) for pattern, spec in PARAMETER_RULES if re.fullmatch(pattern, name))

    return jax.tree_util.tree_map_with_path(place, tree)


def check_batch(global_batch: int, mesh: Mesh, micro_batches: int = 1) -> None:
    """Raise unless every device gets the same number of samples in every micro-batch."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if global_batch % (devices * micro_batches):
        raise ValueError(
            f"config.global_batch {global_batch} is not divisible by {devices} devices x {micro_batches} micro-batches: "
            f"use a multiple of {devices * micro_batches}"
        )


def place_batch(batch: dict[str, Any], mesh: Mesh) -> Batch:
    """Host arrays of this process's samples to global arrays, sharded by sample. The only host-to-device hop."""
    sharding = batch_sharding(mesh)
    arrays = {key: np.asarray(value) for key, value in batch.items() if key not in HOST_ONLY and not key.startswith("_")}
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in arrays.items()}
