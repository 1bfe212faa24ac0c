"""Two runs in one workdir: the second is refused, whenever it comes and however the first ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from maskvit.checkpoints import CheckpointError
from maskvit.checkpoints.lock import HELD, LOCK, DirectoryLock

HOLD = """
import sys, time
from pathlib import Path
from maskvit.checkpoints.lock import DirectoryLock
from maskvit.checkpoints import CheckpointError
time.sleep(max(0, float(sys.argv[2]) - time.time()))
try:
    DirectoryLock(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(60)
except CheckpointError as error:
    print("refused:", error, flush=True)
"""


def start(directory, at: float = 0.0) -> subprocess.Popen:
    """A process that takes the lock and keeps it."""
    return subprocess.Popen([sys.executable, "-c", HOLD, str(directory), str(at)], stdout=subprocess.PIPE, text=True)


def kill(child: subprocess.Popen) -> None:
    child.send_signal(signal.SIGKILL)
    child.communicate()


def test_the_second_start_is_told_who_holds_it_and_a_killed_run_leaves_nothing_behind(tmp_path):
    child = start(tmp_path)
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"in use by process {child.pid} on {socket.gethostname()}, started 20"):
            DirectoryLock(tmp_path)
    finally:
        kill(child)
    lock = DirectoryLock(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()
    assert not os.listdir(tmp_path)
    lock.release()  # nothing happens


def test_of_starts_at_one_instant_one_wins(tmp_path):
    at = time.time() + 5  # by then all have imported what they need
    children = [start(tmp_path, at) for _ in range(4)]
    try:
        said = [child.stdout.readline() for child in children]
        assert said.count("held\n") == 1 and sum(line.startswith("refused: ") for line in said) == 3, said
    finally:
        for child in children:
            kill(child)


def test_runs_of_one_process_share_a_directory_until_the_last_has_ended(tmp_path):
    first, second = DirectoryLock(tmp_path), DirectoryLock(tmp_path)
    helper = DirectoryLock(tmp_path, shared=True)
    first.release()
    helper.release()
    assert (tmp_path / LOCK).exists()
    second.release()
    assert not (tmp_path / LOCK).exists()


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that has none."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def held_by(directory, **holder):
    (directory / HELD).write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": "noon", "born": 1, **holder}))


def test_without_locks_the_file_is_the_lock(tmp_path, without_locks):
    lock = DirectoryLock(tmp_path)
    assert json.loads((tmp_path / HELD).read_text())["pid"] == os.getpid()
    lock.release()
    assert HELD not in os.listdir(tmp_path)


def test_without_locks_a_run_that_was_killed_on_this_host_is_recognized(tmp_path, without_locks):
    child = subprocess.Popen(["true"])
    child.wait()
    held_by(tmp_path, pid=child.pid)
    DirectoryLock(tmp_path).release()
    held_by(tmp_path, born=-1)  # the number belongs to another process by now
    DirectoryLock(tmp_path).release()


def test_without_locks_a_run_on_another_host_is_believed(tmp_path, without_locks):
    held_by(tmp_path, host="elsewhere", pid=7)
    with pytest.raises(CheckpointError, match=f"process 7 on elsewhere, started noon.*delete .*{HELD}"):
        DirectoryLock(tmp_path)
    assert (tmp_path / HELD).exists()
