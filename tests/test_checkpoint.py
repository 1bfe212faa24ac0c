"""Checkpoints under faults, retention, resharding, and starting from another model."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maskvit.checkpoints import (
    CheckpointError,
    CheckpointStore,
    check_same_config,
    check_same_run,
    find_checkpoint,
    format_report,
    init_from,
    load_adam,
    load_origin,
    load_params,
    manifest_digest,
    save_imported,
    versions,
    write_manifest,
)
from maskvit.core.types import TrainState, tree_paths
from maskvit.sharding import make_mesh, parameter_shardings, record_rows

OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(optax.scale_by_adam(), {"dense": {"kernel": True}, "pos_embed": False}),
    optax.masked(optax.add_decayed_weights(0.1), {"dense": {"kernel": True}, "pos_embed": False}),
    optax.scale_by_schedule(lambda step: -0.1 / (step + 1.0)),
)


def make_state(step):
    """A state with everything that is awkward on disk: masked and empty optimizer nodes, an empty objective state."""
    key = jax.random.fold_in(jax.random.key(0), step)
    params = {"dense": {"kernel": jax.random.normal(key, (8, 6))}, "pos_embed": jax.random.normal(key, (2, 3, 4))}
    updates, opt_state = OPTIMIZER.update(jax.tree.map(jnp.ones_like, params), OPTIMIZER.init(params), params)
    return TrainState(jnp.int32(step), optax.apply_updates(params, updates), opt_state, (), jnp.int32(2))


def save_steps(directory, steps, keep=3):
    store = CheckpointStore(directory, keep=keep)
    for step in steps:
        store.save(step, make_state(step), {"config": {"seed": 0}, "data": {"step": step}})
    store.close()


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def steps_in(directory):
    return sorted(int(name) for name in os.listdir(directory) if name.isdigit())


def largest_file(step_dir):
    files = [path for path in step_dir.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return max(files, key=lambda path: (path.stat().st_size, path))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# ---------------------------------------------------------------------------------------------- the store


def test_round_trip_keeps_structure_bits_and_metadata(tmp_path):
    save_steps(tmp_path, [5])
    store = CheckpointStore(tmp_path)
    assert store.latest_valid() == 5
    assert_same(store.restore(5, jax.eval_shape(lambda: make_state(0))), make_state(5))
    assert_same(store.restore(5, make_state(0)), make_state(5))
    assert store.metadata(5) == {"format": 1, "step": 5, "config": {"seed": 0}, "data": {"step": 5}}
    store.close()


def test_state_may_be_donated_right_after_save(tmp_path):
    store = CheckpointStore(tmp_path)
    wear = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
    big = jnp.arange(2_000_000, dtype=jnp.float32)
    state = make_state(1)._replace(objective_state=big + 0)
    expected = jax.tree.map(np.array, state)
    store.save(1, state, {})
    wear(state)
    store.wait()
    assert_same(store.restore(1, expected), jax.tree.map(jnp.asarray, expected))
    store.close()


def test_overlapping_saves_and_retention(tmp_path):
    save_steps(tmp_path, [10, 20, 30, 40], keep=2)
    assert sorted(os.listdir(tmp_path)) == ["30", "40"]
    store = CheckpointStore(tmp_path, keep=2)
    assert store.latest_valid() == 40
    store.restore(40, make_state(0))
    store.save(40, make_state(40), {})  # stopped before the first step after resuming
    store.save(50, make_state(50), {})
    store.save(50, make_state(50), {})  # the final save of a run that has just saved
    store.wait()
    assert steps_in(tmp_path) == [40, 50]
    store.close()
    with pytest.raises(ValueError, match="keep is 0"):
        CheckpointStore(tmp_path, keep=0)


def damage_flip(step_dir):
    flip_a_bit(largest_file(step_dir))
    return largest_file(step_dir)


def damage_truncate(step_dir):
    os.truncate(largest_file(step_dir), 10)
    return step_dir


def damage_remove(step_dir):
    path = step_dir / "state" / "_METADATA"
    path.unlink()
    return path


def damage_manifest(step_dir):
    (step_dir / "manifest.json").unlink()
    return step_dir / "manifest.json"


def damage_manifest_contents(step_dir):
    (step_dir / "manifest.json").write_text('{"files": 3}')
    return step_dir / "manifest.json"


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_remove, damage_manifest, damage_manifest_contents])
def test_damage_is_named_and_an_older_checkpoint_is_used(tmp_path, caplog, damage):
    save_steps(tmp_path, [1, 2])
    path = damage(tmp_path / "2")
    with pytest.raises(CheckpointError, match="damaged"):
        find_checkpoint(tmp_path / "2")
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        store.restore(2, make_state(0))
    assert store.latest_valid() == 1
    assert f"step 2 SKIPPED: {path}" in caplog.text and "2.damaged" in caplog.text
    assert_same(store.restore(1, make_state(0)), make_state(1))
    store.save(2, make_state(2), {})  # training goes on from 1 and comes to 2 again
    store.wait()
    assert store.latest_valid() == 2
    store.close()
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "2.damaged"]


def test_every_single_bit_counts(tmp_path):
    save_steps(tmp_path, [1])
    rng = np.random.default_rng(0)
    files = [path for path in (tmp_path / "1").rglob("*") if path.is_file() and path.stat().st_size and path.name != "manifest.json"]
    for path in files:
        sound = path.read_bytes()
        data = bytearray(sound)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load_params(tmp_path)
        path.write_bytes(sound)
    load_params(tmp_path)


def test_no_sound_checkpoint_is_an_error_and_deletes_nothing(tmp_path):
    save_steps(tmp_path, [1, 2])
    for step in (1, 2):
        (tmp_path / str(step) / "manifest.json").unlink()
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="none of the checkpoints(.|\n)*step 2(.|\n)*step 1"):
        store.latest_valid()
    store.close()
    assert steps_in(tmp_path) == [1, 2]


def test_an_empty_directory_is_a_fresh_start(tmp_path):
    store = CheckpointStore(tmp_path / "new" / "checkpoints")
    assert store.latest_valid() is None
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        store.restore(3, make_state(0))
    store.close()


def test_unwritable_directory_is_found_at_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot be written.*choose another --workdir"):
        CheckpointStore(tmp_path / "file" / "checkpoints")


def test_metadata_must_be_json(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.save(1, make_state(1), {"config": {"size": np.float32(1)}})
    store.close()
    assert os.listdir(tmp_path) == []


def test_a_state_of_another_model_is_refused_by_path(tmp_path):
    save_steps(tmp_path, [1])
    store = CheckpointStore(tmp_path)
    other = make_state(0)
    other.params["dense"]["kernel"] = jnp.zeros((8, 7))
    other.params["dense"]["bias"] = jnp.zeros(7)
    with pytest.raises(CheckpointError, match=r"params/dense/bias: \(7,\) in this run(.|\n)*kernel: \(8, 6\) in the checkpoint, \(8, 7\)"):
        store.restore(1, other)
    store.close()


KILLED = """
import sys, jax, jax.numpy as jnp
sys.path.insert(0, {tests!r})
from test_checkpoint import make_state
from maskvit.checkpoints import CheckpointStore
store = CheckpointStore({directory!r}, keep=3)
start = store.latest_valid() or 0
print("open", flush=True)
for step in range(start + 1, 10_000):
    store.save(step, make_state(step)._replace(objective_state=jnp.full(3_000_000, float(step))), {{}})
    print(step, flush=True)
"""


def test_kill_during_asynchronous_saves(tmp_path):
    code = KILLED.format(tests=str(pathlib.Path(__file__).parent), directory=str(tmp_path))
    rng = np.random.default_rng(0)
    last = 0
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout.readline() == "open\n"
            child.stdout.readline()
            time.sleep(rng.uniform(0.05, 0.6))
            child.send_signal(signal.SIGKILL)
        store = CheckpointStore(tmp_path)
        assert not [name for name in os.listdir(tmp_path) if not name.isdigit() and name != ".lock"], "remains of the killed save"
        step = store.latest_valid()
        assert (step or 0) >= last
        last = step or 0
        if step is not None:
            state = make_state(step)._replace(objective_state=jnp.full(3_000_000, float(step)))
            assert_same(store.restore(step, state), state)
        store.close()


def test_remains_between_commit_and_manifest_are_removed(tmp_path, caplog):
    save_steps(tmp_path, [1, 2])
    (tmp_path / "2" / "manifest.json").unlink()
    (tmp_path / ".unfinished-2").touch()
    store = CheckpointStore(tmp_path)
    assert "step 2 was cut short" in caplog.text
    assert store.latest_valid() == 1
    store.close()
    assert os.listdir(tmp_path) == ["1"]


FULL_DISK = """
import resource, signal, sys, jax.numpy as jnp
sys.path.insert(0, {tests!r})
from test_checkpoint import make_state, assert_same
from maskvit.checkpoints import CheckpointError, CheckpointStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = CheckpointStore({directory!r}, keep=1)
store.save(1, make_state(1), {{}})
store.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
import numpy as np
big = np.random.default_rng(0).normal(size=2_000_000)
try:
    store.save(2, make_state(2)._replace(objective_state=big), {{}})
    store.wait()
    raise SystemExit("the failure went unnoticed")
except CheckpointError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert store.latest_valid() == 1
assert_same(store.restore(1, make_state(0)), make_state(1))
store.save(3, make_state(3), {{}})
store.wait()
assert store.latest_valid() == 3
store.close()
"""


def test_full_disk_is_reported_and_the_older_checkpoint_stays(tmp_path):
    code = FULL_DISK.format(tests=str(pathlib.Path(__file__).parent), directory=str(tmp_path))
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    assert re.search(r"step 2 could not be written to .*Sound checkpoints kept: 1", child.stdout), child.stdout
    assert steps_in(tmp_path) == [3]


def test_resharding_is_exact(tmp_path):
    devices = jax.devices()
    if len(devices) < 4:
        pytest.skip("needs 4 host devices (XLA_FLAGS=--xla_force_host_platform_device_count=4)")
    make = lambda count: jax.sharding.Mesh(np.array(devices[:count]), ("data",))  # noqa: E731
    value = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    split = NamedSharding(make(4), PartitionSpec("data"))
    state = make_state(1)._replace(params={"kernel": jax.device_put(value, split)}, opt_state=optax.EmptyState())
    store = CheckpointStore(tmp_path)
    store.save(1, state, {})
    store.wait()
    for mesh, spec in ((make(1), PartitionSpec()), (make(2), PartitionSpec(None, "data")), (make(4), PartitionSpec())):
        target = NamedSharding(mesh, spec)
        abstract = jax.eval_shape(lambda: state)._replace(params={"kernel": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=target)})
        restored = store.restore(1, abstract)
        assert restored.params["kernel"].sharding == target
        np.testing.assert_array_equal(np.asarray(restored.params["kernel"]), value)
    store.close()
    np.testing.assert_array_equal(load_params(tmp_path)[0]["kernel"], value)


def test_what_is_kept_per_record_is_restored_with_the_padding_of_other_devices(tmp_path):
    """37 records: 37 rows on one device (as the first versions wrote them on any number), 38 on two, 40 on four."""
    mesh = lambda count: make_mesh(jax.devices()[:count])  # noqa: E731
    rows = {count: record_rows(37, mesh(count)) for count in (1, 2, 4)}
    assert rows == {1: 37, 2: 38, 4: 40}
    written = np.random.default_rng(0).normal(size=(37, 2, 3)).astype(np.float16)  # the first versions did not flatten a row
    table = written.reshape(37, 6)

    def target(count, shape):
        state = jax.eval_shape(lambda: make_state(1)._replace(objective_state={"guidance": {"maps": jnp.zeros(shape, jnp.float16)}}))
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, parameter_shardings(state, mesh(count)))

    first = target(1, written.shape).objective_state["guidance"]["maps"].sharding
    with contextlib.closing(CheckpointStore(tmp_path, keep=9)) as store:
        store.save(1, make_state(1)._replace(objective_state={"guidance": {"maps": jax.device_put(written, first)}}), {})
        store.wait()
        for step, count in enumerate((4, 2, 1, 4), start=1):
            state = store.restore(step, target(count, (rows[count], 6)))
            maps = state.objective_state["guidance"]["maps"]
            assert {shard.data.shape[0] for shard in maps.addressable_shards} == {rows[count] // count}
            np.testing.assert_array_equal(np.asarray(maps)[:37], table)
            store.save(step + 1, state, {})
            store.wait()
        with pytest.raises(CheckpointError, match=r"objective_state/guidance/maps: \(40, 6\) in the checkpoint, \(44, 6\)"):
            store.restore(5, target(4, (44, 6)))  # of at least 41 records
        with pytest.raises(CheckpointError, match=r"objective_state/guidance/maps: \(40, 6\) in the checkpoint, \(40, 8\)"):
            store.restore(5, target(4, (40, 8)))
        with pytest.raises(CheckpointError, match=r"objective_state/guidance/maps: \(37, 2, 3\) in the checkpoint, \(37, 8\)"):
            store.restore(1, target(1, (37, 8)))


TWO_PROCESSES = """
import sys, os
index, port, directory, tests = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index)
import jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
sys.path.insert(0, tests)
from maskvit.checkpoints import CheckpointStore, load_params
from maskvit.types import TrainState
split = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
whole = NamedSharding(split.mesh, PartitionSpec())
value = np.arange(24, dtype=np.float32).reshape(4, 6)
put = lambda array, sharding: jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])
count = lambda number: put(np.asarray(number, np.int32), whole)
state = lambda step: TrainState(count(step), {"kernel": put(value + step, split)}, (), (), count(0))
store = CheckpointStore(directory, keep=2)
assert store.latest_valid() is None
for step in (1, 2, 3):
    store.save(step, state(step), {"config": {}})
store.wait()
assert store.latest_valid() == 3
restored = store.restore(3, state(0))
for shard in restored.params["kernel"].addressable_shards:
    np.testing.assert_array_equal(np.asarray(shard.data), (value + 3)[shard.index])
np.testing.assert_array_equal(load_params(directory)[0]["kernel"], value + 3)
store.close()
print("done")
"""


def test_two_processes(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    arguments = [port, str(tmp_path), str(pathlib.Path(__file__).parent)]
    pipes = dict(env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    children = [subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, str(index), *arguments], **pipes) for index in range(2)]
    try:
        for child in children:
            output, errors = child.communicate(timeout=120)
            assert child.returncode == 0 and "done" in output, errors
    finally:
        for child in children:
            child.kill()
    assert sorted(os.listdir(tmp_path)) == ["2", "3"]


# ---------------------------------------------------------------------------------------------- weights alone


def test_paths_and_weights_of_a_run(tmp_path):
    save_steps(tmp_path / "checkpoints", [1, 2])
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "2"):
        params, metadata = load_params(str(path))
        assert metadata["step"] == 2
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
        assert_same(params, jax.tree.map(np.asarray, make_state(2).params))
    assert load_params(tmp_path / "checkpoints" / "1")[1]["step"] == 1
    adam = load_adam(tmp_path)
    assert adam["count"] == 1 and tree_paths(adam["mu"]).keys() == {"dense/kernel"}
    assert versions().keys() >= {"jax", "flax", "optax", "orbax", "maskvit", "python"}


def test_wrong_path_says_what_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_params(tmp_path / "nowhere")
    (tmp_path / "file.pth").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "file.pth"):
        with pytest.raises(CheckpointError, match="looked for .*state.*checkpoints/STEP.*convert_torch_checkpoint.py"):
            load_params(path)


def test_imported_weights(tmp_path):
    params = {"dense": {"kernel": np.ones((2, 3), np.float32)}, "pos_embed": np.zeros((2, 2, 4), np.float32)}
    save_imported(tmp_path / "a", params, {"config": {"x": 1}, "source": "file.pth", "licence": "CC-BY-NC 4.0"})
    loaded, metadata = load_params(tmp_path / "a")
    assert_same(loaded, params)
    assert metadata["source"] == "file.pth" and metadata["versions"] == versions() and metadata["step"] == 0
    assert load_adam(tmp_path / "a") is None
    moments = {"dense": {"kernel": np.full((2, 3), 0.5, np.float32)}}
    save_imported(tmp_path / "b", params, {"config": {}}, adam={"count": np.int32(9), "mu": moments, "nu": moments})
    adam = load_adam(tmp_path / "b")
    assert adam["count"] == 9
    assert_same(adam["nu"], moments)
    with pytest.raises(CheckpointError, match="exists already"):
        save_imported(tmp_path / "a", params, {"config": {}})


def test_what_a_run_records_of_the_weights_that_it_starts_from(tmp_path):
    params = {"dense": {"kernel": np.ones((2, 3), np.float32)}}
    source = dict(file="x.pth", sha256="ab12")
    save_imported(tmp_path / "imported", params, {"config": {}, "source": source, "licence": "CC-BY-NC 4.0"})
    first = load_origin(tmp_path / "imported")
    assert first["licence"] == "CC-BY-NC 4.0" and first["started_from"]["source"] == source
    assert first["started_from"]["checkpoint"] == str(tmp_path / "imported")
    assert first["started_from"]["digest"] == manifest_digest(tmp_path / "imported" / "0")
    save_imported(tmp_path / "run", params, {"config": {}, **first})
    second = load_origin(tmp_path / "run")  # of a run that starts from a run
    assert second["licence"] == "CC-BY-NC 4.0" and second["started_from"]["source"] == source
    assert second["started_from"]["checkpoint"] == str(tmp_path / "run")
    save_imported(tmp_path / "earlier", params, {"config": {}})  # from before it was recorded
    assert load_origin(tmp_path / "earlier")["licence"] is None and load_origin(tmp_path / "earlier")["started_from"]["source"] is None


# ---------------------------------------------------------------------------------------------- init_from


def small_model(modalities=("rgb", "depth", "semseg"), classes=5, grid=(4, 4), seed=0):
    """Parameters with the package's names, tiny."""
    rng = np.random.default_rng(seed)
    make = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    params = {"inputs": {}, "outputs": {}, "global_tokens": make(1, 8)}
    for name in modalities:
        channels = {"rgb": 3, "depth": 1, "semseg": 4}[name]
        params["inputs"][name] = {"pos_embed": make(*grid, 8), "proj": {"kernel": make(4 * channels, 8), "bias": make(8)}}
        values = 4 * (classes if name == "semseg" else channels)
        params["outputs"][name] = {
            "pos_embed": make(*grid, 6),
            "modality_embed": {other: make(6) for other in modalities},
            "head": {"kernel": make(6, values), "bias": make(values)},
        }
    if "semseg" in modalities:
        params["inputs"]["semseg"]["class_embed"] = make(classes, 4)
    params["encoder"] = {"block_00": {"norm1": {"scale": make(8), "bias": make(8)}}}
    return params


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    save_imported(directory, small_model(), {"config": {}})
    return directory


def actions(rows):
    table = {}
    for row in rows:
        table.setdefault(row.action, set()).add(row.path)
    return table


def test_same_model_loads_every_tensor(checkpoint):
    params, rows = init_from(small_model(seed=1), checkpoint)
    assert_same(params, small_model())
    assert actions(rows).keys() == {"loaded"} and len(rows) == len(jax.tree.leaves(params))


def test_other_class_count(checkpoint):
    initial = small_model(classes=3, seed=1)
    with pytest.raises(CheckpointError) as raised:
        init_from(initial, checkpoint)
    message = str(raised.value)
    assert "inputs/semseg/class_embed: (3, 4) in the model, (5, 4) in the checkpoint" in message
    assert "outputs/semseg/head/kernel: (6, 12) in the model, (6, 20) in the checkpoint" in message
    assert "config.init_from.fresh += ['inputs/semseg/class_embed', 'outputs/semseg/head/.*']" in message
    params, rows = init_from(initial, checkpoint, fresh=["inputs/semseg/class_embed", "outputs/semseg/head/.*"])
    fresh = {"inputs/semseg/class_embed", "outputs/semseg/head/kernel", "outputs/semseg/head/bias"}
    assert actions(rows)["fresh"] == fresh and actions(rows).keys() == {"loaded", "fresh"}
    source, drawn, result = tree_paths(small_model()), tree_paths(initial), tree_paths(params)
    for path, leaf in result.items():
        np.testing.assert_array_equal(leaf, (drawn if path in fresh else source)[path])


def test_fewer_modalities(checkpoint):
    initial = small_model(("rgb", "depth"), seed=1)
    with pytest.raises(CheckpointError) as raised:
        init_from(initial, checkpoint)
    suggested = re.search(r"config.init_from.drop \+= (\[.*\])", str(raised.value))[1]
    assert "fresh +=" not in str(raised.value)
    assert suggested == (
        "['inputs/semseg/.*', 'outputs/depth/modality_embed/semseg', 'outputs/rgb/modality_embed/semseg', 'outputs/semseg/.*']"
    )
    params, rows = init_from(initial, checkpoint, drop=["(inputs|outputs)/semseg/.*", "outputs/.*/modality_embed/semseg"])
    source = tree_paths(small_model())
    for path, leaf in tree_paths(params).items():
        np.testing.assert_array_equal(leaf, source[path])
    assert actions(rows)["dropped"] == source.keys() - tree_paths(initial).keys()


def test_other_image_size_resizes_positions(checkpoint, tmp_path):
    from maskvit.core.patches import resample_pos_embed

    initial = small_model(grid=(6, 3), seed=1)
    params, rows = init_from(initial, checkpoint)
    assert {path.rpartition("/")[2] for path in actions(rows)["resized"]} == {"pos_embed"} and len(actions(rows)["resized"]) == 6
    expected = resample_pos_embed(small_model()["inputs"]["rgb"]["pos_embed"], (6, 3))
    np.testing.assert_array_equal(params["inputs"]["rgb"]["pos_embed"], np.asarray(expected))
    learned = [{"learned_pos_embed": np.full((*grid, 4), 0.5, np.float32)} for grid in ((2, 2), (3, 3))]
    save_imported(tmp_path / "learned", learned[0], {"config": {}})
    assert_same(init_from(learned[1], tmp_path / "learned")[0], learned[1])
    report = format_report(rows)
    assert "resized  inputs/rgb/pos_embed  4x4x8 -> 6x3x8" in report
    assert re.search(r"^inputs +7 +3 +0 +0$", report, re.MULTILINE)


@pytest.mark.parametrize("grid", [(3, 3), (6, 6), (3, 7)])
def test_learned_positions_are_resized_as_the_model_does_at_run_time(tmp_path, grid):
    """A model of another image size, started from a checkpoint, sees the positions that the checkpoint's own has on such images."""
    from maskvit.core.modalities import RGB, Modality
    from maskvit.nn.adapters import InputAdapter

    spec = Modality("rgb", **{**RGB, "patch": 4})
    image = jnp.zeros((1, 4 * grid[0], 4 * grid[1], 3))
    trained, other = (InputAdapter(spec, 8, size, learned=True) for size in ((4, 4), grid))
    params = jax.tree.map(np.asarray, trained.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"])
    save_imported(tmp_path / "learned", params, {"config": {}})
    started, rows = init_from(other.init(jax.random.key(1), image)["params"], tmp_path / "learned")
    assert actions(rows)["resized"] == {"learned_pos_embed"}
    np.testing.assert_array_equal(other.apply({"params": started}, image), trained.apply({"params": params}, image))


def test_result_is_placed_like_the_initial_values(checkpoint):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    initial = jax.tree.map(lambda leaf: jax.device_put(leaf.astype(jnp.bfloat16), sharding), small_model(grid=(2, 2), seed=1))
    params, _ = init_from(initial, checkpoint)
    assert all(leaf.sharding == sharding and leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))


def test_names_must_match_something(checkpoint):
    initial = small_model()
    with pytest.raises(ValueError, match=r"config.init_from.fresh holds 'heads/.\*', which matches no tensor of the model"):
        init_from(initial, checkpoint, fresh=["heads/.*"])
    with pytest.raises(ValueError, match="config.init_from.drop holds 'semseg', which matches no tensor of the checkpoint"):
        init_from(initial, checkpoint, drop=["semseg"])  # whole paths, not parts
    with pytest.raises(ValueError, match="no regular expression"):
        init_from(initial, checkpoint, fresh=["("])
    with pytest.raises(ValueError, match="must be a list"):
        init_from(initial, checkpoint, fresh="outputs/.*")
    with pytest.raises(CheckpointError, match="dropped in the checkpoint"):
        init_from(initial, checkpoint, drop=["global_tokens"])


def test_a_damaged_source_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    flip_a_bit(largest_file(tmp_path / "copy" / "0"))
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        init_from(small_model(), tmp_path / "copy")
    write_manifest(tmp_path / "copy" / "0")  # accepted again only when somebody vouches for it
    assert json.loads((tmp_path / "copy" / "0" / "manifest.json").read_text())["files"]


# ---------------------------------------------------------------------------------------------- the same run?


def test_same_config():
    config = ml_collections.ConfigDict(
        {"seed": 0, "image_size": (224, 224), "log_every": 20, "data": {"workers": 2, "train": {"name": "a"}}, "evaluators": {}}
    )
    saved = json.loads(json.dumps(config.to_dict()))
    assert check_same_config(saved, config) == []
    config.log_every, config.data.workers = 5, 0
    config.evaluators = {"knn": {"every": "1 epoch"}}
    allowed = [line.partition(":")[0] for line in check_same_config(saved, config)]
    assert allowed == ["data.workers", "evaluators", "evaluators.knn.every", "log_every"]
    config.image_size, config.data.train.name = (224, 160), "b"
    with pytest.raises(ValueError) as raised:
        check_same_config(saved, config)
    assert "image_size: [224, 224] in the checkpoint, [224, 160] in this config" in str(raised.value)
    assert "data.train.name: 'a' in the checkpoint, 'b' in this config" in str(raised.value)
    assert "log_every:" not in str(raised.value)
    assert check_same_config({"writers": []}, {"writers": ["tensorboard"]})  # what is computed is the same
    assert check_same_config({"a": {"b": 1}}, {"a": {"b": 2}}, may_differ=("a",)) == ["a.b: 1 in the checkpoint, 2 in this config"]


def same(config, **facts):
    return json.loads(json.dumps({"config": config, "steps_per_epoch": 5, "data": {"records": 40}, "durations": {}, **facts}))


RAMP = {"total": "2 steps", "objective": {"guided_share": {"ramp": "100 percent"}}, "data": {"train": {"data_dir": "/a"}}}


@pytest.mark.parametrize(
    ("saved", "now", "expected"),
    [
        (same({}, steps_per_epoch=10), same({}), "an epoch has 5 steps; it had 10"),
        (same({}, data={"records": 80}), same({}), "the data have 40 records; they had 80"),
        (
            same({}, data={"records": 4, "bytes": 10, "sizes": "a"}),
            same({}, data={"records": 4, "bytes": 11, "sizes": "b"}),
            "the data have 11 bytes; they had 10",
        ),
        (same({}, data={"sizes": "a"}), same({}, data={"sizes": "b"}), "other sizes"),
        (
            same({}, data={"contents": {"0": "a", "7": "b", "9": None}}),
            same({}, data={"contents": {"0": "a", "7": "c", "9": "d"}}),
            r"record 7 of the data has other contents \(1 of the 2",
        ),
        (
            same(RAMP, durations={"objective.guided_share.ramp": 2}),
            same({**RAMP, "total": "4 steps"}, durations={"objective.guided_share.ramp": 4}),
            'objective.guided_share.ramp is 4 steps; it was 2 .* Write it as "2 steps"',
        ),
        (
            same({}, maps={"records": 4, "contents": {"0": "a"}}),
            same({}, maps={"records": 4, "contents": {"0": "b"}}),
            "record 0 of the stored maps has other contents .*: config.objective.guidance.path names other data",
        ),
        (same({}), same({"objective": {"scores": "random"}}), "objective.scores: '.absent.' in the checkpoint"),
        (
            same({}, label_names=["ant", "bee", "cow"]),
            same({}, label_names=["ant", "cat", "cow"]),
            "class 1 of the data is 'cat'; it was 'bee' when the checkpoint was written",
        ),
        (same({}, label_names=["ant", "bee"]), same({}, label_names=["ant"]), "class 1 of the data is missing; it was 'bee'"),
    ],
)
def test_what_is_computed_must_be_the_same(saved, now, expected):
    with pytest.raises(ValueError, match=expected):
        check_same_run(saved, now)
    assert check_same_run(now, now) == check_same_run(saved, saved) == []


def test_a_longer_run_and_moved_data_are_the_same_run(caplog):
    """The remedy that the error gives is accepted: the schedule's length in steps."""
    saved = same(RAMP, durations={"objective.guided_share.ramp": 2})
    longer = {"total": "4 steps", "objective": {"guided_share": {"ramp": "2 steps"}}, "data": {"train": {"data_dir": "/b"}}}
    allowed = check_same_run(saved, same(longer, durations={"objective.guided_share.ramp": 2}))
    assert [line.partition(":")[0] for line in allowed] == ["data.train.data_dir", "objective.guided_share.ramp", "total"]


def test_classes_that_one_side_does_not_name_are_not_compared(caplog):
    """An older checkpoint holds no names; others only count the classes."""
    named = same({}, label_names=["ant", "bee"])
    with caplog.at_level("INFO"):
        assert check_same_run(same({}), named) == []
    assert "written before they were stored: label_names" in caplog.text
    assert check_same_run(same({}, label_names=["0", "1"]), named) == check_same_run(named, same({})) == []


def test_an_order_of_records_that_has_changed_is_told(caplog):
    with caplog.at_level("INFO"):
        assert check_same_run(same({}), same({}, order="computed")) == []
    assert "records come in another order than when the checkpoint was written" in caplog.text and "not compared" not in caplog.text


def test_stored_maps_may_be_moved_where_their_contents_are_known():
    paths = [{"objective": {"guidance": {"name": "stored", "path": path}}} for path in ("/a", "/b")]
    maps = {"records": 4, "contents": {"0": "a"}}
    assert check_same_run(same(paths[0], maps=maps), same(paths[1], maps=maps))
    with pytest.raises(ValueError, match="objective.guidance.path: '/a' in the checkpoint, '/b' in this config"):
        check_same_run(same(paths[0]), same(paths[1], maps=maps))


def test_older_checkpoints_lack_keys_and_facts(caplog):
    """A key that has come since is no difference at its default value, and what was not stored is logged once."""
    old, new = {"data": {"workers": 2}, "init_from": {}}, {"data": {"workers": 2, "shuffle": 7}, "init_from": {"path": ""}, "guard": None}
    defaults = {"data.shuffle": 7, "init_from": None, "init_from.path": "", "guard": None}
    with caplog.at_level("INFO"):
        assert check_same_run({"config": old, "steps_per_epoch": 5}, same(new), defaults) == []
    assert [r.message for r in caplog.records if "not compared" in r.message] == [
        "not compared, as the checkpoint was written before they were stored: data, durations"
    ]
    new["data"]["shuffle"] = 8
    with pytest.raises(ValueError, match="data.shuffle: '.absent.' in the checkpoint, 8 in this config"):
        check_same_run({"config": old}, same(new), defaults)


def test_the_earlier_name_of_the_module_still_works():
    import maskvit.checkpoint
    import maskvit.checkpoints

    assert maskvit.checkpoint.load_params is maskvit.checkpoints.load_params
