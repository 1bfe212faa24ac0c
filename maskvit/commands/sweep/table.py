"""What came of a sweep: mean, spread over seeds and difference from a baseline, as JSON, text and an HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from maskvit.commands.sweep.cells import AGAINST
from maskvit.commands.sweep.runs import write
from maskvit.commands.sweep.verdict import VERDICT_HEADER, Verdict, main_figures, overall, sentence, verdict, verdict_rows
from maskvit.plots import curves, page


class Spread(NamedTuple):
    """Mean and sample standard deviation (NaN for fewer than two) over so many seeds."""

    mean: float
    deviation: float
    seeds: int


def spread(values: Sequence[float]) -> Spread:
    """Of the finite values."""
    finite = np.array([value for value in values if math.isfinite(value)], np.float64)
    if len(finite) > 1 and np.ptp(finite) == 0:  # exactly, whatever the mean rounds to
        return Spread(float(finite[0]), 0.0, len(finite))
    deviation = float(finite.std(ddof=1)) if len(finite) > 1 else math.nan
    return Spread(float(finite.mean()) if len(finite) else math.nan, deviation, len(finite))


class Difference(NamedTuple):
    """Mean over seeds of a cell's figure less its baseline's of the same seed, and what is known of it (NaN for fewer than two pairs).

    `low`, `high`: its 95 % interval. `least`: the true difference that runs as noisy as these would tell from zero four times in five.
    """

    difference: float
    low: float
    high: float
    least: float
    pairs: int

    @property
    def told(self) -> bool | None:
        """Whether the interval leaves out zero; None where there is none."""
        return None if math.isnan(self.low) else not self.low <= 0 <= self.high


def paired(cell: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Compare {seed: figure} of two cells, seed by seed: runs of one seed share initial weights, order of data and earlier stages.

    Student's t over the differences; those that are not finite are left out.
    """
    found = [cell[seed] - baseline[seed] for seed in cell if seed in baseline and math.isfinite(cell[seed] - baseline[seed])]
    mean, deviation, pairs = spread(found)
    if pairs < 2:
        return Difference(mean, math.nan, math.nan, math.nan, pairs)
    error = deviation / math.sqrt(pairs)
    outer, inner = (float(stdtrit(pairs - 1, share)) for share in (0.975, 0.8))
    return Difference(mean, mean - outer * error, mean + outer * error, (outer + inner) * error, pairs)


def summarize(
    results: Sequence[Mapping[str, Any]], cells: Mapping[str, Mapping[str, Any]], baseline: str
) -> dict[str, dict[str, dict[str, Any]]]:
    """{metric: {cell: {"mean", "deviation", "seeds", "against", "difference", "low", "high", "least", "pairs", "told"}}}.

    Cells in the order given; "against": the cell that one is compared with, None for one that is compared with none.
    """
    metrics = dict.fromkeys(name for result in results for name in result["final"])
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for metric in metrics:
        figures: dict[str, dict[int, float]] = {cell: {} for cell in cells}
        for result in results:
            if metric in result["final"] and result["cell"] in figures:
                figures[result["cell"]][result["seed"]] = result["final"][metric]
        figures = {cell: values for cell, values in figures.items() if values}  # stages have figures of their own
        table[metric] = {}
        for cell, values in figures.items():
            against = cells[cell].get(AGAINST, baseline)
            other = figures.get(against) if against != cell else None
            found = paired(values, other or {})
            row = {**spread(list(values.values()))._asdict(), "against": against if other else None}
            table[metric][cell] = {**row, **found._asdict(), "told": found.told}
    return table


def judged(metrics: Sequence[str]) -> list[str]:
    """The metrics that cells are judged by: the evaluators', and the loss only where there are none.

    A loss is taken on the tokens a cell hides, with its weights: it does not compare cells that hide differently.
    """
    evaluated = [name for name in metrics if name != "loss" and not name.startswith("loss/")]
    return evaluated or [name for name in metrics if name == "loss"]


def power(table: Mapping[str, Mapping[str, Mapping[str, Any]]], controls: Sequence[str]) -> str:
    """Whether a control differs from what it is compared with: if none does, nothing else can be read either."""
    compared = [
        (control, metric, table[metric][control])
        for metric in judged(list(table))
        for control in controls
        if table[metric].get(control, {}).get("told") is not None
    ]
    names = " and ".join(controls)
    if not compared:
        return f"Power not known: the controls ({names}) need at least two seeds in common with what they are compared with."
    found = [f"{c} by {row['difference']:+.3g} in {m} against {row['against']}" for c, m, row in compared if row["told"]]
    if not found:
        untold = f"none of the controls ({names}) is told from what it is compared with"
        return f"No power: {untold}, so differences of other cells say nothing either."
    by_chance = 0.05 * len(compared)
    return (
        f"{len(found)} of {len(compared)} comparisons of a control leave out zero, where {by_chance:.1f} would if nothing differed: "
        f"{'; '.join(found)}."
    )


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def table_rows(cells: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """One metric's rows, as text, in the columns of `HEADER`."""
    words = {None: "-", True: "yes", False: "no"}
    rows = []
    for cell, row in cells.items():
        rows.append([cell, _number(row["mean"]), _number(row["deviation"]), str(row["seeds"])])
        if row["against"] is None:
            rows[-1] += ["-", "", "", "", ""]
        else:
            interval = f"{row['low']:+.3g} ... {row['high']:+.3g}" if math.isfinite(row["low"]) else "-"
            rows[-1] += [row["against"], _number(row["difference"]), interval, words[row["told"]], _number(row["least"])]
    return rows


HEADER = ("cell", "mean", "spread", "seeds", "compared with", "difference", "95 % interval", "differs from 0", "least that would show")


def verdicts(table: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Verdict]:
    """What the seeds show of every evaluator's main figure; of the loss where there are no evaluators."""
    names = list(table)
    some = judged(names)
    return [verdict(name, table[name], names) for name in main_figures(some) or some]


def notes(results: Sequence[Mapping[str, Any]], table: Mapping[str, Any], controls: Sequence[str]) -> list[str]:
    """What a reader must know beside the numbers."""
    said = [
        "Spread: sample standard deviation over seeds. The loss is that of the tokens a cell hides, at its own weights: cells that hide "
        "differently do not compare by it.",
        "Difference: mean over seeds of the cell less what it is compared with, run by run of the same seed, with Student's 95 % interval. "
        "A cell differs where the interval leaves out zero; of twenty pairs of equal cells one does so by chance. Least that would show: "
        "the true difference that such runs would tell from zero four times in five.",
    ]
    if controls:
        said.append(power(table, controls))
    failed = [f"{r['cell']} seed {r['seed']}" for r in results if r["failed"]]
    if failed:
        said.append(f"Lost their loss (not finite) and stopped: {', '.join(failed)}.")
    return said


def text_table(results: Sequence[Mapping[str, Any]], table: Mapping[str, Any], controls: Sequence[str] = ()) -> str:
    """The sweep as plain text, a block per metric."""
    lines = []
    for metric, cells in table.items():
        rows = [list(HEADER), *table_rows(cells)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
        lines.append(metric)
        lines += ["  " + row[0].ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True)) for row in rows]
        lines.append("")
    return "\n".join([*lines, overall(verdicts(table)), *notes(results, table, controls)]) + "\n"


def result_page(
    results: Sequence[Mapping[str, Any]], cells: Mapping[str, Mapping[str, Any]], table: Mapping[str, Any], baseline: str,
    controls: Sequence[str], command: str,
) -> str:  # fmt: skip
    """The sweep as one HTML page: what the seeds show, every run as a point, then the tables."""
    shown = [*judged(list(table)), *(["loss"] if "loss" in table and "loss" not in judged(list(table)) else [])]
    points = {
        metric: {cell: [r["final"][metric] for r in results if r["cell"] == cell and metric in r["final"]] for cell in table[metric]}
        for metric in shown
    }
    caption = "Every run as a point, the mean over its cell's seeds as a bar; the dashed line is the baseline's mean. The name over each "
    caption += "plot is the figure on its horizontal axis."
    # Figures of the same cells stand together, so that no plot has empty rows; of one cell there is nothing to compare.
    together: dict[tuple[str, ...], dict[str, Any]] = {}
    for metric, series in points.items():
        if len(series) > 1:
            together.setdefault(tuple(series), {})[metric] = series
    figures = [page.Figure(curves.points(panels, baseline), caption) for panels in together.values()]
    sections = [page.Section("At a glance", figures)] if figures else []
    found, names = verdicts(table), list(table)
    rows = [page.Table(VERDICT_HEADER, verdict_rows(found))] if len(found) > 1 else []
    sections[0:0] = [page.Section("What came of it", [*rows, *(page.Prose(note) for note in notes(results, table, ()))])]
    for metric, some in table.items():
        sections.append(
            page.Section(metric, [page.Prose(sentence(verdict(metric, some, names))), page.Table(HEADER, table_rows(some))])
        )
    changes = [
        (name, ", ".join(f"{key} = {value}" for key, value in cell.items()) or "the config as it is") for name, cell in cells.items()
    ]
    sections += [page.Section("Cells", [page.Table(("cell", "changes"), changes), page.Commands(command)])]
    said_first = [overall(found), *([power(table, controls)] if controls else [])]
    return page.html_page("Sweep", sections, " ".join([*said_first, f"{len(results)} runs of {len(cells)} cells; baseline: {baseline}."]))


def write_tables(
    out: Path, results: Sequence[Mapping[str, Any]], cells: Mapping[str, Mapping[str, Any]], baseline: str, controls: Sequence[str],
    command: str,
) -> str:  # fmt: skip
    """Write sweep.json, sweep.txt and sweep.html of what is finished; returns the text."""
    table = summarize(results, cells, baseline)
    runs = [{key: result[key] for key in ("cell", "seed", "seconds", "failed", "final")} for result in results]
    record = dict(command=command, baseline=baseline, controls=list(controls), cells=cells, runs=runs, metrics=table)
    text = text_table(results, table, controls)
    write(out / "sweep.json", json.dumps(_finite(record), indent=1, allow_nan=False))
    write(out / "sweep.txt", text)
    write(out / "sweep.html", result_page(results, cells, table, baseline, controls, command))
    return text


def _finite(tree: Any) -> Any:
    """Numbers that are not finite to None, as JSON has none."""
    if isinstance(tree, Mapping):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
