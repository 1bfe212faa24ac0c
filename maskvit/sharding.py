"""The device mesh, where arrays live on it, and how batches get there. The only file that names mesh axes."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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

# What guidance keeps per record, by its path in a state: rows spread as the samples are. All else is placed by `state_spec`.
PER_RECORD = r"(.*/)?guidance(/maps)?"
WHOLE = 2**12  # arrays of fewer values are not worth an exchange: every device holds them whole

# Which axis of a parameter the tensor axis spreads, by its path in a state. The columns of joined projections (queries, keys and
# values) are not those of heads, so they lie by rows, and every step deals out their columns head by head (`split_over_tensor`).
TENSOR_AXIS = ((r"(.*/)?(qkv|kv|q|fc2|proj)/kernel", 0), (r"(.*/)?fc1/kernel", 1))


def sharding_block(*, fsdp: int | str = 1, tensor: int = 1) -> dict[str, Any]:
    """`config.sharding`. `fsdp`: over how many devices parameters and optimizer state are spread, each holding a part; 0 for all.

    "auto" is the fewest of which each then keeps half of its memory for the rest (`fitting_mesh`).

    `tensor`: over how many devices the heads of attention and the hidden units of MLPs are spread; these devices work on the same
    samples. Those of either group are neighbors in the list of all (`tensor` the nearer), so best of one node.
    """
    if isinstance(fsdp, str) and fsdp != "auto" or not isinstance(fsdp, str) and fsdp < 0:
        raise ValueError(f"config.sharding.fsdp is {fsdp!r}; it must be a number of devices, 0 for all, or 'auto'")
    if tensor < 1:
        raise ValueError(f"config.sharding.tensor is {tensor}; it must be a number of devices, 1 for none of it")
    return dict(fsdp=fsdp, tensor=tensor)


def make_mesh(devices: Sequence[Any] | None = None, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """All devices on the data axis, in groups of `tensor` that share samples, and of `fsdp` of these (0: all) that share the state.

    Process by process: so the rows of a global batch lie as the loader deals them out, and which record gets which mask does not
    depend on the machine. `jax.make_mesh` orders devices by the network between them, and refuses those of several nodes of GPUs.
    Raises ValueError where the devices do not divide into such groups, or the devices of a `tensor` group are of several processes.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda device: (device.process_index, device.id))
    for name, parts, among in (("tensor", tensor, len(devices)), ("fsdp", fsdp or 1, len(devices) // tensor)):
        if not among or among % parts:
            groups = f" in groups of {tensor} (config.sharding.tensor)" if name == "fsdp" and tensor > 1 else ""
            divisors = ", ".join(str(n) for n in range(1, among + 1) if among % n == 0) or "1"
            raise ValueError(
                f"config.sharding.{name} is {parts}, which does not divide {len(devices)} devices{groups}: use one of {divisors}"
            )
    grid = np.array(devices).reshape(-1, fsdp or len(devices) // tensor, tensor)
    for group in grid.reshape(-1, tensor):
        if len({device.process_index for device in group}) > 1:
            raise ValueError(f"config.sharding.tensor is {tensor}, more devices than a process has, or no divisor of their number")
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fitting_mesh(shapes: Any, limit: float, devices: Sequence[Any] | None = None, *, fsdp: int | str = 1, tensor: int = 1) -> Mesh:
    """`make_mesh`; where `fsdp` is "auto" with the smallest groups whose devices hold parameters and their state in half of `limit` bytes.

    `shapes`: the parameters and what the objective keeps beside them (a teacher, an average). Two more arrays of the size of every
    parameter are counted for the optimizer. The other half is for activations: the compiler's account decides on micro-batches. Where
    even all devices hold too much, all of them.
    """
    if not isinstance(fsdp, str):
        return make_mesh(devices, fsdp, tensor)
    least = make_mesh(devices, 1, tensor)
    everyone = sample_devices(least)
    params, beside = shapes
    for parts in (parts for parts in range(1, everyone + 1) if everyone % parts == 0):
        mesh = make_mesh(devices, parts, tensor)
        held = 3 * held_bytes(params, mesh) + held_bytes(beside, mesh)
        if held <= limit / 2:
            break
    return mesh


def held_bytes(tree: Any, mesh: Mesh) -> float:
    """How much of a tree of arrays, or of their shapes, one device holds."""
    total = 0.0
    for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(parameter_shardings(tree, mesh)), strict=True):
        devices = math.prod(mesh.shape[name] for axis in place.spec for name in ((axis,) if isinstance(axis, str) else axis or ()))
        total += math.prod(leaf.shape) * leaf.dtype.itemsize / devices
    return total


def state_spec(path: Any, leaf: Any, mesh: Mesh) -> PartitionSpec:
    """Where an array of a state lies.

    What `TENSOR_AXIS` names is spread over the tensor axis, and the longest other axis that the fsdp axis divides over that one;
    small arrays, and those whose axes do not divide, are whole.
    """
    shape = getattr(leaf, "shape", ())
    spec: list[str | None] = [None] * len(shape)
    if math.prod(shape) < WHOLE:
        return PartitionSpec()
    name = path_name(path)
    for pattern, axis in TENSOR_AXIS if mesh.shape["tensor"] > 1 else ():
        if re.fullmatch(pattern, name) and shape[axis] % mesh.shape["tensor"] == 0:
            spec[axis] = "tensor"
    axes = [axis for axis, size in enumerate(shape) if spec[axis] is None and size % mesh.shape["fsdp"] == 0]
    if mesh.shape["fsdp"] > 1 and axes:
        spec[max(axes, key=lambda axis: shape[axis])] = "fsdp"
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def state_specs(tree: Any, mesh: Mesh) -> Any:
    """`state_spec` of every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: state_spec(path, leaf, mesh), tree)


def tensor_devices() -> int:
    """How many devices work on the same samples in the function that is being traced: 1 outside the step of such a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1)


def batch_devices() -> int:
    """Over how many devices the batch is spread in the step that is being traced: 1 outside the step of such a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in SAMPLES if axis in mesh.manual_axes)


def on_own_samples() -> bool:
    """Whether what is being traced is what each device does by itself with its own samples, as in `on_each_device`."""
    return set(SAMPLES) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def mean_over_devices(x: Array) -> Array:
    """The mean over the devices of `batch_devices`; `x` itself where there are none.

    Its derivative is right for losses that each device takes of its own samples and whose sum counts, as in `on_each_device`.
    """
    return x if batch_devices() == 1 else jax.lax.pmean(x, SAMPLES)


def split_over_tensor(x: Array, axis: int, parts: int | None = None) -> Array:
    """`x` with that axis spread over the devices of a tensor group; `x` itself where a group is one device.

    `parts`: how many equal parts the axis has (heads, say) of which a device holds whole ones. Raises ValueError where their number
    does not divide.
    """
    devices, parts = tensor_devices(), parts or x.shape[axis]
    if devices == 1:
        return x
    if parts % devices:
        raise ValueError(f"config.sharding.tensor is {devices}, which does not divide the {parts} heads or hidden units of a block")
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
    spec[axis] = "tensor"
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def by_tensor_group(function: Callable[..., Array], split: Sequence[Array], whole: Sequence[Array | None]) -> Array:
    """`function(*split, *whole)`, each device of a tensor group on its part of the last axis of `split`; the results lie likewise.

    For what the compiler cannot divide by itself. All arguments have samples first.
    """
    if tensor_devices() == 1:
        return function(*split, *whole)
    last = PartitionSpec(*[None] * (split[0].ndim - 1), "tensor")
    places = (*[last] * len(split), *[None if x is None else PartitionSpec() for x in whole])
    return jax.shard_map(function, in_specs=places, out_specs=last, axis_names={"tensor"}, check_vma=False)(*split, *whole)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples spread over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(SAMPLES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf (arrays or shapes), of whole states too: rows per record by `PER_RECORD`, all else by `state_spec`."""

    def place(path: Any, leaf: Any) -> NamedSharding:
        per_record = re.fullmatch(PER_RECORD, path_name(path)) is not None
        return NamedSharding(mesh, PartitionSpec(SAMPLES) if per_record else state_spec(path, leaf, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


@functools.cache
def _copied(places: tuple[Any, ...]) -> Callable[[list[Array]], list[Array]]:
    """The same arrays in these places; compiled once."""
    return jax.jit(lambda leaves: leaves, out_shardings=list(places))


def whole(tree: Any) -> Any:
    """`tree` with every array whole on each of the devices that hold it. All processes must take part."""
    leaves, structure = jax.tree.flatten(tree)
    places = [NamedSharding(x.sharding.mesh, PartitionSpec()) if isinstance(x.sharding, NamedSharding) else x.sharding for x in leaves]
    if all(x.sharding.is_fully_replicated for x in leaves):
        return tree
    return jax.tree.unflatten(structure, _copied(tuple(places))(leaves))


def record_rows(num_records: int, mesh: Mesh) -> int:
    """Rows of a table that is kept per record: one each, and as many more as make every device's part equally long."""
    devices = sample_devices(mesh)
    return -(-num_records // devices) * devices


def sample_devices(mesh: Mesh) -> int:
    """Over how many devices samples are spread."""
    return math.prod(mesh.shape[axis] for axis in SAMPLES)


class Exchange(NamedTuple):
    """What devices say to one another while each works on its own samples.

    `total` adds a tree of arrays up over all devices. `gather` makes whole arrays of the parts of parameters that the devices of a
    group hold; the gradient of what comes out arrives as that of the device's own part, summed over its group, and
    `total_gradients` adds up what is left: over the groups, and of parameters that every device holds whole over all devices.
    """

    total: Callable[[Any], Any]
    gather: Callable[[Any], Any]
    total_gradients: Callable[[Any], Any]


def _added(tree: Any, axes: tuple[str, ...], mesh: Mesh) -> Any:
    """The sum over the devices of these axes. XLA does not take a sum over one device where a tensor group works together."""
    return tree if math.prod(mesh.shape[axis] for axis in axes) == 1 else jax.lax.psum(tree, axes)


def _gathered(tree: Any, specs: Any) -> Any:
    def whole(leaf: Any, spec: PartitionSpec) -> Any:
        return jax.lax.all_gather(leaf, "fsdp", axis=tuple(spec).index("fsdp"), tiled=True) if "fsdp" in tuple(spec) else leaf

    return jax.tree.map(whole, tree, specs)


def _of_samples(spec: PartitionSpec) -> PartitionSpec:
    """What a spec says of the axes that samples are spread over."""
    return PartitionSpec(*[name if name in SAMPLES else None for name in spec])


def on_each_device(function: Any, mesh: Mesh, without: Callable[[Any], Any] = lambda tree: tree) -> Any:
    """`function(params, shared, samples, exchange) -> (gradients, sums, rows)` of global arrays, by every device on its own samples.

    `params` arrive as the parts that the device's tensor group holds, `gradients` (a tree like `without(params)`) leave as such;
    `shared` and `sums` are the same on all devices, `samples` and `rows` are spread by their first axis. Nothing is communicated but
    by the `Exchange`, and within a tensor group, which computes one result together: there the compiler decides who sends what.
    """

    def run(params: Any, shared: Any, samples: Any) -> Any:
        specs, shared_specs = (jax.tree.map(_of_samples, state_specs(tree, mesh)) for tree in (params, shared))

        def add(leaf: Any, spec: PartitionSpec) -> Any:
            return _added(leaf, ("data",) if "fsdp" in tuple(spec) else SAMPLES, mesh)

        def total_gradients(gradients: Any) -> Any:
            return jax.tree.map(add, gradients, without(specs))

        exchange = Exchange(lambda tree: _added(tree, SAMPLES, mesh), lambda tree: _gathered(tree, specs), total_gradients)

        def on_device(params: Any, shared: Any, samples: Any) -> Any:
            return function(params, _gathered(shared, shared_specs), samples, exchange)

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(specs, shared_specs, PartitionSpec(SAMPLES)),
            out_specs=(without(specs), PartitionSpec(), PartitionSpec(SAMPLES)),
            check_vma=False,
            # The tensor axis is the compiler's only where it has devices: kernels that it cannot divide would be taken apart for nothing.
            axis_names=set(SAMPLES if mesh.shape["tensor"] > 1 else AXES),
        )(params, shared, samples)

    return run


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
