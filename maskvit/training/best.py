"""The best checkpoint by a named figure: which it is, when to stop looking for a better one, and when training does harm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

MODES = ("max", "min")
KEPT = ("value", "step", "first", "since")  # of `Best`, in a checkpoint's metadata


class FigureFell(RuntimeError):
    """A figure is worse than at the start by more than the margin: training takes away what the model could do."""


def best_block(*, figure: str, mode: str = "max", patience: int = 0, margin: float | int | None = None) -> dict[str, Any]:
    """`config.best`.

    Args:
      figure: "EVALUATOR/figure", as metrics.jsonl names it: "accuracy/top1". Its best checkpoint stays beside the newest ones.
      mode: whether the highest value is the best, "max", or the lowest, "min".
      patience: evaluations without a better value after which the run ends; 0: it goes on to its end.
      margin: the figure is also taken at step 0, and a run ends where it falls by more than this below that value. For continuing
        the pretraining of weights that are good already, on labels of one's own.
    """
    if mode not in MODES:
        raise ValueError(f"config.best.mode is {mode!r}; known: {', '.join(MODES)}")
    if patience < 0:
        raise ValueError(f"config.best.patience is {patience}; it must be at least 0")
    if margin is not None and not margin > 0:
        raise ValueError(f"config.best.margin is {margin}; it must be above 0, or None for no limit")
    return dict(figure=figure, mode=mode, patience=patience, margin=margin)


def check_figure(figure: str, evaluators: Mapping[str, Any]) -> None:
    """Raise ValueError unless one of the evaluators gives a figure of that name."""
    name, _, rest = figure.partition("/")
    if name not in evaluators:
        known = ", ".join(evaluators) or "none"
        raise ValueError(f"config.best.figure is {figure!r}; it must begin with an evaluator of config.evaluators: {known}")
    names = getattr(evaluators[name], "names", None)
    if names is not None and rest not in names:
        raise ValueError(f"config.best.figure is {figure!r}; the evaluator {name!r} gives {', '.join(f'{name}/{one}' for one in names)}")


@dataclass
class Best:
    """The best value so far of `figure`, and at which step; the settings are those of `best_block`.

    `first`: the value at the first evaluation; `since`: evaluations since the best one.
    """

    figure: str = ""
    mode: str = "max"
    patience: int = 0
    margin: float | None = None
    value: float | None = None
    step: int | None = None
    first: float | None = None
    since: int = 0

    @classmethod
    def resumed(cls, settings: Mapping[str, Any], saved: Mapping[str, Any] | None) -> Best:
        """As it was when a checkpoint was saved; the settings may have changed since."""
        best = cls(**settings)
        for key in KEPT:
            setattr(best, key, (saved or {}).get(key, getattr(best, key)))
        return best

    @property
    def evaluator(self) -> str:
        """The evaluator that gives the figure; "" where there is none."""
        return self.figure.partition("/")[0]

    @property
    def exhausted(self) -> bool:
        """Whether there was no better value for as many evaluations as `patience` says."""
        return self.patience > 0 and self.since >= self.patience

    def as_json(self) -> dict[str, Any]:
        """For the metadata of a checkpoint."""
        return {key: value for key, value in asdict(self).items() if key in KEPT}

    def observe(self, step: int, figures: Mapping[str, float]) -> bool:
        """Take note of the figures of `step`; whether they are the best so far.

        Raises ValueError where the figure is not among them, FigureFell where it fell by more than the margin.
        """
        if self.figure not in figures:
            raise ValueError(f"config.best.figure is {self.figure!r}; the evaluator gave {', '.join(figures)}")
        value = figures[self.figure]
        sign = 1 if self.mode == "max" else -1
        if not math.isfinite(value):
            self.since += 1
            return False
        self.first = value if self.first is None else self.first
        better = self.value is None or sign * value > sign * self.value
        if better:
            self.value, self.step, self.since = value, step, 0
        else:
            self.since += 1
        if self.margin is not None and sign * (self.first - value) > self.margin:
            raise FigureFell(
                f"stopped at step {step}: {self.figure} is {value:.2f}, {abs(self.first - value):.2f} worse than the {self.first:.2f} it "
                f"began with, and config.best.margin is {self.margin:g}. The best checkpoint is that of step {self.step} ({self.value:.2f})"
            )
        return better
