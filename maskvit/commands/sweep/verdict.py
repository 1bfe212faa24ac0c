"""What a comparison of cells shows, in sentences: which are better, which worse, and for which the seeds show no difference."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from maskvit.evaluators.features import BASELINES
from maskvit.metrics.directions import better

NAMED = 4  # cells that a sentence names
FEW = 3  # comparisons that the sentence on all figures names
Row = Mapping[str, Any]


class Verdict(NamedTuple):
    """Cells by what their seeds show of one figure, each with its mean difference from what it is compared with.

    `above`, `below`: what a positive and a negative difference is called. A cell is in `up` or `down` where the 95 % interval of its
    difference leaves out zero, in `same` where it does not, and in `unknown` where there is no interval.
    """

    figure: str
    above: str
    below: str
    up: dict[str, float]
    down: dict[str, float]
    same: dict[str, float]
    unknown: dict[str, float]
    against: tuple[str, ...]

    @property
    def compared(self) -> int:
        """How many cells are compared with another."""
        return len(self.up) + len(self.down) + len(self.same) + len(self.unknown)


def main_figures(names: Sequence[str]) -> list[str]:
    """Of every evaluator the first figure, of those that say whether more is better and that come from the model; `names` in order."""
    found: dict[str, str] = {}
    for name in names:
        if better(name, names) and not set(name.split("/")) & set(BASELINES):
            found.setdefault(name.split("/")[0], name)
    return list(found.values())


def verdict(figure: str, cells: Mapping[str, Row], names: Collection[str] = ()) -> Verdict:
    """`cells`: the rows of one figure as `table.summarize` gives them; `names`: all figures."""
    direction = None if figure.split("/")[0] == "loss" else better(figure, names)
    above, below = {"higher": ("better", "worse"), "lower": ("worse", "better"), None: ("higher", "lower")}[direction]
    groups: dict[str, dict[str, float]] = {"up": {}, "down": {}, "same": {}, "unknown": {}}
    against: dict[str, None] = {}
    for cell, row in cells.items():
        if row["against"] is None:
            continue
        against[row["against"]] = None
        if row["told"] is None:
            unpaired = row["mean"] - cells[row["against"]]["mean"]
            groups["unknown"][cell] = row["difference"] if math.isfinite(row["difference"]) else unpaired
        else:
            groups["same" if not row["told"] else "up" if row["difference"] > 0 else "down"][cell] = row["difference"]
    return Verdict(figure, above, below, **groups, against=tuple(against))


def sentence(found: Verdict, noun: str = "cell") -> str:
    """What one figure shows, with the differences of those that differ; `noun`: what is compared."""
    other = found.against[0] if len(found.against) == 1 else "their baselines"
    if not found.compared:
        return f"{found.figure}: nothing is compared."
    if len(found.unknown) == found.compared:
        return (
            f"In {found.figure}, differences from {other}: {_named(found.unknown)}. With fewer than two seeds in common nobody can say "
            "whether they are chance."
        )
    if not (found.up or found.down):
        text = f"In {found.figure} the seeds show no difference from {other}: {_named(found.same)}"
    else:
        words = sorted(((found.above, found.up), (found.below, found.down)), key=lambda pair: pair[0])
        parts = [f"{_are(len(cells))} {word} ({_named(cells)})" for word, cells in words if cells]
        some = f"{found.compared} {noun}{'s' if found.compared > 1 else ''}"
        text = f"Of {some} compared with {other}, {' and '.join(parts)} in {found.figure}"
        text += f"; for {len(found.same)} the seeds show no difference" if found.same else ""
    if found.unknown:
        text += f"; {len(found.unknown)} cannot be judged by fewer than two seeds ({_named(found.unknown)})"
    return text + "."


def overall(verdicts: Sequence[Verdict], noun: str = "cell") -> str:
    """All figures in one sentence."""
    verdicts = [one for one in verdicts if one.compared]
    if not verdicts:
        return f"Nothing can be compared: no second {noun} has the same figures."
    if len(verdicts) == 1:
        return sentence(verdicts[0], noun)
    judged = [one for one in verdicts if len(one.unknown) < one.compared]
    if not judged:
        return f"No {noun} can be judged: with fewer than two seeds in common with a baseline, nobody knows what is chance."
    groups: dict[str, list[str]] = {}
    for one in judged:
        for word, some in ((one.above, one.up), (one.below, one.down)):
            groups.setdefault(word, []).extend(f"{cell} {some[cell]:+.3g} in {one.figure}" for cell in some)
    same, total = sum(len(one.same) for one in judged), sum(one.compared - len(one.unknown) for one in judged)
    baselines = {other for one in judged for other in one.against}
    told = []
    for word, names in sorted(groups.items()):
        named = f" ({', '.join(names)})" if len(names) <= FEW else ""
        told += [f"{_are(len(names))} {word}{named}"] if names else []
    return (
        f"Of {total} comparisons with {baselines.pop() if len(baselines) == 1 else 'a baseline'} in {len(judged)} figures, "
        + (" and ".join(told) + (f"; for {same} the seeds show no difference" if same else "") if told else "none shows a difference")
        + f". If nothing differed, about {0.05 * total:.1g} of them would still seem to by chance."
    )


def verdict_rows(verdicts: Sequence[Verdict]) -> list[tuple[str, str, str, str, str]]:
    """A row per figure, in the columns of `VERDICT_HEADER`."""
    rows = []
    for one in verdicts:
        good, bad = (one.down, one.up) if one.below == "better" else (one.up, one.down)
        cells = (_named(good, None), _named(bad, None), str(len(one.same)), ", ".join(one.unknown) or "-")
        rows.append((one.figure, *cells))
    return rows


VERDICT_HEADER = ("figure", "better", "worse", "no difference shown", "too few seeds")


def _are(count: int) -> str:
    return f"{count} {'is' if count == 1 else 'are'}"


def _named(cells: Mapping[str, float], most: int | None = NAMED) -> str:
    """Names with their differences, the largest first; of many the first few."""
    order = sorted(cells, key=lambda cell: -abs(cells[cell]) if math.isfinite(cells[cell]) else math.inf)
    shown = ", ".join(f"{cell} {cells[cell]:+.3g}" if math.isfinite(cells[cell]) else f"{cell} not finite" for cell in order[:most])
    left = len(order) - len(order[:most])
    return (shown or "-") + (f" and {left} more" if left else "")
