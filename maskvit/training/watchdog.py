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
        self._look = min(5.0, seconds / 4)
        self._changed = threading.Condition()
        self._what, self._left = "", float("inf")
        self._closed = False
        threading.Thread(target=self._watch, name="maskvit-watchdog", daemon=True).start()

    @contextlib.contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Around what may hang; `what` names it."""
        self._set(what, self._seconds + self._look)
        try:
            yield
        finally:
            self._set("", float("inf"))

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _set(self, what: str, seconds: float) -> None:
        # No notification: the thread looks often enough by itself, and a step should not wake it.
        with self._changed:
            self._what, self._left = what, seconds

    def _watch(self) -> None:
        with self._changed:
            before = time.monotonic()
            while not self._closed:
                self._changed.wait(timeout=self._look)
                now = time.monotonic()
                # A process that was suspended slept with all it waited for: no look counts for much more than it should take.
                self._left -= min(now - before, 2 * self._look)
                before = now
                if self._left <= 0:
                    self._report()
                    self._left = float("inf")

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
