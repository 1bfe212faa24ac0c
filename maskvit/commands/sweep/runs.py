"""The runs of a sweep: one cell under one seed each, in a folder that says whether it is finished."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskvit.checkpoints import check_same_config
from maskvit.commands.sweep.cells import AFTER, Experiment, overrides, own_keys
from maskvit.core.errors import Mistakes, all_mistakes
from maskvit.core.modalities import parse_modalities
from maskvit.data import open_source
from maskvit.data.order import steps_per_epoch
from maskvit.training import setup
from maskvit.training.config import check_config

RESULT = "result.json"  # in a finished run's folder: its config, seconds and final figures
MAY_DIFFER = (
    "data.workers", "data.prefetch", "data.train.data_dir", "init_from.path", "log_every", "picture_every", "checkpoint", "sharding",
)  # fmt: skip


class Run(NamedTuple):
    """One cell under one seed."""

    cell: str
    seed: int
    folder: Path
    config: dict[str, Any]

    def result(self) -> dict[str, Any] | None:
        """What the folder says of the finished run, None where it is not finished.

        Raises ValueError where the folder holds a run of another config.
        """
        path = self.folder / RESULT
        if not path.is_file():
            return None
        try:
            result = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, and the run is finished again from its checkpoint") from error
        if not isinstance(result, dict) or not {"cell", "seed", "config", "seconds", "failed", "final"} <= result.keys():
            raise ValueError(f"{path} is no result of a run: remove it, and the run is finished again from its checkpoint")
        try:
            check_same_config(result["config"], self.config, MAY_DIFFER)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}\nOr delete that folder, and the cell is run again.") from error
        return result


def make_runs(experiment: Experiment, cells: Mapping[str, Mapping[str, Any]], seeds: int, out: Path) -> list[Run]:
    """Every cell under every seed, all cells of a seed before the next seed: a sweep that was stopped then has whole rows.

    A cell that comes after another begins with the weights of that one's run of the same seed.
    Checks every cell's config, so that a mistake in one is told before any has run.
    """
    runs = []
    with all_mistakes() as checks:
        for name, changes in cells.items():
            with checks.check():
                changed = overrides(experiment.base(changes), own_keys(changes), f"cell {name!r}")
                try:
                    check_config(changed)
                except Mistakes as error:
                    raise Mistakes([f"cell {name!r}: {mistake}" for mistake in error.mistakes]) from error
                runs += [(seed, Run(name, changed.get("seed", 0) + seed, Path(), changed)) for seed in range(seeds)]
    runs.sort(key=lambda pair: pair[0])  # stable
    placed: dict[tuple[str, int], Run] = {}
    for seed, run in runs:
        settings = {**run.config, "seed": run.seed}
        if after := cells[run.cell].get(AFTER):
            settings["init_from"] = {**settings.get("init_from", {}), "path": str(placed[after, seed].folder)}
        placed[run.cell, seed] = run._replace(folder=out / run.cell / f"seed_{run.seed}", config=settings)
    for run in placed.values():
        run.result()
    return list(placed.values())


def check_data(runs: Sequence[Run]) -> None:
    """Open the training data of every run that is not finished: data that are not there, or too few, are told before any has run.

    Raises Mistakes, which name the cells.
    """
    seen: set[str] = set()
    with all_mistakes() as checks:
        for run in runs:
            train, batch = dict(run.config["data"]["train"]), run.config["global_batch"]
            key = json.dumps([train, run.config["modalities"], batch], sort_keys=True, default=str)
            if key in seen or run.result() is not None:
                continue
            seen.add(key)
            with checks.check():
                try:
                    source = open_source(train.pop("source", "tfds"), parse_modalities(run.config["modalities"]), **train)
                    steps_per_epoch(len(source), batch)
                except (ValueError, FileNotFoundError) as error:
                    raise ValueError(f"cell {run.cell!r}: {error}") from error


def carry_out(run: Run) -> dict[str, Any]:
    """Train one run, or go on with it, and note the result in its folder; what it says goes to its log.txt.

    A run whose loss is lost (FloatingPointError) is a result too: "failed" says so.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    start, failed = time.perf_counter(), ""
    with _log_to(run.folder / "log.txt"):
        try:
            setup.train(str(run.folder), **run.config)
        except FloatingPointError as error:
            failed = str(error)
    result = {
        "cell": run.cell,
        "seed": run.seed,
        "config": run.config,
        "seconds": time.perf_counter() - start,
        "failed": failed,
        "final": final_figures(read_metrics(run.folder), run.config),
    }
    write(run.folder / RESULT, json.dumps(result, indent=1))
    return result


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Standard error and the package's log go to a file."""
    logger = logging.getLogger("maskvit")
    level, propagates = logger.level, logger.propagate
    with open(path, "a", encoding="utf-8") as file, contextlib.redirect_stderr(file):
        handler = logging.StreamHandler(file)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagates


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; a value that was not finite is NaN, and a line cut short is left out.

    Raises FileNotFoundError where there is none, ValueError where it is no JSON.
    """
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is no run: it has no metrics.jsonl")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is no JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"line {number} of {path} is no row of metrics: {line.strip()[:80]}")
        row.pop("non_finite", None)
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def final_figures(rows: Sequence[Mapping[str, float]], config: Mapping[str, Any]) -> dict[str, float]:
    """The last value of the loss, of its parts, and of all that the config's evaluators wrote."""
    wanted = ("loss", *(f"{name}/" for name in ("loss", *(config.get("evaluators") or {}))))
    last: dict[str, float] = {}
    for row in rows:
        last |= {name: value for name, value in row.items() if name == "loss" or name.startswith(wanted[1:])}
    return dict(sorted(last.items(), key=lambda item: (item[0] != "loss", not item[0].startswith("loss/"))))


def write(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
