"""How the cost of a step and of a start grows: with the batch, the tokens, the modalities, the model's size, the number of records."""

from __future__ import annotations

import concurrent.futures
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskvit.commands.bench.loader import stated_modalities
from maskvit.commands.bench.timing import resident_gb
from maskvit.commands.sweep.cells import overrides

RECORDS = (10**3, 10**4, 10**5, 10**6, 10**7)
IMAGE, BATCH = 64, 32  # of the start that is measured


class Point(NamedTuple):
    """A config to plan: what is set in it, and where it stands on the axis; None is found out by planning."""

    changes: Mapping[str, Any]
    place: float | None


def studies(plain: Mapping[str, Any]) -> dict[str, list[Point]]:
    """{axis: points} of a plain config: a quarter to twice its batch, other image sizes and so tokens, inputs one by one, S, B and L."""
    objective, size = plain["objective"], plain["image_size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    batch = plain["global_batch"]
    found = {"batch": [Point({"global_batch": count}, count) for count in (batch // 4, batch // 2, batch, 2 * batch) if count]}
    patch = max(block.get("patch", 16) for block in plain["modalities"].values())
    sizes = dict.fromkeys(tuple(max(round(side * share / patch), 2) * patch for side in size) for share in (0.5, 0.75, 1, 1.5))
    inputs = tuple(objective.get("inputs") or ("rgb",))
    tokens = lambda sides: len(inputs) * (sides[0] // patch) * (sides[1] // patch)  # noqa: E731
    found["tokens"] = [Point({} if sides == size else {"image_size": sides}, tokens(sides)) for sides in sizes]
    if len(inputs) > 1:
        found["modalities"] = [Point(_only(objective, inputs[:count]), count) for count in range(1, len(inputs) + 1)]
    found["parameters, millions"] = [Point({"objective.encoder": name}, None) for name in ("S", "B", "L")]
    return found


def _only(objective: Mapping[str, Any], inputs: tuple[str, ...]) -> dict[str, Any]:
    """What must be set so that a model has these inputs alone, and outputs of them."""
    outputs = tuple(name for name in objective.get("outputs") or () if name.removeprefix("norm_") in inputs)
    return {"objective.inputs": inputs, **({"objective.outputs": outputs} if "outputs" in objective else {})}


def grown(plain: Mapping[str, Any], plan: Callable[[str, dict[str, Any]], dict[str, Any]]) -> dict[str, list[tuple[float, Any]]]:
    """{axis: [(place, record)]}. `plan(name, config)` makes the record of a config; of equal configs one is made."""
    known: dict[str, dict[str, Any]] = {}
    result: dict[str, list[tuple[float, Any]]] = {}
    for axis, points in studies(plain).items():
        result[axis] = []
        for point in points:
            config = overrides(plain, point.changes, "--growth")
            key = json.dumps(config, sort_keys=True, default=str)
            if key not in known:
                known[key] = plan(", ".join(f"{name}={value}" for name, value in point.changes.items()), config)
            record = known[key]
            result[axis].append((record["parameters"] / 1e6 if point.place is None else point.place, record))
    return result


class Repeated:
    """A data source of `count` records: those of another over and over."""

    def __init__(self, source: Any, count: int):
        self.source, self.count = source, count
        self.label_names, self.pixel_classes, self.may_lack = source.label_names, source.pixel_classes, source.may_lack

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(f"record {index} of {self.count}")
        record: dict[str, Any] = self.source[index % len(self.source)]
        return record

    def describe(self) -> str:
        """One line: where the data come from."""
        return f"{self.count} records, the same over and over: {self.source.describe()}"


def start(directory: str, count: int) -> tuple[float, float]:
    """(Seconds from opened data to the first batch, GB that the process held at most), of `count` records: the scenes in `directory`.

    The memory is NaN where the system does not tell it.
    """
    from maskvit.data import open_source
    from maskvit.data.batches import train_batches
    from maskvit.data.identity import data_identity

    specs = stated_modalities(directory, "")
    source = Repeated(open_source("tfds", specs, data_dir=directory, split="train"), count)
    began = time.perf_counter()
    data_identity(source)
    stream = train_batches(source, specs, (IMAGE, IMAGE), seed=0, global_batch=BATCH)
    try:
        next(stream)
        seconds = time.perf_counter() - began
    finally:
        stream.close()
    return seconds, resident_gb(peak=True) or math.nan


def starts(counts: Sequence[int] = RECORDS) -> list[tuple[int, float, float]]:
    """`start` for each number of records, each in a process of its own: (records, seconds, GB)."""
    from maskvit.data.builders import prepare

    found = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        directory = prepare("scenes", folder, num_train=64, num_val=4, size=IMAGE)
        for count in counts:
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                pool.submit(start, directory, BATCH).result()  # imports, and the files in the cache of the system
                before = pool.submit(start, directory, BATCH).result()
                seconds, held = pool.submit(start, directory, count).result()
            found.append((count, seconds, held))
            least = f"of {BATCH} records {before[0]:.2f} s, {before[1]:.2f} GB"
            print(f"start of {count:,} records: {seconds:.2f} s to the first batch, {held:.2f} GB ({least})", flush=True)
    return found


def draw(result: Mapping[str, Sequence[tuple[float, Any]]], begun: Sequence[tuple[int, float, float]], path: Path) -> None:
    """Floors and memory over every axis, and the start over the number of records, as SVG."""
    from maskvit.plots import curves

    panels: dict[str, dict[str, list[Any]]] = {}
    axes: dict[str, str] = {}

    def add(title: str, axis: str, points: Sequence[tuple[float, float]]) -> None:
        axes[title] = axis
        panels[title] = {"": [tuple(zip(*sorted(points), strict=True))]}

    for axis, points in result.items():
        add(f"floor in ms by {axis}", axis, [(place, record["floor_ms"]) for place, record in points])
        add(f"memory in GB by {axis}", axis, [(place, record["state_gb"] + record["temporary_gb"]) for place, record in points])
    if begun:
        add("start in seconds by records", "records", [(count, seconds) for count, seconds, _ in begun])
        if known := [(count, held) for count, _, held in begun if math.isfinite(held)]:
            add("memory of the start in GB by records", "records", known)
    path.write_bytes(curves.line_panels(panels, x=axes, columns=2, logarithmic=("records",), from_zero=True))


def table(result: Mapping[str, Sequence[tuple[float, Any]]]) -> str:
    """A Markdown table of all points."""
    rows = ["| axis | at | floor, ms | images/s | state and temporaries, GB | kernels |", "|---|---|---|---|---|---|"]
    for axis, points in result.items():
        for place, record in points:
            memory = record["state_gb"] + record["temporary_gb"]
            counts = f"{record['images_per_s']:,.0f} | {memory:.2f} | {record['kernels']:,}"
            rows.append(f"| {axis} | {place:,.4g} | {record['floor_ms']:.1f} | {counts} |")
    return "\n".join(rows)
