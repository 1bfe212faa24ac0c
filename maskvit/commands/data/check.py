"""What a config reads: samples of all its data, decoded as a run decodes them, as a table and as a sheet of pictures.

A class map is also drawn over the first color picture: whether the two lie over each other only the eye can tell.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from maskvit.core.arguments import check_output, whole
from maskvit.core.config_files import load_config
from maskvit.core.configuration import look_up
from maskvit.core.modalities import Modality, parse_modalities
from maskvit.data import SOURCES, open_source
from maskvit.data.augment.resizing import valid_pixels
from maskvit.data.builders.packing import show
from maskvit.data.codec import RecordError
from maskvit.data.decoding import check_values, decode_record
from maskvit.data.sources import Source, open_builder
from maskvit.plots import panels
from maskvit.plots.answers import class_legend
from maskvit.plots.pictures import PAPER, Picture, to_picture
from maskvit.training.config import check_config

LARGE = 30.0  # of a value that the model is given: a scale that is right gives some units
EMPTY = 0.95  # share of pixels without a value
COLUMNS = ("data", "modality", "samples", "height x width", "values", "missing")
NAMING = ("train", "test", "data_from")  # keys of evaluators that name data


@dataclasses.dataclass
class Seen:
    """What the samples of one modality hold: `low`, `high` over all valid pixels; `ids`: pixels per class."""

    spec: Modality
    samples: int = 0
    absent: int = 0
    pixels: int = 0
    missing: int = 0
    low: float = np.inf
    high: float = -np.inf
    sizes: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    ids: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

    def add(self, array: np.ndarray) -> None:
        """Count one sample."""
        self.samples += 1
        self.sizes.add((array.shape[0], array.shape[1]))
        if self.spec.kind == "continuous":
            valid = valid_pixels(array.astype(np.float32), self.spec.missing)
        else:
            valid = np.ones(array.shape, bool) if self.spec.missing is None else array != self.spec.missing
        self.pixels += valid.size
        self.missing += int((~valid).sum())
        known = array[valid]
        if known.size:
            self.low, self.high = min(self.low, float(known.min())), max(self.high, float(known.max()))
        if self.spec.kind == "categorical":
            self.ids.update(dict(zip(*(x.tolist() for x in np.unique(known, return_counts=True)), strict=True)))

    def row(self) -> tuple[str, str, str, str]:
        """Cells of the table: samples, sizes, values, missing."""
        heights, widths = zip(*self.sizes, strict=True) if self.sizes else ((0,), (0,))
        spread = lambda sides: f"{min(sides)}" if min(sides) == max(sides) else f"{min(sides)}-{max(sides)}"  # noqa: E731
        values = "none"
        if self.ids:
            values = f"{len(self.ids)} of {self.spec.num_classes} classes, {self.low:.0f} to {self.high:.0f}"
        elif self.low <= self.high:
            unit = self.spec.metres_per_count
            values = f"{self.low * unit:.4g} to {self.high * unit:.4g} m" if unit else f"{self.low:.4g} to {self.high:.4g}"
        samples = f"{self.samples}" + (f", {self.absent} without" if self.absent else "")
        return samples, f"{spread(heights)} x {spread(widths)}", values, f"{self.missing / max(1, self.pixels):.1%}"

    def doubts(self) -> Iterator[str]:
        """What may be right and rarely is."""
        if not self.samples:
            yield "no sample has it"
            return
        if self.missing > EMPTY * self.pixels:
            yield f"{self.missing / self.pixels:.1%} of its pixels have no value: is missing = {self.spec.missing} right?"
        if self.low == self.high:
            yield f"has the one value {self.low:g} on all pixels of all samples"
        if self.spec.kind == "continuous" and not self.spec.standardize and self.low <= self.high:
            ends = np.array([[self.low], [self.high]]) * self.spec.scale
            most = float(np.abs((ends - np.array(self.spec.mean)) / np.array(self.spec.std)).max())
            if most > LARGE:
                yield f"reaches {most:.4g} in the model's units (scale, mean and std applied): is scale = {self.spec.scale:g} right?"


def named_sources(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The data that a config names: "train", and those of its evaluators, each once."""
    train = dict(config["data"]["train"])
    found = {"train": train}
    for name, block in dict(config.get("evaluators") or {}).items():
        given = {key: block[key] for key in NAMING if block.get(key)}
        if "data_from" not in given and "test" not in given:
            given["val"] = {**train, "split": "val"}
        for key, source in given.items():
            if dict(source) not in found.values():
                found[key if key == "val" and "val" not in found else f"{name}.{key}"] = dict(source)
    return found


def opened(name: str, block: Mapping[str, Any], specs: Mapping[str, Modality]) -> tuple[Source, dict[str, Modality]]:
    """(a source, the modalities it is read with): all for training, for an evaluator those that its data set has."""
    arguments = {"source": "tfds", **block}
    kind = arguments.pop("source")
    look_up("config.data source", SOURCES, kind)
    read = dict(specs)
    if name != "train" and arguments.get("data_dir"):
        stored = open_builder(str(arguments["data_dir"]), str(arguments.get("name", ""))).info.features
        features = dict(arguments.get("features") or {})
        read = {modality: spec for modality, spec in specs.items() if features.get(modality, modality) in stored}
        if features:
            arguments["features"] = {key: value for key, value in features.items() if key in read}
        if arguments.get("may_lack"):
            arguments["may_lack"] = [key for key in arguments["may_lack"] if key in read]
    return open_source(kind, read, **arguments), read


def look(source: Source, specs: Mapping[str, Modality], samples: int, num_classes: int | None, rows: int) -> tuple[Any, ...]:
    """Decode `samples` records, spread evenly. Returns (Seen by modality, labels, problems by kind, (name, arrays) of the first `rows`)."""
    seen = {name: Seen(spec) for name, spec in specs.items()}
    labels: collections.Counter[int] = collections.Counter()
    problems: dict[str, list[str]] = {}
    shown: list[tuple[str, dict[str, np.ndarray]]] = []
    indices = np.unique(np.linspace(0, len(source) - 1, min(samples, len(source))).round().astype(int)).tolist()
    drawn = set(indices[:: max(1, len(indices) // rows)][:rows])
    for index in indices:
        identity = f"record {index}"
        try:
            record = source[index]
            identity = str(record["id"])
            arrays = decode_record(record, specs)
            for name, array in arrays.items():
                check_values(array, specs[name])
        except RecordError as error:
            problems.setdefault("records that cannot be used", []).append(f"{identity}: {error}")
            continue
        for name in specs:
            if name in arrays:
                seen[name].add(arrays[name])
            else:
                seen[name].absent += 1
                if name not in source.may_lack:
                    problems.setdefault("modalities that are absent", []).append(f"{identity} has no {name}, and may_lack does not name it")
        label = record.get("label")
        if label is not None:
            labels[label] += 1
            known = num_classes or len(source.label_names) or None
            if known is not None and label >= known:
                problems.setdefault("labels out of range", []).append(f"{identity} has the label {label}; there are {known} classes")
        if index in drawn:
            named = source.label_names[label] if label is not None and 0 <= label < len(source.label_names) else ""
            shown.append((f"{identity[-28:]}\n{named[:28]}", arrays))
    return seen, labels, problems, shown


def _overlay(picture: Picture, ids: Picture) -> Picture:
    """A class map over gray."""
    gray = (picture @ np.array([0.299, 0.587, 0.114]))[..., None]
    return (0.55 * gray + 0.45 * ids).round().astype(np.uint8)


def _framed(picture: Picture, aspect: float) -> UInt8[np.ndarray, "tall wide 3"]:
    """The picture on paper of that width over height, so that tiles of one shape do not distort it."""
    height, width = picture.shape[:2]
    wide, tall = max(width, round(height * aspect)), max(height, round(width / aspect))
    paper = np.full((tall, wide, 3), PAPER, np.uint8)
    paper[(tall - height) // 2 :, (wide - width) // 2 :][:height, :width] = picture
    return paper


def contact_sheet(
    shown: list[tuple[str, dict[str, np.ndarray]]],
    specs: Mapping[str, Modality],
    classes: Mapping[str, Sequence[str]] | None = None,
    title: str = "",
) -> bytes:
    """A row per sample as PNG: every modality, and class maps over the first color picture; below it the classes of every class map.

    `classes`: names of class ids by modality, where they have any.
    """
    colors = next((name for name, spec in specs.items() if spec.kind == "continuous" and spec.channels == 3), None)
    columns = [*specs, *(f"{name}\nover {colors}" for name, spec in specs.items() if colors and spec.kind == "categorical")]
    aspect = max(array.shape[1] / array.shape[0] for _, arrays in shown for array in arrays.values())
    rows = []
    for name, arrays in shown:
        pictures: dict[str, Picture] = {key: to_picture(specs[key], array) for key, array in arrays.items()}
        for key, spec in specs.items():
            if colors in pictures and key in pictures and spec.kind == "categorical":
                pictures[f"{key}\nover {colors}"] = _overlay(pictures[str(colors)], pictures[key])
        tiles = []
        for column in columns:
            size = pictures[column].shape if column in pictures else ()
            tiles.append((_framed(pictures[column], aspect), f"{size[0]} x {size[1]}") if size else None)
        rows.append((name, tiles))
    sheet = panels.labeled_grid(columns, rows, title, side=160)
    for name, spec in specs.items():
        if maps := [arrays[name] for _, arrays in shown if name in arrays and spec.kind == "categorical"]:
            sheet = panels.stacked(sheet, class_legend([one.reshape(one.shape[:2]) for one in maps], spec, (classes or {}).get(name, ())))
    return sheet


def verdict(looked: int, sets: int, problems: Mapping[str, Sequence[str]], remarks: Sequence[str]) -> str:
    """What was found, in a sentence. `looked`: samples that were decoded, of so many `sets`."""
    wrong = sum(map(len, problems.values()))
    where = f"{looked} samples of {sets} data set{'s' if sets > 1 else ''}"
    if not wrong and not remarks:
        return f"{where} are as the config says."
    found = [f"{wrong} thing{'s are' if wrong > 1 else ' is'} wrong"] if wrong else ["nothing is wrong"]
    found += [f"{len(remarks)} thing{'s look' if len(remarks) > 1 else ' looks'} strange"] if remarks else []
    return f"{where}: {', '.join(found)}."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--config", required=True, help="the config file of a run: FILE.py or FILE.py:ARGUMENT")
    parser.add_argument("--samples", type=whole(1), default=64, help="records per data set that are decoded, spread evenly (64)")
    parser.add_argument("--rows", type=whole(1), default=6, help="records per data set on the sheet (6)")
    parser.add_argument("--out", type=Path, default=Path("data.png"), help="the sheet of pictures; of further data sets NAME_<data>.png")


def run(config: str, samples: int, rows: int, out: Path) -> int:
    """The command; 1 where something is wrong with the data."""
    check_output(out)
    plain = load_config(config).to_dict()
    check_config(plain)
    specs = parse_modalities(plain["modalities"])
    task = dict(plain["objective"].get("task") or {}) if isinstance(plain.get("objective"), Mapping) else {}
    lines: list[tuple[str, ...]] = [COLUMNS]
    remarks: list[str] = []
    problems: dict[str, list[str]] = {}
    looked = 0
    sources = named_sources(plain)
    for name, block in sources.items():
        source, read = opened(name, block, specs)
        print(f"{name}: {source.describe()}")
        seen, labels, found, shown = look(source, read, samples, task.get("num_classes"), rows)
        looked += min(samples, len(source))
        problems |= {f"{name}: {kind}": texts for kind, texts in found.items()}
        for modality, facts in seen.items():
            lines.append((name, modality, *facts.row()))
            remarks += [f"{name}: {modality} {doubt}" for doubt in facts.doubts()]
        if labels:
            without = sum(count for label, count in labels.items() if label < 0)
            classes = len(labels) - any(label < 0 for label in labels)
            of = task.get("num_classes") or len(source.label_names)
            total = sum(labels.values())
            lines.append((name, "label", str(total), "", f"{classes} of {of} classes", f"{without / total:.1%}"))
        if shown:
            place = out if name == "train" else out.with_name(f"{out.stem}_{name}{out.suffix}")
            place.write_bytes(contact_sheet(shown, read, source.pixel_classes, f"{name}: {len(shown)} of {len(source)} samples"))
            print(f"{name}: pictures in {place}")
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for remark in remarks:
        print(f"look at this: {remark}")
    for text in show(problems):
        print(text)
    print(verdict(looked, len(sources), problems, remarks))
    return 1 if problems else 0
