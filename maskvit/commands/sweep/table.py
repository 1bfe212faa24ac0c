"""What came of a sweep: mean, spread over seeds and difference from a baseline, as JSON, text and an HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskvit.commands.sweep.runs import write
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
    """Mean less the baseline's mean, the pooled standard deviation, and whether the former exceeds the latter (None: unknown)."""

    value: float
    pooled: float
    beyond: bool | None


def difference(cell: Spread, baseline: Spread) -> Difference:
    """Compare two cells; the pooled deviation weighs each variance by its degrees of freedom."""
    freedom = [max(s.seeds - 1, 0) for s in (cell, baseline)]
    value = cell.mean - baseline.mean
    if not sum(freedom):
        return Difference(value, math.nan, None)
    variance = sum(n * s.deviation**2 for n, s in zip(freedom, (cell, baseline), strict=True) if n) / sum(freedom)
    return Difference(value, math.sqrt(variance), abs(value) > math.sqrt(variance) if math.isfinite(value) else None)


def chance_beyond(first: int, second: int) -> float:
    """How often two cells of so many seeds that do not differ at all lie further apart than their pooled deviation.

    The two-sided tail of Student's t at 1 / sqrt(1/first + 1/second); normal errors of equal size assumed.
    """
    freedom = first + second - 2
    if freedom < 1 or min(first, second) < 1:
        return math.nan
    limit = 1 / math.sqrt(1 / first + 1 / second)
    t = np.linspace(0, limit, 2001)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    return float(1 - 2 * np.trapezoid(scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2), t))


def summarize(results: Sequence[Mapping[str, Any]], cells: Sequence[str], baseline: str) -> dict[str, dict[str, dict[str, Any]]]:
    """{metric: {cell: {"mean", "deviation", "seeds", "difference", "pooled", "beyond"}}}, cells in the order given."""
    metrics = dict.fromkeys(name for result in results for name in result["final"])
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for metric in metrics:
        spreads = {
            cell: spread([r["final"][metric] for r in results if r["cell"] == cell and metric in r["final"]])
            for cell in cells
            if any(r["cell"] == cell and metric in r["final"] for r in results)  # stages have figures of their own
        }
        table[metric] = {}
        for cell, here in spreads.items():
            against = Difference(math.nan, math.nan, None)
            if cell != baseline and baseline in spreads:
                against = difference(here, spreads[baseline])
            table[metric][cell] = {**here._asdict(), "difference": against.value, "pooled": against.pooled, "beyond": against.beyond}
    return table


def judged(metrics: Sequence[str]) -> list[str]:
    """The metrics that cells are judged by: the evaluators', and the loss only where there are none.

    A loss is taken on the tokens a cell hides, with its weights: it does not compare cells that hide differently.
    """
    evaluated = [name for name in metrics if name != "loss" and not name.startswith("loss/")]
    return evaluated or [name for name in metrics if name == "loss"]


def power(table: Mapping[str, Mapping[str, Mapping[str, Any]]], controls: Sequence[str], baseline: str) -> str:
    """Whether a control differs from the baseline by more than the spread: if none does, nothing else can be read either."""
    compared = [
        (control, metric, table[metric][control], table[metric][baseline])
        for metric in judged(list(table))
        for control in controls
        if table[metric].get(control, {}).get("beyond") is not None
    ]
    names = " and ".join(controls)
    if not compared:
        return f"Power not known: the controls ({names}) and {baseline} need at least two seeds each."
    found = [f"{c} by {row['difference']:+.3g} in {m} (spread {row['pooled']:.3g})" for c, m, row, _ in compared if row["beyond"]]
    if not found:
        return (
            f"No power: none of the controls ({names}) differs from {baseline} by more than the spread over seeds, so differences between "
            "the other cells say nothing either."
        )
    by_chance = sum(chance_beyond(row["seeds"], base["seeds"]) for *_, row, base in compared)
    return (
        f"{len(found)} of {len(compared)} comparisons of a control with {baseline} exceed the spread over seeds, where {by_chance:.1f} "
        f"would if nothing differed: {'; '.join(found)}."
    )


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def table_rows(cells: Mapping[str, Mapping[str, Any]], baseline: str) -> list[list[str]]:
    """One metric's rows, as text: cell, mean, spread, seeds, difference from the baseline, pooled spread, beyond it."""
    words = {None: "-", True: "yes", False: "no"}
    rows = []
    for cell, row in cells.items():
        against = ["baseline", "", ""] if cell == baseline else [_number(row["difference"]), _number(row["pooled"]), words[row["beyond"]]]
        rows.append([cell, _number(row["mean"]), _number(row["deviation"]), str(row["seeds"]), *against])
    return rows


HEADER = ("cell", "mean", "spread", "seeds", "difference", "pooled spread", "beyond it")


def notes(results: Sequence[Mapping[str, Any]], table: Mapping[str, Any], baseline: str, controls: Sequence[str]) -> list[str]:
    """What a reader must know beside the numbers."""
    said = ["Spread: sample standard deviation over seeds. The loss is that of the tokens a cell hides, at its own weights."]
    counts = [row["seeds"] for metric in table.values() for row in metric.values()]
    share = chance_beyond(max(counts), max(counts)) if counts else math.nan
    if math.isfinite(share):
        said.append(f"Two equal cells of {max(counts)} seeds each lie further apart than their pooled spread in {share:.0%} of all cases.")
    if controls:
        said.append(power(table, controls, baseline))
    failed = [f"{r['cell']} seed {r['seed']}" for r in results if r["failed"]]
    if failed:
        said.append(f"Lost their loss (not finite) and stopped: {', '.join(failed)}.")
    return said


def text_table(results: Sequence[Mapping[str, Any]], table: Mapping[str, Any], baseline: str, controls: Sequence[str] = ()) -> str:
    """The sweep as plain text, a block per metric."""
    lines = []
    for metric, cells in table.items():
        rows = [list(HEADER), *table_rows(cells, baseline)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
        lines.append(metric)
        lines += ["  " + row[0].ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True)) for row in rows]
        lines.append("")
    return "\n".join(lines + notes(results, table, baseline, controls)) + "\n"


def result_page(
    results: Sequence[Mapping[str, Any]], cells: Mapping[str, Mapping[str, Any]], table: Mapping[str, Any], baseline: str,
    controls: Sequence[str], command: str,
) -> str:  # fmt: skip
    """The sweep as one HTML page: every run as a point, then the tables."""
    shown = [*judged(list(table)), *(["loss"] if "loss" in table and "loss" not in judged(list(table)) else [])]
    points = {
        metric: {cell: [r["final"][metric] for r in results if r["cell"] == cell and metric in r["final"]] for cell in table[metric]}
        for metric in shown
    }
    caption = "Every run as a point, the mean over its cell's seeds as a bar; the dashed line is the baseline's mean."
    sections = [page.Section("At a glance", [page.Figure(curves.points(points, baseline), caption)])] if points else []
    sections[0:0] = [page.Section("What to make of it", [page.Prose(note) for note in notes(results, table, baseline, controls)])]
    sections += [page.Section(metric, [page.Table(HEADER, table_rows(table[metric], baseline))]) for metric in table]
    changes = [
        (name, ", ".join(f"{key} = {value}" for key, value in cell.items()) or "the config as it is") for name, cell in cells.items()
    ]
    sections += [page.Section("Cells", [page.Table(("cell", "changes"), changes), page.Commands(command)])]
    return page.html_page("Sweep", sections, f"{len(results)} runs of {len(cells)} cells; baseline: {baseline}.")


def write_tables(
    out: Path, results: Sequence[Mapping[str, Any]], cells: Mapping[str, Mapping[str, Any]], baseline: str, controls: Sequence[str],
    command: str,
) -> str:  # fmt: skip
    """Write sweep.json, sweep.txt and sweep.html of what is finished; returns the text."""
    table = summarize(results, list(cells), baseline)
    runs = [{key: result[key] for key in ("cell", "seed", "seconds", "failed", "final")} for result in results]
    record = dict(command=command, baseline=baseline, controls=list(controls), cells=cells, runs=runs, metrics=table)
    text = text_table(results, table, baseline, controls)
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
