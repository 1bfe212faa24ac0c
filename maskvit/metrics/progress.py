"""The progress line of a run."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping

import jax

# ---------------------------------------------------------------------------------------------- progress


class Progress:
    """How far a run is: a bar on a terminal, a line per report otherwise; process 0 only.

    Args:
      total: steps of the run. start: the step it starts or resumes from.
      stream: where to write; standard error unless given.
    """

    def __init__(self, total: int, start: int = 0, stream: io.TextIOBase | None = None) -> None:
        self._total, self._step = total, start
        self._stream = stream if stream is not None else sys.stderr
        self._speaks = jax.process_index() == 0
        self._bar = None
        if self._speaks and self._stream.isatty():
            from tqdm import tqdm  # only where there is a terminal

            self._bar = tqdm(total=total, initial=start, file=self._stream, unit="step", dynamic_ncols=True, smoothing=0.1)

    def update(self, step: int) -> None:
        """Move the bar to `step`; without a terminal this writes nothing."""
        if self._bar is not None:
            self._bar.update(step - self._step)
        self._step = step

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Show `values` ("loss" and the figures of `Throughput.read`) at `step`; others are left to the writers."""
        self.update(step)
        parts = []
        if "loss" in values:
            parts.append(f"loss {values['loss']:.4f}")
        if "images_per_second" in values:
            parts.append(f"{values['images_per_second']:.1f} img/s")
        if "data_wait" in values:
            parts.append(f"data wait {values['data_wait']:.0%}")
        if "mfu" in values:
            parts.append(f"MFU {values['mfu']:.1%}")
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts))
        elif self._speaks:
            if values.get("steps_per_second"):
                parts.append(f"ETA {_clock_time((self._total - step) / values['steps_per_second'])}")
            print(f"step {step}/{self._total} ({step / max(self._total, 1):.0%})  " + "  ".join(parts), file=self._stream, flush=True)

    def message(self, text: str) -> None:
        """A line of its own that does not tear the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._speaks:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _clock_time(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"
