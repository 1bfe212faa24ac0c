"""Every evaluation as one line of data: what was measured, how, of which weights, by which config."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "results.jsonl"


def digest(value: Any) -> str:
    """Twelve hexadecimal digits that two pieces of plain data share only where nothing in them differs."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


class ResultsFile:
    """`WORKDIR/results.jsonl`, one line per evaluation: "time" (UTC), "step", "evaluator", "protocol" and its "fingerprint", "figures",
    "seed", "config" and its "config_digest", "weights" (what was evaluated), "log" (the run's metrics).

    Lines of earlier runs in the same workdir stay; those of steps that a resumed run takes again go. Figures that are not finite are
    null.
    """

    def __init__(self, workdir: str | os.PathLike, config: Mapping[str, Any], resume_step: int | None, initial: str = "") -> None:
        """`initial`: which weights the run begins with; they are what a run of no steps evaluates."""
        self._path = Path(workdir) / FILE
        self._about = dict(seed=config["seed"], config=config, config_digest=digest(config), log=str(Path(workdir) / "metrics.jsonl"))
        self._checkpoints, self._initial = Path(workdir) / "checkpoints", initial
        if self._path.exists() and resume_step is not None:
            ours = [line for line in read(self._path) if not (self._same_run(line) and line["step"] > resume_step)]
            partial = self._path.with_name(f"{FILE}.partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in ours))
            os.replace(partial, self._path)

    def _same_run(self, line: Mapping[str, Any]) -> bool:
        return line.get("log") == self._about["log"]

    def write(self, step: int, evaluator: str, protocol: Mapping[str, Any], figures: Mapping[str, float], trained: bool) -> None:
        """Append a line and hand it to the operating system. `trained`: whether the weights are those of the run's own checkpoint."""
        row = dict(
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), step=int(step), evaluator=evaluator, protocol=protocol,
            fingerprint=digest(protocol), figures={k: float(v) if math.isfinite(v) else None for k, v in figures.items()},
            weights=str(self._checkpoints / str(step)) if trained else self._initial, **self._about,
        )  # fmt: skip
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a results.jsonl, or of that in a workdir. Raises FileNotFoundError and, naming the line, ValueError."""
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no {path}: a run writes it when an evaluator of config.evaluators has run")
    rows = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(text)
            if not all(key in row for key in ("step", "evaluator", "figures", "fingerprint", "protocol", "config")):
                raise ValueError
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no result: remove it") from error
        rows.append(row)
    return rows
