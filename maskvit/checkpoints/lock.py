"""One run per directory: the lock that a second start meets."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from maskvit.checkpoints.manifest import CheckpointError
from maskvit.core.errors import printable

LOCK = ".lock"
HELD = ".lock-held"  # where the file system has no locks
# What file systems without locks answer (some network mounts).
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class DirectoryLock:
    """Holds `directory`/.lock from construction to `release`. CheckpointError, saying who holds it, where another process does.

    The kernel's lock (flock) ends with the process that holds it, however that ends, so a killed run leaves none behind; the
    file names the holder. Where the file system has no locks, the file's existence is the lock. Then a run that was killed
    on this host is recognized; one that was killed elsewhere is not, and the error says which file to delete.

    `shared`: another process of the same run holds it for this one. Within one process a directory may be locked several
    times: its runs come one after the other.
    """

    _held: dict[Path, list[int]] = {}  # path -> [file descriptor (-1: the file itself is the lock), how many hold it]

    def __init__(self, directory: Path, shared: bool = False) -> None:
        self.path = directory.resolve() / LOCK
        if shared:
            self.path = Path()
        elif self.path in self._held:
            self._held[self.path][1] += 1
        else:
            self._held[self.path] = [_lock(self.path), 1]

    def release(self) -> None:
        """Give the directory free and remove the file. Calling it again does nothing."""
        path, self.path = self.path, Path()
        if path not in self._held:
            return
        self._held[path][1] -= 1
        if self._held[path][1] == 0:
            descriptor = self._held.pop(path)[0]
            if descriptor < 0:
                path.with_name(HELD).unlink(missing_ok=True)
            path.unlink(missing_ok=True)  # while it is still locked: who opened it meanwhile sees that it is gone
            if descriptor >= 0:
                os.close(descriptor)


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                return _lock_by_existence(path)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise CheckpointError(_in_use(path, _holder(path))) from error
            raise
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # else a run that just ended removed it
                _write(descriptor)
                return descriptor
        os.close(descriptor)


def _lock_by_existence(path: Path) -> int:
    held = path.with_name(HELD)
    while True:
        try:
            descriptor = os.open(held, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError as error:
            holder = _holder(held)
            if not _ended(holder):
                where = f"This file system has no locks: if that run is over, delete {held}"
                raise CheckpointError(f"{_in_use(path, holder)}. {where}") from error
            # Moved aside before it is deleted, and looked at again: another start may have replaced it in the meantime.
            aside = held.with_name(f"{HELD}.{os.getpid()}")
            with contextlib.suppress(FileNotFoundError):
                os.rename(held, aside)
                if _holder(aside) != holder:
                    os.link(aside, held)
                aside.unlink()
        else:
            _write(descriptor)
            os.close(descriptor)
            return -1


def _write(descriptor: int) -> None:
    """Who holds the lock, into its file."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": now, "born": _born(os.getpid())}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(holder).encode())


def _holder(path: Path) -> dict[str, Any]:
    """What the file says; empty where it says nothing (yet: the other run may have taken the lock this very moment)."""
    for _ in range(20):
        with contextlib.suppress(OSError, ValueError):
            with open(path, "rb") as file:
                holder = json.loads(file.read(4096))
            if isinstance(holder, dict):
                return holder
        time.sleep(0.05)
    return {}


def _in_use(path: Path, holder: dict[str, Any]) -> str:
    who = "another process"
    if holder:
        who = f"process {holder.get('pid')} on {holder.get('host')}, started {holder.get('started')}"
    return printable(f"{path.parent} is in use by {who}: wait for its end or stop it, or choose another --workdir")


def _ended(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this host that is gone. A number that another process has by now counts as gone."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return _born(pid) != holder.get("born")


def _born(pid: int) -> int | None:
    """When a process began, in clock ticks since this host did; None where /proc does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])
