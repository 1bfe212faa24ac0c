"""SIGTERM and Ctrl-C as a wish that the training loop grants at the next step, with everything saved."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

LOG = logging.getLogger("maskvit")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A second signal within this time is the first one once more: a terminal and a launcher (make, a scheduler) both pass it on.
ECHO_SECONDS = 1.0


class StopAsked(BaseException):
    """Raised where the main thread waits (`StopSignals.interruptible`). Like KeyboardInterrupt no `except Exception` catches it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def name(number: int) -> str:
    """How the signal is told to people."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class StopSignals:
    """A context manager that listens: `asked` is the number of the first signal received, 0 before.

    A second signal ends the process at once with 128 + its number, also where the main thread is inside a library and
    Python's own handlers do not run. Only the main thread can listen; entered in another one, it hears nothing.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._since = 0.0
        self._interruptible = False

    def __enter__(self) -> StopSignals:
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:
            self._ear, self._bell = os.pipe()
            os.set_blocking(self._bell, False)
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
            self._bell_before = signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, name="maskvit-signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            signal.set_wakeup_fd(self._bell_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.close(self._bell)  # ends the thread

    def _listen(self) -> None:
        """Body of a thread of its own: it hears what the main thread, busy inside a library, does not."""
        while numbers := os.read(self._ear, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._hear(number)
        os.close(self._ear)

    def _hear(self, number: int) -> None:
        if not self.asked:
            self.asked, self._since = number, time.monotonic()
            LOG.info("%s: stopping at the next step, with the state saved; once more ends at once", name(number))
        elif time.monotonic() - self._since > ECHO_SECONDS:
            os._exit(128 + number)

    def _handle(self, number: int, frame: Any) -> None:
        """Python's handler: in the main thread, between two instructions of it. The thread tells of the signal."""
        del frame
        if self._interruptible:
            self._interruptible = False
            raise StopAsked(number)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """While waiting for what can be given up: a signal raises StopAsked here, at once."""
        if self.asked:
            raise StopAsked(self.asked)
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False
