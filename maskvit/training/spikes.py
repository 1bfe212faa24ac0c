"""Is the run still healthy? Losses that jump, updates that are skipped in a row, parameters that explode; and when to go back.

The rule for going back is PaLM's (Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, section 5.1): return
to a checkpoint from before the trouble, and do not use again the batches that came since.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from maskvit.core.configuration import look_up

HISTORY = 50  # losses seen before the first can be called a spike
MEMORY = 100  # steps over which mean and variance of the loss are taken
FLOOR = 0.01  # the least deviation, as a share of the mean: a loss that hardly moves has no spikes of 0.1 %
GROWTH = 100.0  # parameters whose norm is this many times its mean of late have exploded

ON_SPIKE = {
    "none": "only tell",
    "skip": "leave out the update of a batch whose loss is above the limit",
    "rollback": "go back to the last healthy checkpoint",
}


def guard_block(
    *, max_skipped: int = 10, sigmas: float = 10.0, on_spike: str = "none", replicas_every: str | int = "1000 steps"
) -> dict[str, Any]:
    """`config.guard`.

    Args:
      max_skipped: updates skipped in a row (loss or gradient not finite) after which the run goes back to its last healthy checkpoint.
      sigmas: by how many standard deviations above the mean of the last 100 steps or so a loss is a spike.
      on_spike: one of `ON_SPIKE`.
      replicas_every: how often the copies of the parameters on all devices are compared, a duration; 0 for never.
    """
    look_up("config.guard.on_spike", ON_SPIKE, on_spike)
    if max_skipped < 1:
        raise ValueError(f"config.guard.max_skipped is {max_skipped}; it must be at least 1")
    if not sigmas > 0:
        raise ValueError(f"config.guard.sigmas is {sigmas}; it must be above 0")
    return dict(max_skipped=max_skipped, sigmas=float(sigmas), on_spike=on_spike, replicas_every=replicas_every)


@dataclass
class Seen:
    """What a step told: `norm` is that of the parameters it left."""

    step: int
    loss: float
    skipped: bool
    norm: float


@dataclass
class Guard:
    """Judges one step after the other; plain data, saved with every checkpoint, so that a resumed run judges alike.

    `observe` may come whenever a step's results are known; only `judge` decides, and for the same steps at the same time
    whenever anything else looks.
    """

    max_skipped: int
    sigmas: float
    on_spike: str
    count: int = 0  # losses behind mean and variance
    mean: float = 0.0
    variance: float = 0.0
    in_a_row: int = 0  # skipped updates up to the last step judged
    trouble: str = ""  # why the last step judged was not healthy
    norm: float = 0.0  # mean of the parameters' norm
    returned_to: int = -1  # the checkpoint that was gone back to last
    pending: list[Seen] = field(default_factory=list)

    @classmethod
    def resumed(cls, block: Mapping[str, Any], saved: Mapping[str, Any] | None) -> Guard:
        """With the settings of `block`, and what a checkpoint says of the rest."""
        kept = {name: value for name, value in (saved or {}).items() if name not in block}
        pending = [Seen(step, float(loss), skipped, float(norm)) for step, loss, skipped, norm in kept.pop("pending", ())]
        return cls(**block, **kept, pending=pending)

    def as_json(self) -> dict[str, Any]:
        """For the checkpoint's metadata: JSON, which has no NaN."""
        return asdict(self) | dict(pending=[[seen.step, repr(seen.loss), seen.skipped, repr(seen.norm)] for seen in self.pending])

    def observe(self, step: int, loss: float, skipped: bool, norm: float) -> None:
        """Note the results of `step`."""
        self.pending.append(Seen(step, loss, skipped, norm))

    def limit(self) -> float:
        """The largest loss that is no spike."""
        if self.count < HISTORY:
            return math.inf
        deviation = max(math.sqrt(self.variance), FLOOR * abs(self.mean), 1e-12)
        return float(np.float32(self.mean + self.sigmas * deviation))  # as the devices compare it

    def judge(self, before: int) -> list[str]:
        """Judge the steps below `before` that were not judged yet; a line per step that newly is in trouble."""
        lines = []
        while self.pending and self.pending[0].step < before:
            seen, earlier = self.pending.pop(0), self.trouble
            self.trouble = self._trouble(seen)
            self.in_a_row = self.in_a_row + 1 if seen.skipped else 0
            if self.trouble and self.trouble.split(":")[0] != earlier.split(":")[0]:
                lines.append(f"step {seen.step}: {self.trouble}")
        return lines

    def _trouble(self, seen: Seen) -> str:
        if not math.isfinite(seen.loss) or (seen.skipped and seen.loss <= self.limit()):
            return "update skipped: its loss or gradient was not finite"
        if not seen.norm <= (GROWTH * self.norm if self.count else math.inf) or math.isinf(seen.norm):
            return f"the parameters explode: their norm is {seen.norm:.3g}, and was {self.norm:.3g}"
        limit = self.limit()
        if seen.loss > limit:
            sigmas = self.sigmas * (seen.loss - self.mean) / (limit - self.mean)
            skipped = ", update skipped" if seen.skipped else ""
            return f"the loss jumps: {seen.loss:.4g} is {sigmas:.0f} deviations above its mean of {self.mean:.4g}{skipped}"
        self.count += 1
        share = max(1 / self.count, 1 / MEMORY)
        change = seen.loss - self.mean
        self.mean += share * change
        self.variance = (1 - share) * (self.variance + share * change * change)
        self.norm += share * (seen.norm - self.norm)
        return ""

    def must_go_back(self) -> bool:
        """Whether what was judged asks for the last healthy checkpoint."""
        jumped = self.on_spike == "rollback" and bool(self.trouble) and not self.trouble.startswith("update skipped")
        return self.in_a_row >= self.max_skipped or jumped

    def went_back(self, to: int) -> None:
        """Start anew from checkpoint `to`."""
        self.in_a_row, self.trouble, self.returned_to, self.pending = 0, "", to, []

    def healthy(self) -> bool:
        """Whether the state after the last step observed is one to return to: no trouble now, and none that will turn the run back."""
        ahead = copy.deepcopy(self)
        if ahead.must_go_back():
            return False
        for seen in self.pending:
            ahead.judge(before=seen.step + 1)
            if ahead.must_go_back():
                return False
        return not ahead.trouble
