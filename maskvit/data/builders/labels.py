"""Classes of samples that no folder names: a CSV or JSON lines file of (file, class), and a file of the classes' names."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from maskvit.data.builders.layout import NO_CLASS, READ, Task

NO_LABEL, BAD_LABEL, UNUSED = "samples without a label", "labels that are no class", "labels without a sample"
COLUMNS = ("file", "class")


def class_order(names: Iterable[str]) -> list[str]:
    """Names in the order of their labels: as numbers where all are whole numbers ("2" before "10"), else as text."""
    names = set(names)
    return sorted(names, key=(lambda name: (int(name), name)) if all(name.isdecimal() for name in names) else None)


def read_names(path: str) -> tuple[str, ...]:
    """The names of the classes 0, 1, ..., one a line. Raises FileNotFoundError, or ValueError for none or one named twice."""
    with open(path, encoding="utf-8") as file:
        names = [line.strip() for line in file if line.strip()]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice or not names:
        raise ValueError(f"{path} names the class {twice[0]!r} twice" if twice else f"{path} names no class: write one name a line")
    return tuple(names)


class LabelFile:
    """The rows (file, class) of a CSV file with a header, or of a JSON lines file.

    `file` is the path of a sample's file below the root, below its split or below its modality, with or without suffix:
    "train/rgb/a/x.jpg", "rgb/a/x.jpg", "a/x.jpg". `class` is a name; with `names` also a number 0, 1, ... among them.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a row that is none, or a file with two classes, by line.
    """

    def __init__(self, path: str, names: Sequence[str] = ()):
        self.path, self.names = path, tuple(names)
        self.rows: dict[str, tuple[str, int]] = {}  # name of the file -> (class as written, line)
        self.used: set[str] = set()
        for line, file, label in _rows(path):
            key = _stem(file)
            if not key or not label:
                raise ValueError(f"{path}, line {line}: the {'class' if key else 'file'} is empty")
            if key in self.rows and self.rows[key][0] != label:
                raise ValueError(f"{path}, line {line}: {file} is {label!r}, in line {self.rows[key][1]} it is {self.rows[key][0]!r}")
            self.rows[key] = (label, line)

    def label(self, split: str, task: Task) -> tuple[str | None, tuple[str, str] | None]:
        """(the class of a sample by name or None, what is wrong as (kind, text) or None)."""
        bare = task.key.removeprefix(f"{NO_CLASS}/")
        tails = dict.fromkeys((task.key, bare))
        named = [f"{top}{tail}" for tail in tails for name in task.files for top in (f"{split}/{name}/", f"{name}/")]
        found = [key for key in (*named, *(f"{top}{tail}" for tail in tails for top in (f"{split}/", ""))) if key in self.rows]
        self.used.update(found)
        file = next(iter(task.files.values()))
        if not found:
            return None, (NO_LABEL, f"{file}: {self.path} has no row for it")
        written = dict.fromkeys(self.rows[key][0] for key in found)
        if len(written) > 1:
            return None, (BAD_LABEL, f"{file}: {self.path} has it as {' and as '.join(map(repr, written))}")
        label, line = self.rows[found[0]]
        if not self.names or label in self.names:
            return label, None
        if label.isdecimal() and int(label) < len(self.names):
            return self.names[int(label)], None
        return None, (
            BAD_LABEL, f"{self.path}, line {line}: class {label!r} is neither a name nor a number of the {len(self.names)} classes 0 ... "
            f"{len(self.names) - 1}",
        )  # fmt: skip

    def unused(self) -> list[str]:
        """A line for every row that no sample asked for."""
        return [f"{self.path}, line {line}: no file of {key!r}" for key, (_, line) in self.rows.items() if key not in self.used]


def _rows(path: str) -> Iterator[tuple[int, str, str]]:
    """(line, file, class) of every row."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if os.path.splitext(path)[1].lower() in (".jsonl", ".ndjson", ".json"):
            for number, text in enumerate(file, 1):
                if text.strip():
                    try:
                        row = json.loads(text)
                    except ValueError as error:
                        raise ValueError(f"{path}, line {number}: no JSON ({error}); one object a line is expected") from error
                    yield number, *_fields(path, number, row)
            return
        reader = csv.DictReader(file)
        if not set(COLUMNS) <= set(reader.fieldnames or ()):
            columns = ", ".join(reader.fieldnames or ()) or "none"
            raise ValueError(f"{path} has the columns {columns}; its first line must name file and class")
        for row in reader:
            yield reader.line_num, *_fields(path, reader.line_num, row)


def _fields(path: str, line: int, row: Any) -> tuple[str, str]:
    if not isinstance(row, Mapping) or any(not isinstance(row.get(key), (str, int)) or isinstance(row.get(key), bool) for key in COLUMNS):
        raise ValueError(f"{path}, line {line}: expected the fields file and class, the class as text or a whole number")
    return str(row["file"]).strip(), str(row["class"]).strip()


def _stem(file: str) -> str:
    """A file's name without suffix, in the form of `maskvit.data.builders.layout.key_of`."""
    stem, suffix = os.path.splitext(file.replace("\\", "/"))
    name = unicodedata.normalize("NFC", stem if suffix.lower() in READ else stem + suffix)
    return name.removeprefix("./")
