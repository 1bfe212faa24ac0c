"""A grid of runs in one process, and a table of what came of it.

    python -m maskvit sweep --config FILE --grid key=a,b --grid other.key=c,d --seeds 3 --out DIR

Every cell of the grid is one experiment, trained once per seed in DIR/CELL/seed_N. What is finished is skipped, so the same
command resumes where it was stopped. A config file may also define `get_sweep()`, which names cells that differ in several
keys: {name: {dotted key: value, ...}}; a grid then multiplies them. A value that is a dict replaces the whole block. A cell may also name
its "config", another function of the file, and the cell that it comes "after", whose weights it begins with: pretraining, what continues
it, and what is fine-tuned from either are then one sweep. "against" names the cell that one is compared with, where not the baseline.
DIR/sweep.json, .txt and .html hold the mean and the spread over seeds of the final loss and of every evaluator's figures, and each cell's
difference from what it is compared with, seed by seed, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maskvit.commands.sweep.cells import Experiment, load_experiment, make_cells, parse_grid
from maskvit.commands.sweep.runs import carry_out, check_data, make_runs
from maskvit.commands.sweep.table import judged, write_tables
from maskvit.core.arguments import make_folder, whole
from maskvit.core.errors import add_debug, run_command


def sweep(
    config: str, grid: Sequence[str], seeds: int, out: Path, only: Sequence[str] = (), baseline: str | None = None,
    controls: Sequence[str] = (), command: str = "",
) -> str:  # fmt: skip
    """The sweep of a config file; see `run_cells`."""
    experiment = load_experiment(config)
    cells = make_cells(experiment, [parse_grid(text, experiment.config) for text in grid])
    return run_cells(experiment, cells, seeds, out, only, baseline, controls, command)


def run_cells(
    experiment: Experiment, cells: Mapping[str, Mapping[str, Any]], seeds: int, out: Path, only: Sequence[str] = (),
    baseline: str | None = None, controls: Sequence[str] = (), command: str = "",
) -> str:  # fmt: skip
    """Run what is not finished, write the tables after every run, and return the last text."""
    baseline = baseline or next(iter(cells))
    for option, names in (("--baseline", [baseline]), ("--controls", controls), ("--only", only)):
        for name in names:
            if name not in cells:
                raise ValueError(f"{option} names {name!r}, which is no cell; the cells: {', '.join(cells)}")
    runs = make_runs(experiment, cells, seeds, out)
    wanted = [run for run in runs if not only or run.cell in only]
    make_folder(out)
    check_data(wanted)
    # Runs that compile the same program, and a sweep that goes on, compile it once.
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(out.resolve() / "compiled"))
    text = ""
    for number, run in enumerate(wanted, 1):
        head = f"[{number}/{len(wanted)}] {run.cell} seed {run.seed}"
        if run.result() is not None:
            print(f"{head}: finished before", flush=True)
        else:
            print(f"{head} ...", flush=True)
            try:
                result = carry_out(run)
            except SystemExit:  # Ctrl-C or SIGTERM, with the state saved
                print(f"{head}: stopped, its state is saved; the same command resumes it", flush=True)
                raise
            results = [r for r in (other.result() for other in runs) if r is not None]
            left = sum(expected_seconds(other.cell, results) for other in wanted[number:] if other.result() is None)
            shown = {k: v for k, v in result["final"].items() if k == "loss" or k in judged(list(result["final"]))}
            figures_of_run = result["failed"] or "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            print(f"{head}: {figures_of_run}  ({result['seconds']:.0f} s; {left / 60:.0f} min left)", flush=True)
        results = [r for r in (other.result() for other in runs) if r is not None]
        text = write_tables(out, results, cells, baseline, controls, command)
    return text


def expected_seconds(cell: str, results: Sequence[Mapping[str, Any]]) -> float:
    """What a run takes: as long as its cell's finished ones, or as any where there are none. `results`: at least one."""
    own = [r["seconds"] for r in results if r["cell"] == cell]
    return float(np.mean(own or [r["seconds"] for r in results]))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 2 where nothing could be done."""
    parser = argparse.ArgumentParser(prog="python -m maskvit sweep", description="A grid of runs, resumable, and its table.")
    parser.add_argument("--config", required=True, help="config file; its get_sweep(), if any, names cells")
    parser.add_argument("--grid", action="append", default=[], metavar="KEY=A,B", help="a dotted config key and its values; repeatable")
    parser.add_argument("--seeds", type=whole(), default=1, help="runs per cell, under config.seed, config.seed + 1, ...")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs and tables; the same command again goes on there")
    parser.add_argument("--only", type=_names, default=(), metavar="NAME,NAME", help="run these cells alone; the tables show all finished")
    parser.add_argument("--baseline", default=None, help="what cells are compared with that name none; the first unless given")
    parser.add_argument(
        "--controls", type=_names, default=(), metavar="NAME,NAME", help="cells that must differ for the table to have power"
    )
    add_debug(parser)
    arguments = vars(parser.parse_args(argv))
    debug = arguments.pop("debug")
    words = sys.argv[1:] if argv is None else list(argv)
    return run_command(lambda: print(sweep(**arguments, command=" ".join(["python -m maskvit sweep", *words]))), debug)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


if __name__ == "__main__":
    sys.exit(main())
