"""One device and four give the same training."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import GUIDED, RANDOM, tiny_batch, tiny_objective

from maskvit.core.keys import sample_keys
from maskvit.core.types import tree_paths
from maskvit.nn.backbone import frozen_mask
from maskvit.optim.schedules import Cosine
from maskvit.optim.transforms import adamw
from maskvit.sharding import (
    ReplicaError,
    batch_sharding,
    check_batch,
    check_replicas,
    make_mesh,
    parameter_shardings,
    place_batch,
    replicated,
)
from maskvit.training.step import init_state, train_step

STEPS = 20


@functools.cache
def run(objective: Any, devices: int, fsdp: int = 1, micro_batches: int = 1) -> tuple[list[float], np.ndarray]:
    """(losses of 20 steps at learning rate 1e-4, what is hidden at step 0) on that many devices."""
    mesh = make_mesh(jax.devices()[:devices], fsdp)
    shapes, _ = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = adamw(shapes, frozen_mask(shapes), Cosine(peak=1e-4, total=1000))
    state = init_state(objective, optimizer, 0)
    places = parameter_shardings(state, mesh)
    state = jax.device_put(state, places)
    step = jax.jit(
        lambda state, batch: train_step(
            state, batch, objective=objective, optimizer=optimizer, seed=0, micro_batches=micro_batches, mesh=mesh
        ),
        in_shardings=(places, batch_sharding(mesh)),
        out_shardings=(places, replicated(mesh)),
        donate_argnums=0,
    )
    batches = [place_batch(tiny_batch(8, seed=i), mesh) for i in range(STEPS)]
    plan = jax.jit(lambda params, batch, keys: objective.plan(params, batch, keys)[0].masked)
    masked, losses = np.asarray(plan(state.params, batches[0], sample_keys(0, 0, 8))), []
    for batch in batches:
        assert len(batch.values["rgb"].sharding.device_set) == devices
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"][0]))
    assert int(state.step) == STEPS and int(state.skipped) == 0
    return losses, masked


@pytest.mark.parametrize("masking,tolerance", [(RANDOM, 1e-5), (GUIDED, 1e-4)], ids=["random", "guided"])
def test_four_devices_give_the_losses_of_one(masking, tolerance):
    objective = tiny_objective(outputs=("rgb", "depth"), encoder=dict(width=48, depth=1, heads=3), **masking)
    (one, masked_one), (four, masked_four) = run(objective, 1), run(objective, 4)
    np.testing.assert_array_equal(masked_one, masked_four)
    np.testing.assert_allclose(four, one, rtol=tolerance)
    assert len(set(one)) == STEPS


@pytest.mark.parametrize(("fsdp", "micro_batches"), [(4, 1), (2, 2)])
def test_parts_of_the_state_train_as_the_whole(fsdp, micro_batches):
    """Parameters and moments spread over all devices, or over pairs while batches are accumulated: the losses of one device."""
    objective = tiny_objective(outputs=("rgb", "depth"), encoder=dict(width=48, depth=1, heads=3), **GUIDED)
    (one, masked_one), (spread, masked) = run(objective, 1), run(objective, 4, fsdp, micro_batches)
    np.testing.assert_array_equal(masked, masked_one)
    np.testing.assert_allclose(spread, one, rtol=1e-5)


def test_where_parts_lie():
    mesh = make_mesh(fsdp=2)
    assert mesh.shape == {"data": 2, "fsdp": 2, "tensor": 1} and make_mesh(fsdp=0).shape["fsdp"] == 4
    shapes = {"kernel": (48, 144), "odd": (145, 51), "bias": (144,), "table": (64, 128)}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()} | {"guidance": {"maps": jnp.zeros((8, 2))}}
    found = {name: sharding.spec for name, sharding in tree_paths(parameter_shardings(tree, mesh)).items()}
    none = PartitionSpec()
    assert found == {
        "kernel": PartitionSpec(None, "fsdp"), "odd": none, "bias": none, "table": PartitionSpec(None, "fsdp"),
        "guidance/maps": PartitionSpec(("data", "fsdp")),
    }  # fmt: skip
    with pytest.raises(ValueError, match="config.sharding.fsdp is 3, which does not divide 4 devices: use one of 1, 2, 4"):
        make_mesh(fsdp=3)


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh looks at."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


def test_a_mesh_over_several_nodes_goes_process_by_process():
    # Every node of GPUs is a slice of its own, and nothing says that devices are listed node by node.
    listed = [Device(id=i, process_index=i % 3, slice_index=i % 3) for i in range(6)]
    mesh = make_mesh(listed)
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == (6, 1, 1)
    assert [(d.process_index, d.id) for d in mesh.devices.flat] == [(0, 0), (0, 3), (1, 1), (1, 4), (2, 2), (2, 5)]


def test_batches_that_do_not_divide_are_errors():
    mesh = make_mesh()
    assert mesh.size == 4
    check_batch(16, mesh, micro_batches=2)
    with pytest.raises(ValueError, match="global_batch 6 is not divisible by 4 devices x 1 micro-batches: use a multiple of 4"):
        check_batch(6, mesh)
    with pytest.raises(ValueError, match="use a multiple of 16"):
        check_batch(24, mesh, micro_batches=4)


def test_placing_a_batch_spreads_samples_and_drops_what_stays_on_the_host():
    host = dict(tiny_batch(8), id=["a"] * 8, index=np.arange(8))
    placed = place_batch(host, make_mesh())
    assert set(placed.values) == {"rgb", "depth", "semseg"} and placed.record.index is not None
    for name, value in {**placed.values, "index": placed.record.index}.items():
        np.testing.assert_array_equal(value, host[name])
        assert {shard.data.shape[0] for shard in value.addressable_shards} == {2}


def test_parameters_are_replicated_whatever_their_path():
    mesh = make_mesh()
    shardings = parameter_shardings({"a": {"kernel": 1}, "b": [2, 3]}, mesh)
    assert all(sharding == replicated(mesh) for sharding in jax.tree.leaves(shardings))


def copies(*values):
    """A replicated array whose devices hold these."""
    sharding = replicated(make_mesh())
    parts = [jax.device_put(value, device) for value, device in zip(values, sharding.mesh.devices.flat, strict=True)]
    return jax.make_array_from_single_device_arrays(values[0].shape, sharding, parts)


def test_copies_that_agree_are_fine():
    rng = np.random.default_rng(0)
    same = {
        "kernel": copies(*[rng.standard_normal((8, 4)).astype(np.float32)] * 4),
        "half": copies(*[np.arange(6, dtype=jnp.bfloat16)] * 4),
        "flag": copies(*[np.array(True)] * 4),
        "step": copies(*[np.int32(7)] * 4),
        "nan": copies(*[np.full(3, np.nan, np.float32)] * 4),
    }
    check_replicas(same)
    sharded = jax.device_put(np.arange(8), batch_sharding(make_mesh()))
    check_replicas({"rows": sharded})  # each device holds its own rows: nothing to compare


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32])
@pytest.mark.parametrize("fault", ["bit", "swap"])
def test_a_device_with_another_copy_is_named(dtype, fault):
    sound = np.arange(1, 25).reshape(4, 6).astype(dtype)
    faulty = sound.copy()
    if fault == "bit":
        faulty.view(np.uint8).reshape(-1)[5] ^= 1
    else:
        faulty[0, 0], faulty[3, 3] = sound[3, 3], sound[0, 0]
    tree = {"encoder": {"kernel": copies(sound, sound, faulty, sound), "bias": copies(*[np.zeros(3, np.float32)] * 4)}}
    name = str(make_mesh().devices.flat[2])
    with pytest.raises(ReplicaError, match="encoder/kernel") as told:
        check_replicas(tree)
    assert name in str(told.value) and "3 of 4 devices" in str(told.value)
