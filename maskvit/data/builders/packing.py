"""What the builders of files share: samples that are listed are read, checked, encoded, and counted by class.

Everything that is wrong with the files is told at once, by file name, and so is what was found and assumed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from maskvit.core.errors import printable
from maskvit.core.modalities import Modality
from maskvit.data.builders.layout import Loader, Task
from maskvit.data.builders.records import RecordBuilder, in_processes, progress
from maskvit.data.builders.samples import Found, read_sample
from maskvit.data.sources import LABEL_SETS, LABELS, STATED

SHOWN = 20  # files listed per kind of problem
MISSING = "missing files"
UNKNOWN_CLASS = "classes that train lacks"


class FolderError(ValueError):
    """What is wrong with a folder, all of it: `problems` per kind; the text shows some of each."""

    def __init__(self, root: str, problems: Mapping[str, Sequence[str]], remedy: str = ""):
        lines = [f"{root} cannot be built; {sum(map(len, problems.values()))} problems:", *show(problems)]
        super().__init__("\n".join(lines) + remedy)
        self.problems = {kind: list(found) for kind, found in problems.items()}


def show(problems: Mapping[str, Sequence[str]], shown: int = SHOWN) -> list[str]:
    """Lines that list problems per kind, at most `shown` of each."""
    lines = []
    for kind, found in problems.items():
        lines.append(f"{kind} ({len(found)}):")
        lines += [f"  {printable(problem)}" for problem in found[:shown]]
        if len(found) > shown:
            lines.append(f"  ... and {len(found) - shown} more")
    return lines


@dataclasses.dataclass
class Totals:
    """What the files of one modality held, added up; fields as in `samples.Found`, of which `whole` and behind count files."""

    files: int = 0
    missing: int = 0
    beyond: int = 0
    pixels: int = 0
    low: float = math.inf
    high: float = -math.inf
    whole: int = 0
    turned: int = 0
    dropped: int = 0

    def add(self, found: Found) -> None:
        """Count one more file."""
        self.files += 1
        for field in ("missing", "beyond", "pixels", "whole", "turned", "dropped"):
            setattr(self, field, getattr(self, field) + getattr(found, field))
        if not math.isnan(found.low):
            self.low, self.high = min(self.low, found.low), max(self.high, found.high)


class Packed(RecordBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A data set of files: per split the samples to read, each with a file per modality.

    Args:
      root: where they come from, for messages.
      data_dir, name: where TFDS stores it.
      modalities: what the files hold. A modality with `metres_per_count` may be stored as float meters.
      tasks: split -> its samples, whose `label` is a name among `label_names`.
      label_names: classes; () where there are no labels.
      recipe: the settings it is made with, beside those of this class.
      pixel_classes: modality -> the names of its class ids 0, 1, ..., where they have names.
      loaders: modality -> function of a file's name that gives its array, for files that are no pictures as `read_picture` has them.
      problems, left_out: what was wrong while the files were listed, per kind, and how many samples are left out for it.
      allow_missing, short_side, skip_bad, workers: as of `maskvit.data.builders.folder.Folder`.

    Raises ValueError for settings that do not fit.
    """

    flags = False  # whether the command has --modalities, which could read the files in another way

    def __init__(
        self,
        *,
        root: str,
        data_dir: str,
        name: str,
        modalities: Mapping[str, Modality],
        tasks: Mapping[str, Sequence[Task]],
        label_names: Sequence[str],
        recipe: Mapping[str, Any],
        pixel_classes: Mapping[str, Sequence[str]] | None = None,
        loaders: Mapping[str, Loader] | None = None,
        problems: dict[str, list[str]] | None = None,
        left_out: int = 0,
        allow_missing: Sequence[str] = (),
        short_side: int | None = None,
        skip_bad: bool = False,
        workers: int = 0,
    ):
        if short_side is not None and short_side < 1:
            raise ValueError(f"short_side is {short_side}; give a positive number of pixels, or leave it out")
        self.root, self.specs, self.tasks = root, dict(modalities), dict(tasks)
        self.loaders = dict(loaders or {})
        self.short_side, self.workers, self.skip_bad, self.allowed = short_side, workers, skip_bad, tuple(allow_missing)
        self.problems = {} if problems is None else problems
        self.left_out = left_out
        self.totals = {modality: Totals() for modality in self.specs}
        self.written: dict[str, list[Task]] = {}
        stated = stated_fields(self.specs)
        sizes = {split: len(part) for split, part in self.tasks.items()}
        recipe = dict(recipe, root=root, modalities=stated, samples=sizes, short_side=short_side)
        recipe |= {"skip_bad": True} if skip_bad else {}
        super().__init__(
            name=name, data_dir=data_dir, modalities=stated, label_names=label_names, may_lack=self.allowed, recipe=recipe,
            pixel_classes=pixel_classes,
        )  # fmt: skip

    def prepare(self) -> str:
        """As `RecordBuilder.prepare`; prints what was found and the classes of each split. Raises FolderError with all that is wrong."""
        directory = super().prepare()
        if self.written and self.label_names:
            self._leave_labels(directory)
            for split, part in self.written.items():
                print(f"{self.name}: {split}: {balance([task.label for task in part], self.label_names)}")
        for name, totals in self.totals.items():
            for line in describe(self.specs[name], totals, self.flags) if totals.files else ():
                print(f"{self.name}: {line}")
        if self.skip_bad and self.problems:
            lines = show(self.problems)
            print("\n".join([f"{self.name}: {self.left_out} samples were left out:", *lines]) + self._all_listed())
        return directory

    def _leave_labels(self, directory: str) -> None:
        """Write the labels beside the records, and the sets of labels where there are some."""
        places = {label: place for place, label in enumerate(self.label_names)}
        labels: Any = {}
        sets: Any = {}
        for split, part in self.written.items():
            labels[split] = np.array([-1 if task.label is None else places[task.label] for task in part], np.int32)
            if any(task.label_set is not None for task in part):
                sets[split] = np.zeros((len(part), len(places)), bool)
                for row, task in zip(sets[split], part, strict=True):
                    row[list(task.label_set or ())] = True
        np.savez_compressed(os.path.join(directory, LABELS), **labels)
        if sets:
            np.savez_compressed(os.path.join(directory, LABEL_SETS), **sets)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        # All is read before anything is raised, so that one run tells everything: the last split's end raises.
        self.unread = list(self.tasks)
        return {split: self._generate_examples(split) for split in self.tasks}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        self.unread.remove(split)
        written = self.written[split] = []
        for number, (task, encoded) in enumerate(self._read(split)):
            if encoded:
                fields: dict[str, Any] = {"id": f"{split}/{task.key}", **{name: encoded.get(name, b"") for name in self.specs}}
                if self.label_names:
                    fields["label"] = -1 if task.label is None else task.label
                written.append(task)
                yield number, fields
        if self.problems and not (self.skip_bad and written):
            for other in self.unread:
                for _ in self._read(other):
                    pass
            remedy = "" if self.skip_bad else "\nFix them, or leave these samples out with --skip_bad"
            raise FolderError(self.root, self.problems, self._all_listed() + remedy)

    def _read(self, split: str) -> Iterator[tuple[Task, dict[str, bytes]]]:
        tasks = self.tasks[split]
        read = functools.partial(read_sample, modalities=self.specs, short_side=self.short_side, loaders=self.loaders)
        results = progress(in_processes(read, tasks, self.workers), len(tasks), f"{self.name} {split}")
        for task, (encoded, found, problems) in zip(tasks, results, strict=True):
            problems += self._doubts(task, found)
            for kind, text in problems:
                self.problems.setdefault(kind, []).append(text)
            for name, facts in found.items():
                self.totals[name].add(facts)
            self.left_out += bool(problems)
            yield task, {} if problems else encoded

    def _doubts(self, task: Task, found: Mapping[str, Found]) -> list[tuple[str, str]]:
        """Further problems of a sample that was read, as (kind, text)."""
        return []

    def _all_listed(self) -> str:
        """Where all problems are listed, if they are too many to show."""
        if all(len(found) <= SHOWN for found in self.problems.values()):
            return ""
        path = os.path.join(os.path.dirname(os.path.dirname(str(self.data_path))), f"{self.name}_problems.txt")
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(show(self.problems, shown=sum(map(len, self.problems.values())))) + "\n")
        return f"\nAll of them are listed in {path}"


def stated_fields(specs: Mapping[str, Modality]) -> dict[str, dict[str, Any]]:
    """What a data set states of its modalities: per name the fields of `STATED` that mean something."""
    return {name: {field: getattr(spec, field) for field in STATED if _says(spec, field)} for name, spec in specs.items()}


def balance(labels: Sequence[str | None], names: Sequence[str]) -> str:
    """How the records of a split spread over the classes: all counts of up to `SHOWN` classes, else the least, the median and the most."""
    counts = collections.Counter(labels)
    without, sizes = counts.pop(None, 0), [counts[name] for name in names]
    text = f"{len(labels)} records of {sum(size > 0 for size in sizes)} classes"
    if len(names) <= SHOWN:
        text += ": " + ", ".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True))
    else:
        least, most = int(np.argmin(sizes)), int(np.argmax(sizes))
        text += f", {sizes[least]} ({names[least]}) to {sizes[most]} ({names[most]}) each, median {np.median(sizes):g}"
    return text + (f"; {without} without a label" if without else "")


def only_elsewhere(tasks: Mapping[str, Sequence[Task]]) -> list[str]:
    """A line for every class of another split that no sample of the split train has; nothing where there is no split train."""
    known = {task.label for task in tasks.get("train", ())}
    lines = []
    for split, part in tasks.items() if known else ():
        counts = collections.Counter(task.label for task in part if task.label is not None and task.label not in known)
        lines += [f"class {label!r} has {count} samples in {split} and none in train" for label, count in sorted(counts.items())]
    return lines


def describe(spec: Modality, totals: Totals, flags: bool) -> list[str]:
    """What was found in the files of a modality and how it was read, line by line; with `flags` the setting that changes it."""
    name, lines = spec.name, []
    if spec.kind == "categorical":
        ids = f"{name} has class ids {totals.low:.0f} ... {totals.high:.0f} of {spec.num_classes}"
        lines.append(ids + (f"; --modalities {name},num_classes=N changes that" if flags else ""))
    elif spec.metres_per_count:
        unit, some = spec.metres_per_count, f"whole numbers in {totals.whole} files, else float meters"
        how = "whole numbers" if totals.whole == totals.files else some if totals.whole else "float meters"
        reach = f"{name} reaches from {totals.low * unit:.4g} to {totals.high * unit:.4g} m"
        change = f"; --modalities {name},metres_per_count=X changes that" if flags else ""
        lines.append(f"{reach}: {how}, stored as counts of {unit:.6g} m{change}")
        if flags and spec.missing is None and totals.low == 0:
            lines.append(f"{name} has distances of 0 m; if 0 means that nothing was measured, add {name},missing=0")
    if spec.missing is not None or totals.missing:
        lines.append(f"{name} is missing on {totals.missing / totals.pixels:.1%} of its pixels")
    if totals.beyond:
        lines.append(f"{name} has {totals.beyond} distances that the counts cannot hold; they count as missing")
    if totals.turned:
        lines.append(f"{name}: {totals.turned} of {totals.files} pictures were turned upright, as their EXIF orientation says")
    if totals.dropped:
        lines.append(f"{name}: the alpha or further channel of {totals.dropped} of {totals.files} pictures was dropped")
    return lines


def _says(spec: Modality, field: str) -> bool:
    """Whether a field of the spec means something for its kind."""
    if field in ("channels", "metres_per_count") and spec.kind == "categorical":
        return False
    value = getattr(spec, field)
    return not (field == "num_classes" and spec.kind == "continuous") and value is not None and value == value  # NaN always means missing
