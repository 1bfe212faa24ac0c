"""`--profile=START:STOP`: which steps JAX's profiler traces."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import jax

LOG = logging.getLogger("maskvit")


def parse_window(profile: str | None) -> tuple[int, int] | None:
    """ "START:STOP" to (start, stop), None for none. Raises ValueError for anything else."""
    if not profile:
        return None
    start, colon, stop = profile.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise ValueError(f"--profile is {profile!r}; expected START:STOP in steps, START below STOP, for example 10:20")
    return int(start), int(stop)


class Profiler:
    """Traces the steps start ... stop - 1 into `directory`; those of them that this process runs, where it resumes or ends inside.

    Args:
      idle: waits until the devices have finished, so that a trace holds whole steps.
    """

    def __init__(self, window: tuple[int, int] | None, directory: Path, idle: Callable[[], object]) -> None:
        self._window, self._directory, self._idle = window, directory, idle
        self._traces = False

    def before(self, step: int) -> None:
        """Call before every step."""
        if self._window is None:
            return
        start, stop = self._window
        if self._traces and step >= stop:
            self.close()
        elif not self._traces and start <= step < stop:
            self._idle()
            jax.profiler.start_trace(str(self._directory))
            self._traces = True
        elif step >= stop:
            LOG.warning("--profile=%d:%d: these steps lie before step %d, at which this run starts: nothing is traced", start, stop, step)
            self._window = None

    def close(self) -> None:
        """End the trace, if there is one."""
        if self._traces:
            self._traces, self._window = False, None
            self._idle()
            jax.profiler.stop_trace()
            LOG.info("trace written to %s", self._directory)
