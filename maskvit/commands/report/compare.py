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
from maskvit.commands.sweep.table import spread, summarize, verdicts
from maskvit.commands.sweep.verdict import main_figures, overall, sentence
from maskvit.core.arguments import check_output
from maskvit.metrics.directions import better
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


def compared(runs: Mapping[str, Sequence[Run]], baseline: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The final values as `maskvit.commands.sweep.table.summarize` compares them: seed by seed, by the names of the folders."""
    results = [
        dict(
            cell=cell,
            seed=int(run.folder.name.removeprefix("seed_")) if SEED.fullmatch(run.folder.name) else -1,
            final={name: curve.values[-1] for name, curve in run.curves.items() if "/" in name or name == "loss"},
        )
        for cell, some in runs.items()
        for run in some
    ]
    return summarize(results, {cell: {} for cell in runs}, baseline)


def reached(name: str, level: float, epochs: Mapping[str, Sequence[float]], baseline: str) -> str:
    """How soon runs are where the baseline ends. `epochs`: of every run, infinite where it never is, by cell."""
    times = {cell: sum(values) / len(values) for cell, values in epochs.items() if values}
    others = {cell: time for cell, time in times.items() if cell != baseline}
    if not others:
        return ""
    first = f"{baseline} ends with {level:.4g} in {name}"
    fastest = min(others, key=lambda cell: others[cell])
    if math.isinf(others[fastest]):
        return f"{first}; no other run gets there with all its seeds."
    never = [cell for cell, time in others.items() if math.isinf(time)]
    text = f"{first}: {fastest} gets there after {others[fastest]:.4g} epochs"
    if math.isfinite(times.get(baseline, math.inf)):
        text += f", {baseline} itself after {times[baseline]:.4g}"
    return text + (f"; some or all seeds never get there of {', '.join(never)}." if never else ".")


def compare_page(runs: Mapping[str, Sequence[Run]], baseline: str) -> str:
    """The page. `baseline`: the cell whose mean final values the others are to reach."""
    measured = accuracies(runs)
    losses = ["loss", *sorted({n for cell in runs.values() for run in cell for n in run.curves if n.startswith("loss/")})]

    def panels(names: Sequence[str]) -> dict[str, dict[str, list[Curve]]]:
        chosen = {n: {cell: [r.curves[n] for r in some if n in r.curves] for cell, some in runs.items()} for n in names}
        return {name: {cell: curves for cell, curves in panel.items() if curves} for name, panel in chosen.items()}

    targets = {name: (spread(final(runs[baseline], name)).mean, better(name, measured) != "lower") for name in (*measured, "loss")}
    targets = {name: target for name, target in targets.items() if math.isfinite(target[0])}
    epochs = {
        name: {cell: [epochs_to(r.curves[name], *target) for r in some if name in r.curves] for cell, some in runs.items()}
        for name, target in targets.items()
    }
    reach = [[cell, *(_epochs(epochs[name][cell]) for name in targets)] for cell in runs]
    found = verdicts(compared(runs, baseline))
    said = [page.Prose(sentence(one, "run")) for one in found] if len(found) > 1 else []
    sooner = [reached(name, targets[name][0], epochs[name], baseline) for name in main_figures(measured) or ["loss"] if name in targets]
    last = [[cell, str(len(some)), *(_with_spread(final(some, n), len(some)) for n in (*measured, *losses))] for cell, some in runs.items()]
    learning = panels(["learning_rate"])["learning_rate"]
    sections = [
        page.Section(
            "Final values",
            [
                *said,
                page.Prose(
                    "A run is better or worse where the 95 % interval of its difference from the baseline, seed by seed, leaves out zero. "
                    "Of twenty pairs of equal runs one does so by chance."
                ),
                page.Table(("run", "seeds", *measured, *losses), last),
                page.Prose(
                    "Mean ± sample standard deviation over seeds. A loss is that of the tokens a run hides, at its weights: runs that hide "
                    "differently do not compare by it."
                ),
            ],
        ),
        page.Section(
            f"Epochs to reach what {baseline} ends with",
            [
                *(page.Prose(text) for text in sooner if text),
                page.Table(("run", *(f"{name} {level:.4g}" for name, (level, _) in targets.items())), reach),
                page.Prose("Epochs of training up to the first evaluation, or logged loss, that is as good as the value above the column."),
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
    count = sum(map(len, runs.values()))
    summary = f"{overall(found, 'run')} Shown: {', '.join(runs)} ({count} with all seeds); baseline: {baseline}."
    return page.html_page("Runs compared", sections, summary)


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
