"""Runs side by side as one HTML page: learning rate, losses, evaluators over epochs, epochs to reach the baseline, a table with spread.

A run is a workdir. A folder of a sweep stands for all its runs, the folder of one of its cells for the runs of that cell; runs
whose folders are called CELL/seed_N are seeds of one cell.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskvit.commands.report.files import write
from maskvit.commands.sweep.runs import read_metrics
from maskvit.commands.sweep.table import spread
from maskvit.core.arguments import check_output
from maskvit.plots import curves, page

SEED = re.compile(r"seed_\d+")


class Curve(NamedTuple):
    """One scalar of one run: epochs, and the values there."""

    epochs: list[float]
    values: list[float]


class Run(NamedTuple):
    """A run's curves by the name of the scalar."""

    folder: Path
    curves: dict[str, Curve]


def find_runs(places: Sequence[Path]) -> dict[str, list[Path]]:
    """Workdirs by cell, in the order given: a run that is no seed of a sweep is a cell of its own.

    Raises FileNotFoundError for a place without a run, ValueError where two different cells have one name.
    """
    found: dict[str, list[Path]] = {}
    homes: dict[str, Path] = {}
    for place in places:
        if (place / "metrics.jsonl").is_file():
            folders = [place]
        else:
            folders = sorted(p.parent for depth in ("*", "*/*") for p in place.glob(f"{depth}/metrics.jsonl"))
        if not folders:
            raise FileNotFoundError(f"{place} holds no run: there is no metrics.jsonl in it, nor in folders below it")
        for folder in (path.resolve() for path in folders):
            home = folder.parent if SEED.fullmatch(folder.name) else folder
            if homes.setdefault(home.name, home) != home:
                raise ValueError(f"{homes[home.name]} and {home} have the same name: give them different ones, or compare one at a time")
            if folder not in found.setdefault(home.name, []):
                found[home.name].append(folder)
    return found


def read_run(folder: Path) -> Run:
    """A run's scalars over epochs; one of no steps ("0 steps": evaluation alone) has the epoch 0.

    Raises ValueError where the run has logged nothing yet, or steps without their epoch.
    """
    rows = read_metrics(folder)
    per_step = next((row["epoch"] / row["step"] for row in rows if row.get("epoch") and row["step"]), None)
    if rows and not any(row["step"] for row in rows):
        per_step = 0.0
    if per_step is None:
        raise ValueError(f"{folder / 'metrics.jsonl'} has no training step with its epoch yet")
    curves: dict[str, Curve] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "epoch"):
                curve = curves.setdefault(name, Curve([], []))
                curve.epochs.append(round(row["step"] * per_step, 6))
                curve.values.append(value)
    return Run(folder, curves)


def accuracies(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """The evaluators' scalars, all but "loss/..." with a slash in their name, of any run."""
    names = dict.fromkeys(name for cell in runs.values() for run in cell for name in run.curves)
    return [name for name in names if "/" in name and not name.startswith("loss/")]


def epochs_to(curve: Curve, level: float, rising: bool) -> float:
    """The first epoch at which a curve is at `level` or beyond; infinite where it never is. Values before training count too."""
    for epoch, value in zip(curve.epochs, curve.values, strict=True):
        if value >= level if rising else value <= level:
            return epoch
    return math.inf


def final(cell: Sequence[Run], name: str) -> list[float]:
    """The last value of a scalar of every run that has it."""
    return [run.curves[name].values[-1] for run in cell if name in run.curves]


def _with_spread(values: Sequence[float], runs: int) -> str:
    """Mean and spread, with the number of values where it is not that of the runs."""
    mean, deviation, count = spread(values)
    if not count:
        return "-"
    return f"{mean:.4g}" + (f"\u00a0±\u00a0{deviation:.2g}" if count > 1 else "") + (f" (n={count})" if count != runs else "")


def _epochs(values: Sequence[float]) -> str:
    reached = [value for value in values if math.isfinite(value)]
    if not values:
        return "-"
    if not reached:
        return "never"
    return _with_spread(reached, len(reached)) + (f", never in {len(values) - len(reached)}" if len(reached) < len(values) else "")


def compare_page(runs: Mapping[str, Sequence[Run]], baseline: str) -> str:
    """The page. `baseline`: the cell whose mean final values the others are to reach."""
    measured = accuracies(runs)
    losses = ["loss", *sorted({n for cell in runs.values() for run in cell for n in run.curves if n.startswith("loss/")})]

    def panels(names: Sequence[str]) -> dict[str, dict[str, list[Curve]]]:
        chosen = {n: {cell: [r.curves[n] for r in some if n in r.curves] for cell, some in runs.items()} for n in names}
        return {name: {cell: curves for cell, curves in panel.items() if curves} for name, panel in chosen.items()}

    targets = {name: (spread(final(runs[baseline], name)).mean, name != "loss") for name in (*measured, "loss")}
    targets = {name: target for name, target in targets.items() if math.isfinite(target[0])}
    reach = [
        [cell, *(_epochs([epochs_to(r.curves[n], *target) for r in some if n in r.curves]) for n, target in targets.items())]
        for cell, some in runs.items()
    ]
    last = [[cell, str(len(some)), *(_with_spread(final(some, n), len(some)) for n in (*measured, *losses))] for cell, some in runs.items()]
    learning = panels(["learning_rate"])["learning_rate"]
    sections = [
        page.Section(
            "Final values",
            [
                page.Table(("run", "runs", *measured, *losses), last),
                page.Prose(
                    "Mean ± sample standard deviation over the seeds of a cell. A loss is that of the tokens a run hides, at its weights."
                ),
            ],
        ),
        page.Section(
            f"Epochs to reach what {baseline} ends with",
            [
                page.Table(("run", *(f"{name} {level:.4g}" for name, (level, _) in targets.items())), reach),
                page.Prose("The first evaluation (or logged loss) at which the value is reached; no finer than how often it is taken."),
            ],
        ),
    ]
    if measured:
        sections.append(page.Section("Evaluators over epochs", [_plot(panels(measured), "Evaluators over epochs")]))
    sections.append(page.Section("Losses", [_plot(panels(losses), "The loss and its parts over epochs")]))
    if learning:
        sections.append(page.Section("Learning rate", [_plot({"learning_rate": learning}, "The learning rate over epochs")]))
    folders = [(cell, str(run.folder)) for cell, some in runs.items() for run in some]
    sections.append(page.Section("Runs", [page.Table(("run", "folder"), folders)]))
    return page.html_page("Runs compared", sections, f"{sum(map(len, runs.values()))} runs of {len(runs)} cells; baseline: {baseline}.")


def _plot(panels: Mapping[str, Any], words: str) -> page.Figure:
    return page.Figure(curves.line_panels(panels), f"{words}; single seeds faint, their mean strong.")


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="workdirs, or folders of sweeps or of their cells")
    parser.add_argument("--out", required=True, type=Path, help="HTML file to write")
    parser.add_argument("--baseline", default=None, help="run or cell whose final values are to be reached; the first unless given")


def run(runs: Sequence[Path], out: Path, baseline: str | None) -> int:
    """The command."""
    check_output(out)
    found = find_runs(runs)
    name = next(iter(found)) if baseline is None else Path(baseline).name
    if name not in found:
        raise ValueError(f"--baseline is {baseline!r}, which is none of the runs: {', '.join(found)}")
    ordered = {name: found[name], **found}
    write(out, compare_page({cell: [read_run(folder) for folder in folders] for cell, folders in ordered.items()}, name))
    print(f"{sum(map(len, found.values()))} run(s) of {len(found)} cell(s) in {out}")
    return 0
