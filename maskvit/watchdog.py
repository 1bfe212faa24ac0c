"""A thread that ends a process whose devices, or whose disk, do not answer: waiting for ever would help nobody."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

LOG = logging.getLogger("maskvit")
HUNG = 3  # exit status


class Watchdog:
    """`with watchdog.watching("step 12"):` must be left within `seconds`; else all stacks are written and the process ends with `HUNG`.

    Args:
      seconds: how long one thing watched may take.
      end: what ends the process; tests put their own here.
    """

    def __init__(self, seconds: float, end: Callable[[int], object] = os._exit):
        self._seconds, self._end = seconds, end
        self._changed = threading.Condition()
        self._what, self._deadline = "", float("inf")
        self._closed = False
        threading.Thread(target=self._watch, name="maskvit-watchdog", daemon=True).start()

    @contextlib.contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Around what may hang; `what` names it."""
        self._set(what, time.monotonic() + self._seconds)
        try:
            yield
        finally:
            self._set("", float("inf"))

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _set(self, what: str, deadline: float) -> None:
        # No notification: the thread looks often enough by itself, and a step should not wake it.
        with self._changed:
            self._what, self._deadline = what, deadline

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                if time.monotonic() >= self._deadline:
                    self._report()
                    self._deadline = float("inf")
                self._changed.wait(timeout=min(5.0, self._seconds / 4))

    def _report(self) -> None:
        faulthandler.dump_traceback(file=2, all_threads=True)
        LOG.error(
            "error: %s did not end within %g s: a device, another process of the run, or a disk does not answer. The stacks of all threads "
            "are above. The same command resumes from the last checkpoint; config.data.timeout says how long to wait",
            self._what,
            self._seconds,
        )
        for handler in logging.getLogger().handlers + LOG.handlers:
            handler.flush()
        self._end(HUNG)
