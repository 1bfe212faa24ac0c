"""What the loop is made of, each by itself: traces, room on the disk, micro-batches, steps under way."""

from __future__ import annotations

import collections
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.training import microbatches, waiting
from maskvit.training.disk import DiskFull, require_space, warn_of_little_space
from maskvit.training.flight import Flight, Results
from maskvit.training.microbatches import compile_step
from maskvit.training.profiling import Profiler, parse_window
from maskvit.training.waiting import Waiting, advice
from maskvit.training.watchdog import Watchdog

# Traces


@pytest.fixture
def traced(monkeypatch):
    """What was asked of JAX's profiler, which fails where it is stopped before it was started."""
    calls: list[str] = []

    def stop():
        if calls.count("start") <= calls.count("stop"):
            raise RuntimeError("No profiler is running")
        calls.append("stop")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    return calls


@pytest.mark.parametrize(
    ("first", "end", "expected"),
    [
        (0, 30, ["idle", "start", "idle", "stop"]),
        (15, 30, ["idle", "start", "idle", "stop"]),  # resumed inside the window
        (0, 15, ["idle", "start", "idle", "stop"]),  # ends inside it
        (20, 30, []),  # resumed behind it
        (0, 5, []),
    ],
)
def test_a_window_is_traced_wherever_the_run_starts_or_ends(first, end, expected, traced, tmp_path):
    profiler = Profiler(parse_window("10:20"), tmp_path, lambda: traced.append("idle"))
    for step in range(first, end):
        profiler.before(step)
        assert (traced.count("start") > traced.count("stop")) == (max(first, 10) <= step < 20)
    profiler.close()
    assert traced == expected


@pytest.mark.parametrize("profile", ["10", "a:b", "20:10", "5:5", "-1:4", "1:2:3"])
def test_a_wrong_window_is_refused(profile):
    with pytest.raises(ValueError, match="expected START:STOP"):
        parse_window(profile)


# The disk


def test_room_on_the_disk(tmp_path, monkeypatch, caplog):
    def free(gigabytes: float) -> None:
        usage = collections.namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, int(gigabytes * 1e9)))

    free(10)
    with caplog.at_level("WARNING"):
        warn_of_little_space(tmp_path, 10**9, keep=3)
        assert not caplog.text
        free(4)
        warn_of_little_space(tmp_path, 10**9, keep=3)
    assert "has 4.00 GB free; 4 checkpoints of 1.10 GB and one being written need up to 5.50 GB" in caplog.text
    free(1.05)
    for refuse in (
        functools.partial(warn_of_little_space, tmp_path, 10**9, 3),
        functools.partial(require_space, tmp_path, 10**9, "the checkpoint of step 7"),
    ):
        with pytest.raises(DiskFull, match=r"needs 1.10 GB and .* has 1.05 GB free: nothing was written"):
            refuse()


# Micro-batches


class Model:
    encoder, remat, compute_dtype = (("width", 8), ("depth", 2)), False, "float32"


def split(state, batch, micro_batches):
    """A step whose temporary memory shrinks with the number of micro-batches."""
    parts = batch.reshape(micro_batches, -1, batch.shape[-1])
    return state + jax.lax.map(lambda x: jnp.sin(x[:, :, None] * jnp.cos(x)[:, None, :]).sum(), parts).sum()


def chosen(monkeypatch, limit: float, micro_batch: int = 0, before: int = 0, others: tuple[float, ...] = ()) -> int:
    monkeypatch.setattr(microbatches, "memory_limit", lambda: limit)
    if others:
        monkeypatch.setattr(jax, "process_count", lambda: 1 + len(others))
        told = iter([others] + [(0.0,) * len(others)] * 20)  # of the limits first, then of what is needed
        monkeypatch.setattr(microbatches.multihost_utils, "process_allgather", lambda value: np.array([value, *next(told)], np.float32))
    arguments = (jnp.zeros(()), jnp.ones((16, 256)))
    settings = dict(global_batch=16, micro_batch=micro_batch, before=before, devices=1, model=Model)
    return compile_step(split, arguments, **settings)[1]


def test_micro_batches_are_as_few_as_fit_and_as_many_as_before(monkeypatch):
    monkeypatch.setattr(microbatches, "activation_bytes", lambda model: 1.0)
    assert chosen(monkeypatch, 1e12) == 1
    few = chosen(monkeypatch, 1.5e6)
    assert 1 < few < 16
    assert chosen(monkeypatch, 1e12, before=4) == 4  # a resumed run rounds as before, however much memory is free
    assert chosen(monkeypatch, 1.5e6, before=1) == few  # unless it no longer fits
    assert chosen(monkeypatch, 1e12, before=3) == 1  # on other devices that number may not exist
    assert chosen(monkeypatch, 1e12, before=4, micro_batch=8) == 2  # the config's own number counts most


def test_the_process_with_the_least_memory_decides(monkeypatch):
    monkeypatch.setattr(microbatches, "activation_bytes", lambda model: 1.0)
    alone = chosen(monkeypatch, 1.5e6)
    assert chosen(monkeypatch, 1e12, others=(1.5e6,)) == chosen(monkeypatch, 1.5e6, others=(1e12,)) == alone > 1


# Steps under way


class Later:
    """A result that is there once it is asked for; `read` notes the order."""

    def __init__(self, number: int, read: list[int]):
        self.number, self._read = number, read

    def copy_to_host_async(self) -> None:
        pass

    def __array__(self, *_, **__):
        self._read.append(self.number)
        return np.array(self.number)


def test_no_more_steps_are_under_way_than_asked():
    watchdog, read = Watchdog(60.0), []
    flight = Flight(watchdog)
    seen = []
    for step in range(5):
        seen += [number for number, _ in flight.settle(1)]
        assert seen == list(range(step - 1))  # all but the last are done before the next is handed over
        flight.add(step, Results({}, Later(step, read), Later(step, read)))
    assert [number for number, _ in flight.settle(0)] == [3, 4] and sorted(set(read)) == list(range(5))
    watchdog.close()


# Waiting for data


class Loader:
    workers = 1

    def stage_seconds(self):
        return {"read": 0.001, "decode rgb": 0.015, "crop rgb": 0.004}


def test_what_devices_wait_for_is_told_once(monkeypatch, caplog):
    """Half of half a minute, the first interval left out; then no more. 8 images a step at 4 steps in a second without waiting."""
    monkeypatch.setattr(waiting, "cpu_threads", lambda: 4)
    waits = Waiting(Loader(), 8)
    slow = {"data_wait": 0.5, "steps_per_second": 2.0}
    waits.look(20, slow)
    waits.look(70, slow)
    assert not caplog.messages  # 25 s
    for step in (90, 300, 600):
        waits.look(step, slow)
    (text,) = caplog.messages
    assert text == (
        "step 90: the devices wait for data 50% of the time. A record takes 20.0 ms of a core: decode rgb 15.0, crop rgb 4.0, read 1.0. "
        "Without waiting they would take 32 images/s, which is the work of 0.6 cores; 1 worker process(es) run on 4: pack smaller "
        "pictures (--short_side 256)"
    )


def test_devices_that_hardly_wait_are_no_news(caplog):
    waits = Waiting(Loader(), 8)
    for step in range(0, 1000, 100):
        waits.look(step, {"data_wait": 0.1, "steps_per_second": 2.0})
        waits.look(step + 50, {})
    assert not caplog.messages


def test_a_look_at_the_records_ends_no_run(caplog):
    class Broken(Loader):
        def stage_seconds(self):
            raise ValueError("no such transform")

    waits = Waiting(Broken(), 8)
    for step in (0, 100, 200):
        waits.look(step, {"data_wait": 1.0, "steps_per_second": 2.0})
    assert caplog.messages == ["step 100: what the loader spends its time on could not be measured: no such transform"]
    caplog.clear()
    waits = Waiting(Loader(), 8)
    for step in (0, 100):
        waits.look(step, {"data_wait": 1.0, "steps_per_second": 2.0})  # nothing but waiting
    assert len(caplog.messages) == 1 and "for data 99% of the time" in caplog.messages[0]


def test_advice_goes_by_what_is_short():
    stages = {"read": 0.05, "decode rgb": 0.01}
    assert advice(stages, 0.3, 100, 2, 8).endswith("is the work of 6.0 cores; 2 worker process(es) run on 8: set config.data.workers to 6")
    assert advice(stages, 0.3, 200, 8, 8).endswith("the work of 12.0 cores; 8 worker process(es) run on 8: use more cores")
    assert advice(stages, 0.3, 1, 8, 8).endswith("look at the disk")
