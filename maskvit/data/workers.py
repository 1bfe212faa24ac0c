"""The loader's worker processes: how they start and end, and which of them is dead or hangs, and at what.

Every worker notes in a small shared file what it prepares. The main process reads it when no batch comes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import mmap
import multiprocessing
import multiprocessing.util
import os
import signal
import struct
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_ROW = struct.Struct("qqd")  # process id (0: not started yet), chunk in hand, seconds since the epoch when it was taken up
IDLE, ENDED = -1, -2  # in place of a chunk: none in hand; the process ended as it should, its part of the data being exhausted


class LoaderError(RuntimeError):
    """No further batch will come: a worker died, or nothing came within the time allowed.

    `thread_hangs`: a thread of this process is stuck, so that the interpreter cannot end by itself.
    """

    def __init__(self, message: str, thread_hangs: bool = False):
        super().__init__(message)
        self.thread_hangs = thread_hangs


class Worker(NamedTuple):
    """One row of the table: `chunk` in hand since `since`; IDLE or ENDED where there is none."""

    number: int
    pid: int
    chunk: int
    since: float


class WorkerTable:
    """What the workers are at. Travels to them by pickle as the name of a file; the main process removes it, or after a kill they do."""

    def __init__(self, count: int):
        self.count = count
        self._path = ""
        self._made = time.time()
        self._finalizer: weakref.finalize | None = None
        if not count:  # nobody would remove the file of a killed process
            return
        file, self._path = tempfile.mkstemp(prefix="maskvit-workers-")
        os.write(file, _ROW.pack(0, IDLE, 0.0) * count)
        os.close(file)
        self._finalizer = weakref.finalize(self, Path(self._path).unlink, missing_ok=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return _OwnRow, (self._path,)

    def close(self) -> None:
        """Remove the file; may be called twice."""
        if self._finalizer is not None:
            self._finalizer()

    def read(self) -> list[Worker]:
        """All workers, in order."""
        if not self.count:
            return []
        try:
            rows = Path(self._path).read_bytes()
        except FileNotFoundError:
            return []
        return [Worker(number, *row) for number, row in enumerate(_ROW.iter_unpack(rows))]

    def dead(self) -> list[Worker]:
        """Those that started and are gone, though they should not be."""
        return [worker for worker in self.read() if worker.pid and worker.chunk != ENDED and not _is_alive(worker.pid)]

    def hanging(self) -> Worker | None:
        """One that was stopped from outside, or that has had its chunk in hand for longest; None where neither is found."""
        workers = [worker for worker in self.read() if worker.pid and worker.chunk != ENDED]
        suspects = [w for w in workers + self._stopped_early() if _state(w.pid) == "T"] or [w for w in workers if w.chunk >= 0]
        return min(suspects, key=lambda worker: worker.since, default=None)

    def _stopped_early(self) -> list[Worker]:
        """Child processes that were stopped from outside before they could enter the table: as its missing workers, in order."""
        rows = self.read()
        entered, missing = {worker.pid for worker in rows}, [worker.number for worker in rows if not worker.pid]
        pids = [child.pid for child in multiprocessing.active_children() if child.pid not in entered and _state(child.pid or 0) == "T"]
        return [Worker(number, pid, IDLE, self._made) for number, pid in zip(missing, pids, strict=False) if pid]

    def dump_stacks(self) -> None:
        """Let every worker write the stacks of its threads to standard error."""
        for worker in self.read():
            if worker.pid and worker.chunk != ENDED and hasattr(signal, "SIGUSR1"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGUSR1)
        time.sleep(0.5)

    def kill(self) -> None:
        """End them the hard way: one that hangs answers to nothing else."""
        for worker in self.read() + self._stopped_early():
            if worker.pid and worker.chunk != ENDED:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)


class _OwnRow:
    """The table as a worker sees it: its own row, written in place."""

    def __init__(self, path: str):
        self._path = path
        self._rows: mmap.mmap | None = None
        self._number = 0

    def enter(self, number: int) -> None:
        with contextlib.suppress(FileNotFoundError), open(self._path, "r+b") as file:  # closed already: nobody will read it
            self._rows = mmap.mmap(file.fileno(), 0)
        self._number = number
        self.note(IDLE)

    def remove(self) -> None:
        Path(self._path).unlink(missing_ok=True)

    def note(self, chunk: int) -> None:
        if self._rows is not None:
            self._rows[self._number * _ROW.size : (self._number + 1) * _ROW.size] = _ROW.pack(os.getpid(), chunk, time.time())


_mine: _OwnRow | None = None  # in a worker process: its table


def start_worker(table: Any, number: int, count: int) -> None:
    """In each worker process: leave signals to the main process, end with it, and enter the table."""
    global _mine
    del count
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    _mine = table
    table.enter(number)
    multiprocessing.util.Finalize(None, table.note, args=(ENDED,), exitpriority=100)  # not where it is killed
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent, table), name="maskvit-parent-watch", daemon=True).start()


def _end_with(parent: Any, table: _OwnRow) -> None:
    parent.join()
    table.remove()  # the parent was killed, or did it itself
    os._exit(1)


class Noted:
    """`function` of a chunk number; while it runs in a worker, the worker's row says so."""

    def __init__(self, function: Callable[[int], Any]):
        self._function = function

    def __call__(self, number: int) -> Any:
        if _mine is None:
            return self._function(number)
        _mine.note(int(number))
        try:
            return self._function(number)
        finally:
            _mine.note(IDLE)


def initializer(table: WorkerTable) -> Callable[[int, int], None]:
    """`start_worker` for the workers of `table`, as grain calls it: with a worker's number and how many there are."""
    return functools.partial(start_worker, table)


def _state(pid: int) -> str:
    """The system's letter for the state of a child ("R" runs, "S" sleeps, "T" stopped, "Z" ended, ...); "" where it is not told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _is_alive(pid: int) -> bool:
    """Whether process `pid`, a child of ours, still runs; one that ended and was not waited for does not."""
    if sys.platform == "linux":
        return _state(pid) not in ("", "Z", "X")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
