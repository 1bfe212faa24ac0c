"""Durations as people write them ("100 epochs", "1M examples", "5%", "20") to training steps, and when something is due."""

from __future__ import annotations

import re
from fractions import Fraction

FORMS = '"2000 steps", "1.5 epochs", "1M examples" (also K and B), "5 percent" or "5%", or a number of steps alone'

_DURATION = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?|\.\d+)\s*([kKmMbB])?\s*(%|[a-zA-Z]+)\s*")
_STEPS = re.compile(r"\s*(\d+(?:_\d+)*)\s*", re.ASCII)  # what a whole number becomes on a command line
_UNITS = {
    "step": "steps",
    "steps": "steps",
    "epoch": "epochs",
    "epochs": "epochs",
    "example": "examples",
    "examples": "examples",
    "percent": "percent",
    "%": "percent",
}
_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def to_steps(duration: object, *, steps_per_epoch: int, global_batch: int, total_steps: int | None = None) -> int:
    """The number of optimizer steps that `duration` means, rounded to the nearest, at least 1 unless it is zero.

    Args:
      duration: one of `FORMS`.
      steps_per_epoch: steps that show every training example once.
      global_batch: examples per step over all devices.
      total_steps: length of the run, what a percentage refers to; None where there is none yet.

    Raises ValueError naming the value and the known forms.
    """
    if isinstance(duration, bool) or not isinstance(duration, (int, str)):
        raise ValueError(f"{duration!r} is no duration; write {FORMS}")
    if isinstance(duration, int):
        if duration < 0:
            raise ValueError(f"a duration of {duration} steps is negative; write {FORMS}")
        return duration
    if _STEPS.fullmatch(duration):
        return int(duration)
    match = _DURATION.fullmatch(duration)
    unit = _UNITS.get(match[3].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{duration!r} is no duration; write {FORMS}")
    # Exact arithmetic: 1.1 epochs of 10 steps are 11 steps, whatever floating point thinks.
    amount = Fraction(match[1].replace("_", "")) * _MULTIPLES[(match[2] or "").lower()]
    if unit == "percent" and total_steps is None:
        raise ValueError(f"{duration!r} is a share of the whole run, but it is what the run's length is made of; write it in another unit")
    if unit == "percent" and amount > 100:
        raise ValueError(f"{duration!r} is more than the whole run")
    per_unit = {
        "steps": Fraction(1),
        "epochs": Fraction(steps_per_epoch),
        "examples": Fraction(1, global_batch),
        "percent": Fraction(total_steps or 0, 100),
    }[unit]
    steps = amount * per_unit
    return max(1, int(steps + Fraction(1, 2))) if steps > 0 else 0


def is_time(step: int, every: int, total: int, *, first: bool = False, last: bool = True) -> bool:
    """Whether something done every `every` steps is due after `step` completed steps of `total`.

    `every` = 0 means never, `first` adds step 0 and `last` the end of the run (both only where `every` > 0).
    """
    if every <= 0:
        return False
    if step == 0:
        return first or (last and total == 0)
    return step % every == 0 or (last and step == total)
