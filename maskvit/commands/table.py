"""Tables of results: figures of several runs side by side, out of their results.jsonl.

    python -m maskvit table RUN [RUN ...] [--figures acc/top1 seg/mean_iou] [--by objective.task.mixup] [--at best] [--out table.md]

A row per run, or with --by per value of those config keys: mean and sample standard deviation over the runs that share it. Figures that
were taken by different protocols are never put into one column.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskvit.checkpoints.manifest import best_step
from maskvit.core.arguments import check_output
from maskvit.core.config_files import get_value
from maskvit.core.errors import add_debug, run_command
from maskvit.metrics import results

SUFFIXES = (".md", ".csv", ".json")


class Row(dict):
    """{column: values of the runs of this row}; `name` says which."""

    name: str = ""


def columns_of(runs: Mapping[str, Sequence[Mapping[str, Any]]], wanted: Sequence[str] | None) -> list[str]:
    """Names of the figures, "EVALUATOR/figure", in the order in which they come. Raises ValueError for one that no run has."""
    found = list(dict.fromkeys(f"{line['evaluator']}/{name}" for lines in runs.values() for line in lines for name in line["figures"]))
    for name in wanted or ():
        if name not in found:
            raise ValueError(f"--figures names {name!r}; the runs have {', '.join(found)}")
    return list(wanted or found)


def check_protocols(runs: Mapping[str, Sequence[Mapping[str, Any]]], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The one protocol of each evaluator in `columns`. Raises ValueError where runs took its figures in different ways, and says how."""
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for run, lines in runs.items():
        for line in lines:
            name = line["evaluator"]
            if not any(column.startswith(f"{name}/") for column in columns):
                continue
            first, protocol = found.setdefault(name, (run, line["protocol"]))
            if line["protocol"] != protocol:
                keys = [key for key in {**protocol, **line["protocol"]} if protocol.get(key) != line["protocol"].get(key)]
                differs = "; ".join(f"{key}: {protocol.get(key)!r} in {first}, {line['protocol'].get(key)!r} in {run}" for key in keys)
                raise ValueError(f"the figures of {name!r} are not comparable: they were taken by different protocols ({differs})")
    return {name: dict(protocol) for name, (_, protocol) in found.items()}


def figures_of(run: str, lines: Sequence[Mapping[str, Any]], at: str) -> dict[str, float]:
    """The figures of a run "last" evaluated, or at its "best" checkpoint: the newest line of each evaluator."""
    step = best_step(Path(run) / "checkpoints") if at == "best" else None
    if at == "best" and step is None:
        raise ValueError(f"--at best: the run {run} names no best checkpoint; it had no config.best")
    values: dict[str, float] = {}
    for line in sorted(lines, key=lambda line: line["step"]):
        if step is None or line["step"] == step:
            values |= {f"{line['evaluator']}/{name}": math.nan if value is None else value for name, value in line["figures"].items()}
    return values


def table_of(runs: Mapping[str, Sequence[Mapping[str, Any]]], columns: Sequence[str], by: Sequence[str], at: str) -> list[Row]:
    """A row per run, or per value of the config keys `by`."""
    rows: dict[str, Row] = {}
    for run, lines in runs.items():
        config = lines[-1]["config"]
        name = ", ".join(f"{key} = {get_value(config, key)}" for key in by) if by else run
        row = rows.setdefault(name, Row())
        row.name = name
        for column, value in figures_of(run, lines, at).items():
            if column in columns:
                row.setdefault(column, []).append(value)
    return list(rows.values())


def cell(values: Sequence[float] | None) -> str:
    """One value, or mean and sample standard deviation of several."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)})"


def markdown(rows: Sequence[Row], columns: Sequence[str], protocols: Mapping[str, Mapping[str, Any]]) -> str:
    """The table, and below it the protocol of every evaluator."""
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {row.name} | {' | '.join(cell(row.get(column)) for column in columns)} |" for row in rows]
    lines += [""] + [f"`{name}` {results.digest(protocol)}: {_words(protocol)}" for name, protocol in protocols.items()]
    return "\n".join(lines) + "\n"


def _words(protocol: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in protocol.items() if value is not None)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m maskvit table", description="Figures of several runs side by side.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdirs of runs")
    parser.add_argument("--figures", nargs="+", help="which, as metrics.jsonl names them; by default all")
    parser.add_argument("--by", nargs="+", default=(), metavar="KEY", help="config keys; runs that share their values become one row")
    parser.add_argument("--at", choices=("last", "best"), default="last", help="the last evaluation, or that of the best checkpoint")
    parser.add_argument("--out", type=Path, help=f"file to write besides: {', '.join(SUFFIXES)}")
    add_debug(parser)
    arguments = vars(parser.parse_args(argv))
    return run_command(lambda: _table(**arguments), arguments.pop("debug"))


def _table(runs: Sequence[str], figures: Sequence[str] | None, by: Sequence[str], at: str, out: Path | None) -> int:
    if out is not None and out.suffix not in SUFFIXES:
        raise ValueError(f"--out is {str(out)!r}; its suffix says the format: {', '.join(SUFFIXES)}")
    if out is not None:
        check_output(out)
    lines = {run: results.read(run) for run in dict.fromkeys(runs)}
    columns = columns_of(lines, figures)
    protocols = check_protocols(lines, columns)
    rows = table_of(lines, columns, by, at)
    print(markdown(rows, columns, protocols), end="")
    if out is not None:
        out.write_text(_written(out.suffix, rows, columns, protocols), encoding="utf-8")
    return 0


def _written(suffix: str, rows: Sequence[Row], columns: Sequence[str], protocols: Mapping[str, Any]) -> str:
    if suffix == ".md":
        return markdown(rows, columns, protocols)
    if suffix == ".json":
        values = [{"row": row.name, **{column: row.get(column, []) for column in columns}} for row in rows]
        return json.dumps(dict(rows=values, protocols=protocols), indent=1, default=str) + "\n"
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["row", *columns])
    writer.writerows([row.name, *(cell(row.get(column)) for column in columns)] for row in rows)
    return stream.getvalue()


if __name__ == "__main__":
    sys.exit(main())
