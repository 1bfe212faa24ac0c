"""One device and four give the same training."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import tiny_batch

from maskvit.checkpoints.store import CheckpointStore
from maskvit.core.types import tree_paths
from maskvit.nn.attention import attention_weights, fused_attend
from maskvit.sharding import (
    ReplicaError,
    batch_sharding,
    check_batch,
    check_replicas,
    fitting_mesh,
    make_mesh,
    on_each_device,
    parameter_shardings,
    place_batch,
    replicated,
    sharding_block,
    split_over_tensor,
)
from maskvit.training import parts
from maskvit.training.config import experiment
from tests.meshes import Training, losses
from tests.runs import make_scenes, small_run


@pytest.mark.parametrize("name", ["random", "guided"])
def test_four_devices_give_the_losses_of_one(name):
    np.testing.assert_array_equal(Training(name, 1).masked(), Training(name, 4).masked())
    one = losses(name, 1)
    np.testing.assert_allclose(losses(name, 4), one, rtol=1e-5)
    assert len(set(one)) == len(one)


@pytest.mark.parametrize(
    ("name", "micro_batches", "sharding"),
    [
        ("guided", 1, dict(fsdp=4)),
        ("guided", 2, dict(fsdp=2, tensor=2)),
        ("mae", 1, dict(tensor=4)),  # all devices work on the same samples
    ],
)
def test_parts_of_the_state_and_of_the_work_train_as_the_whole(name, micro_batches, sharding):
    """Parameters and moments spread over devices, heads and hidden units too, and batches accumulated: the losses of one device."""
    np.testing.assert_allclose(losses(name, 4, micro_batches, **sharding), losses(name, 1), rtol=1e-5)


def test_a_checkpoint_goes_from_one_mesh_to_others(tmp_path):
    """Saved after three steps with parts on four devices; the next losses are the same on three other meshes."""
    saved = Training("mae", 4, fsdp=2, tensor=2)
    saved.losses(range(3))
    store = CheckpointStore(tmp_path, keep=1)
    store.save(3, saved.state, {})
    store.wait()
    expected = saved.losses(range(3, 6))
    for devices, sharding in ((1, {}), (4, dict(fsdp=4)), (2, dict(tensor=2))):
        other = Training("mae", devices, **sharding)
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), other.state, other.places)
        other.state = store.restore(3, target)
        np.testing.assert_allclose(other.losses(range(3, 6)), expected, rtol=1e-5)
    store.close()


def test_fused_attention_of_a_tensor_group_is_that_of_one_device(monkeypatch):
    """Each device gives whole heads to the fused kernel, by JAX's form of it for all devices."""
    mesh = make_mesh(tensor=2)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 4, 7, 32))
    length = jnp.full((4,), 5)
    attend = lambda q, k, v, length: fused_attend(q, k, v, 4, length, length, "xla")  # noqa: E731
    run = lambda params, shared, samples, exchange: ((), (), attend(*samples))  # noqa: E731
    spread = jax.jit(lambda *samples: on_each_device(run, mesh)((), (), samples)[2])
    np.testing.assert_allclose(spread(q, k, v, length), attend(q, k, v, length), rtol=1e-6, atol=1e-6)
    # A single head, as a probe's pooling has, stays whole.
    weights = lambda q, k: attention_weights(q[:, None], k[:, None])  # noqa: E731
    run = lambda params, shared, samples, exchange: ((), (), weights(*samples))  # noqa: E731
    spread = jax.jit(lambda *samples: on_each_device(run, mesh)((), (), samples)[2])
    np.testing.assert_allclose(spread(q, k), weights(q, k), rtol=1e-6, atol=1e-6)


def test_where_parts_lie():
    mesh = make_mesh(fsdp=2)
    assert mesh.shape == {"data": 2, "fsdp": 2, "tensor": 1} and make_mesh(fsdp=0).shape["fsdp"] == 4
    assert make_mesh(fsdp=0, tensor=2).shape == {"data": 1, "fsdp": 2, "tensor": 2}
    shapes = {"kernel": (48, 144), "odd": (145, 51), "bias": (144,), "table": (64, 128)}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()} | {"guidance": {"maps": jnp.zeros((8, 2))}}
    found = {name: sharding.spec for name, sharding in tree_paths(parameter_shardings(tree, mesh)).items()}
    none = PartitionSpec()
    assert found == {
        "kernel": PartitionSpec(None, "fsdp"), "odd": none, "bias": none, "table": PartitionSpec(None, "fsdp"),
        "guidance/maps": PartitionSpec(("data", "fsdp")),
    }  # fmt: skip
    block = {"mlp": {"fc1": {"kernel": (48, 192)}, "fc2": {"kernel": (192, 48)}}, "attn": {"qkv": {"kernel": (48, 144), "bias": (144,)}}}
    tree = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), block, is_leaf=lambda x: isinstance(x, tuple))
    found = {name: tuple(place.spec) for name, place in tree_paths(parameter_shardings(tree, make_mesh(fsdp=2, tensor=2))).items()}
    assert found == {
        "mlp/fc1/kernel": ("fsdp", "tensor"), "mlp/fc2/kernel": ("tensor", "fsdp"), "attn/qkv/kernel": ("tensor", "fsdp"),
        "attn/qkv/bias": (),
    }  # fmt: skip


def test_groups_as_small_as_memory_allows():
    """1 MiB of parameters, two moments, and a teacher: 4 MiB on one device, 1 on each of four; a device keeps half of what it has."""
    params = {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    for megabytes, groups in ((8.0, 1), (7.9, 2), (4.0, 2), (3.9, 4), (0.1, 4)):
        mesh = fitting_mesh((params, {"teacher": params}), megabytes * 2**20, fsdp="auto")
        assert mesh.shape == {"data": 4 // groups, "fsdp": groups, "tensor": 1}
    assert fitting_mesh((params, {}), 1.0, fsdp="auto", tensor=2).shape == {"data": 1, "fsdp": 2, "tensor": 2}
    assert fitting_mesh((params, {}), 1.0, fsdp=2).shape["fsdp"] == 2
    with pytest.raises(ValueError, match="config.sharding.fsdp is 'all'; it must be a number of devices, 0 for all, or 'auto'"):
        sharding_block(fsdp="all")


def test_a_run_chooses_its_groups(tmp_path, monkeypatch, caplog):
    """By what the process with the least memory has."""
    config = small_run(make_scenes(tmp_path), sharding=dict(fsdp="auto"))
    for limit, groups in ((1e12, 1), (1e3, 4)):
        monkeypatch.setattr(parts, "least_memory", lambda limit=limit: limit)
        with caplog.at_level("INFO", "maskvit"):
            found = parts.build_parts(experiment(**config), None)
        assert found.mesh.shape["fsdp"] == groups and f"spread over groups of {groups} devices" in caplog.text


def test_meshes_that_cannot_be():
    for sharding, message in (
        (dict(fsdp=3), "config.sharding.fsdp is 3, which does not divide 4 devices: use one of 1, 2, 4"),
        (dict(tensor=3), "config.sharding.tensor is 3, which does not divide 4 devices: use one of 1, 2, 4"),
        (dict(fsdp=4, tensor=2), "fsdp is 4, which does not divide 4 devices in groups of 2 .config.sharding.tensor.: use one of 1, 2"),
        (dict(tensor=8), "config.sharding.tensor is 8, which does not divide 4 devices"),
    ):
        with pytest.raises(ValueError, match=message):
            make_mesh(**sharding)
    listed = [Device(id=i, process_index=i // 2, slice_index=0) for i in range(4)]
    with pytest.raises(ValueError, match="config.sharding.tensor is 4, more devices than a process has"):
        make_mesh(listed, tensor=4)
    with pytest.raises(ValueError, match="config.sharding.tensor is 0"):
        sharding_block(tensor=0)
    with pytest.raises(ValueError, match="config.sharding.tensor is 4, which does not divide the 3 heads or hidden units of a block"):
        run = lambda params, shared, samples, exchange: ((), (), split_over_tensor(samples, 1, 3))  # noqa: E731
        jax.eval_shape(lambda x: on_each_device(run, make_mesh(tensor=4))((), (), x), jnp.zeros((4, 12)))


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
