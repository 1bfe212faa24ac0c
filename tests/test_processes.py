"""Processes of one run find each other, or the one that is missing is named; and they come to one decision."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading

import pytest

from maskvit.core.processes import ProcessError, join, meet
from tests.runs import free_port

ROOT = pathlib.Path(__file__).resolve().parent.parent


def together(*processes: tuple[int, int], timeout: float = 3.0, beside=None) -> list[str]:
    """What becomes of `meet` in each (index, number of processes): "" or the error."""
    port, ends = free_port(), [""] * len(processes)

    def one(place: int, index: int, count: int) -> None:
        try:
            meet("localhost", port, count, index, timeout)
        except ProcessError as error:
            ends[place] = str(error)

    threads = [threading.Thread(target=one, args=(place, *process)) for place, process in enumerate(processes)]
    for thread in threads:
        thread.start()
    if beside:
        beside(port)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return ends


def test_all_come():
    assert together((2, 3), (0, 3), (1, 3)) == ["", "", ""]


def test_who_is_missing_is_named_to_all_that_came():
    first, third = together((0, 4), (2, 4), timeout=1.0)
    assert first == "processes 1, 3 of 4 did not join within 1 s"
    assert third == first + " (this is process 2)"


def test_process_0_is_missing(monkeypatch):
    import maskvit.core.processes as processes

    now = iter(range(1000))
    monkeypatch.setattr(processes.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(processes.time, "sleep", lambda _: None)
    (told,) = together((1, 2), timeout=2.0)
    assert "process 0 of 2 did not answer at localhost:" in told and "within 2 s (this is process 1)" in told


@pytest.mark.parametrize(
    ("others", "told"),
    [
        (((1, 3), (1, 3)), "two processes were started with --process_id=1"),
        (((1, 2),), "process 1 was started with --num_processes=2, process 0 with 3"),
    ],
)
def test_starts_that_do_not_fit_together(others, told):
    assert told in together((0, 3), *others)[0]


def test_other_programs_at_the_port_are_ignored():
    def knock(port):
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"null\n", b"[]\n", b'{"a": 1}\n', b"\xff\xfe\n"):
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=2) as connection:
                connection.sendall(words)

    assert together((0, 2), (1, 2), timeout=20, beside=knock) == ["", ""]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("localhost:1234", None, None), "--coordinator needs --num_processes and --process_id"),
        (("localhost:1234", 2, 2), "--process_id is 2; of 2 processes it is one of 0 to 1"),
        (("localhost", 2, 0), "--coordinator is 'localhost'; expected host:port"),
        (("localhost:seven", 2, 0), "expected host:port"),
        (("localhost:70000", 2, 0), "expected host:port"),
        ((None, None, None), "--cluster: no scheduler was found"),
    ],
)
def test_wrong_flags_are_one_line(arguments, told):
    with pytest.raises(ProcessError, match=told):
        join(*arguments, timeout=1)


@pytest.mark.parametrize(
    ("tasks", "nodes", "devices"),
    [("4", "4", "None"), ("32", "4", "'5'")],  # one process per machine works on all its devices, one of eight on its own
)
def test_slurm_gives_a_process_its_devices(tasks, nodes, devices):
    """JAX itself would let the only process of a machine see the first device alone."""
    code = """
import jax
from jax._src import distributed, xla_bridge
from maskvit.core import processes
class Told(Exception): pass
def service(*_, **__): raise Told
distributed._jax.get_distributed_runtime_service = service
processes.meet = lambda *_: None
try:
    processes.join(None, None, None, timeout=5)
except Told:
    print("devices", repr(xla_bridge.CUDA_VISIBLE_DEVICES.value if xla_bridge.CUDA_VISIBLE_DEVICES.value != "all" else None))
"""
    slurm = dict(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="node[1-4]", SLURM_PROCID="0", SLURM_LOCALID="5")
    env = {**os.environ, **slurm, "SLURM_NTASKS": tasks, "SLURM_STEP_NUM_NODES": nodes}
    said = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"devices {devices}\n" == said.stdout, said.stderr[-2000:]


PAIR = """
import sys
import jax
from maskvit.core.processes import agree, first_decides, join
port, index, directory, tests = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
join(f"localhost:{port}", 2, index, timeout=60)
sys.path.insert(0, tests)
from maskvit.checkpoints import CheckpointError, CheckpointStore, store
from test_checkpoint import make_state
said = []
def attempt(function):
    try:
        said.append(function())
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
attempt(lambda: first_decides("a", lambda: 7))
attempt(lambda: first_decides("b", lambda: [][0]) if index == 0 else first_decides("b", None))
attempt(lambda: agree("c", None))
attempt(lambda: agree("d", "no space" if index == 1 else None))
checkpoints = CheckpointStore(directory)
state = make_state(1)
put = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda place: x[place])
sharding = jax.sharding.NamedSharding(jax.make_mesh((2,), ("data",)), jax.sharding.PartitionSpec())
import numpy as np
state = jax.tree.map(lambda x: put(np.asarray(x)), state)
if index == 0:
    store.verify = lambda step_dir: ["a flipped bit"]  # process 0 alone reads the files back
checkpoints.save(1, state, {})
attempt(lambda: checkpoints.wait())
import json
print("SAID", json.dumps(said), flush=True)
"""


def test_two_processes_decide_alike(tmp_path):
    """A verdict of process 0 reaches process 1, which would else wait for it at its next save."""
    port = str(free_port())
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PAIR, port, str(index), str(tmp_path), str(ROOT / "tests")], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    ends = [child.communicate(timeout=240) for child in children]
    said = [json.loads(out.partition("SAID ")[2] or "null") for out, _ in ends]
    assert all(said), [err[-2000:] for _, err in ends]
    assert said[0][0] == said[1][0] == 7
    assert said[0][1] == "IndexError: list index out of range" and said[1][1] == "ProcessError: list index out of range"
    assert said[0][2] is said[1][2] is None
    assert said[0][3] == said[1][3] == "ProcessError: no space (on process 1)"
    for one in said:
        assert "CheckpointError: the checkpoint of step 1 could not be written" in one[4] and "a flipped bit" in one[4]
