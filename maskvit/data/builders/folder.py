"""The TFDS builder of a folder of pictures: <root>/[<split>/]<modality>/<class or "all">/<file>, paired by name.

Everything that is wrong with the folder is told at once, by file name, and so is what was passed over and what was assumed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from maskvit.core.errors import printable
from maskvit.core.modalities import Modality
from maskvit.data.builders.layout import NO_CLASS, READ, Task, find_splits, key_of, list_modality
from maskvit.data.builders.records import RecordBuilder, in_processes, progress
from maskvit.data.builders.samples import Found, read_sample
from maskvit.data.files import tell
from maskvit.data.sources import STATED

SHOWN = 20  # files listed per kind of problem
LOOKED_AT = 4  # files read before the others, to ask for a unit that nobody stated
MISSING, UNIT = "missing files", "unit not stated"


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


class Folder(RecordBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A folder of pictures: <root>/[<split>/]<modality>/<class or "all">/<file>, modalities paired by class and name.

    Args:
      root: the folder; a tree without split folders is the split "train".
      data_dir, name: where TFDS stores it.
      modalities: what to read, by folder name. A modality with `metres_per_count` may be stored as float meters (.npy, .npz, .tif).
      val_fraction: share of the samples of a tree without split folders that becomes the split "val", drawn by `seed`.
      allow_missing: modalities that a sample may lack; any other absence is an error.
      short_side: make larger pictures smaller, so that the shorter side has this many pixels.
      skip_bad: leave out the samples that have a problem, and list them, in place of an error.
      assumed: modalities whose `metres_per_count` is a default that nobody stated; files of whole numbers are then an error.
      workers: processes that read and encode; 0 does it in this one.

    Raises:
      FileNotFoundError: no such folder, or nothing of that layout in it.
      ValueError: settings that do not fit.
    """

    def __init__(
        self,
        *,
        root: str,
        data_dir: str,
        name: str,
        modalities: Mapping[str, Modality],
        val_fraction: float = 0.0,
        seed: int = 0,
        allow_missing: Sequence[str] = (),
        short_side: int | None = None,
        skip_bad: bool = False,
        assumed: Sequence[str] = (),
        workers: int = 0,
    ):
        for argument, names in (("allow_missing", allow_missing), ("assumed", assumed)):
            if unknown := sorted(set(names) - set(modalities)):
                raise ValueError(f"{argument} names {unknown[0]!r}; modalities: {', '.join(modalities)}")
        reserved = sorted({"id", "label"} & set(modalities))
        if reserved or not modalities:
            raise ValueError(f"modality {reserved[0]!r}: the name is taken by the record's own" if reserved else "no modalities given")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction is {val_fraction}; it must lie in [0, 1)")
        if short_side is not None and short_side < 1:
            raise ValueError(f"short_side is {short_side}; give a positive number of pixels, or leave it out")
        self.root = os.path.abspath(os.path.expanduser(root))
        self.specs = dict(modalities)
        self.short_side, self.workers, self.skip_bad = short_side, workers, skip_bad
        self.allowed, self.assumed = tuple(allow_missing), tuple(assumed)
        self.problems: dict[str, list[str]] = {}
        self.passed_over: list[str] = []
        self.left_out = 0
        self.tasks = self._list_tasks(val_fraction, seed)
        self.totals = {modality: Totals() for modality in self.specs}
        classes = sorted({task.key.split("/")[0] for tasks in self.tasks.values() for task in tasks})
        stated = {
            modality: {field: getattr(spec, field) for field in STATED if _says(spec, field)} for modality, spec in self.specs.items()
        }
        super().__init__(
            name=name,
            data_dir=data_dir,
            modalities=stated,
            label_names=() if classes == [NO_CLASS] else classes,
            may_lack=self.allowed,
            recipe=dict(
                builder="folder",
                root=self.root,
                modalities=stated,
                samples={split: len(tasks) for split, tasks in self.tasks.items()},
                val_fraction=val_fraction,
                seed=seed,
                allow_missing=self.allowed,
                short_side=short_side,
            )
            | ({"skip_bad": True} if skip_bad else {}),
        )

    def _list_tasks(self, val_fraction: float, seed: int) -> dict[str, list[Task]]:
        splits = find_splits(self.root, list(self.specs))
        if val_fraction and set(splits) != {"train"}:
            raise ValueError(f"val_fraction is {val_fraction}, but {self.root} has the splits {', '.join(splits)} already: leave it out")
        tasks = {split: self._list_split(root) for split, root in splits.items()}
        if self.root not in splits.values():
            self._pass_over(self.root, list(splits), "holds none of the modalities")
        for name in self.allowed:
            if not any(name in task.files for part in tasks.values() for task in part):
                raise FileNotFoundError(f"{self.root} holds no file at all for {name!r}: samples may lack it, but not all of them")
        if val_fraction:
            everything = tasks["train"]
            count = round(val_fraction * len(everything))
            chosen = set(np.random.default_rng(seed).permutation(len(everything))[:count].tolist())
            tasks = {
                "train": [task for number, task in enumerate(everything) if number not in chosen],
                "val": [everything[number] for number in sorted(chosen)],
            }
            for split, part in tasks.items():
                if not part:
                    raise ValueError(f"val_fraction {val_fraction} of {len(everything)} samples leaves the split {split!r} empty")
        return tasks

    def _list_split(self, root: str) -> list[Task]:
        """The samples below `root`. Notes problems and what is passed over; with `skip_bad` samples with a problem are left out."""
        files: dict[str, dict[str, str]] = {}
        bad: set[str] = set()
        unread: dict[tuple[str, str], str] = {}
        for name in self.specs:
            folder = os.path.join(root, name)
            if not os.path.isdir(folder):
                files[name] = {}
                continue
            files[name], problems, passed_over = list_modality(folder)
            self.passed_over += [f"{os.path.relpath(folder, self.root)}: {line}" for line in tell(passed_over, folder)]
            unread |= {(name, key_of(path, folder)): f"{path}: {reason}" for path, reason in passed_over.items() if reason != "hidden"}
            for kind, text, key in problems:
                self.problems.setdefault(kind, []).append(text)
                bad.add(key)
        self._pass_over(root, list(self.specs), "not among the modalities")
        keys = sorted(set().union(*files.values()))
        if not keys:
            raise FileNotFoundError(
                "\n  ".join(
                    [
                        f"{root} holds no files for {', '.join(self.specs)}: expected <modality>/<class or all>/<file> with one of "
                        f"{', '.join(READ)}",
                        *self.passed_over,
                    ]
                )
            )
        for name in (name for name in self.specs if name not in self.allowed):
            lacking = [key for key in keys if key not in files[name]]
            bad.update(lacking)
            if len(lacking) == len(keys) and not any((name, key) in unread for key in lacking):
                self.problems.setdefault(MISSING, []).append(
                    f"{os.path.join(root, name)}: no file at all for {name!r}; if there are none, leave it out of --modalities"
                )
                continue
            for key in lacking:
                text = unread.get((name, key), os.path.join(root, name, key) + ".*")
                self.problems.setdefault(MISSING, []).append(text)
        if self.skip_bad:
            self.left_out += len(bad & set(keys))
            keys = [key for key in keys if key not in bad]
        return [Task(key, {name: found[key] for name, found in files.items() if key in found}) for key in keys]

    def _pass_over(self, folder: str, known: Sequence[str], reason: str) -> None:
        """Note what lies in `folder` beside the `known` folders."""
        others = {entry.path: reason for entry in os.scandir(folder) if entry.name not in known}
        self.passed_over += [f"{os.path.relpath(folder, self.root)}: {line}" for line in tell(others, folder)]

    def prepare(self) -> str:
        """As `RecordBuilder.prepare`; prints what was passed over, found and assumed. Raises FolderError with all that is wrong."""
        for line in self.passed_over:
            print(f"{self.name}: {line}")
        self._ask_for_units()
        directory = super().prepare()
        for name, totals in self.totals.items():
            for line in describe(self.specs[name], totals) if totals.files else ():
                print(f"{self.name}: {line}")
        if self.skip_bad and self.problems:
            lines = show(self.problems)
            print("\n".join([f"{self.name}: {self.left_out} samples were left out:", *lines]) + self._all_listed())
        return directory

    def _ask_for_units(self) -> None:
        """Raise where distances are whole numbers of a unit that nobody stated, before all files are read."""
        for name in self.assumed:
            tasks = [task for tasks in self.tasks.values() for task in tasks if name in task.files]
            for number in sorted({len(tasks) * i // LOOKED_AT for i in range(LOOKED_AT)} if tasks else ()):
                task = Task(tasks[number].key, {name: tasks[number].files[name]})
                for found in read_sample(task, self.specs, None)[1].values():
                    if found.whole:
                        raise ValueError(f"{task.files[name]}: {_asks_for_unit(self.specs[name], found)}")

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        # All is read before anything is raised, so that one run tells everything: the last split's end raises.
        self.unread = list(self.tasks)
        return {split: self._generate_examples(split) for split in self.tasks}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        self.unread.remove(split)
        written = 0
        for number, (task, encoded) in enumerate(self._read(split)):
            if encoded:
                fields: dict[str, Any] = {"id": f"{split}/{task.key}", **{name: encoded.get(name, b"") for name in self.specs}}
                if self.label_names:
                    fields["label"] = task.key.split("/")[0]
                written += 1
                yield number, fields
        if self.problems and not (self.skip_bad and written):
            for other in self.unread:
                for _ in self._read(other):
                    pass
            remedy = "" if self.skip_bad else "\nFix them, or leave these samples out with --skip_bad"
            raise FolderError(self.root, self.problems, self._all_listed() + remedy)

    def _read(self, split: str) -> Iterator[tuple[Task, dict[str, bytes]]]:
        tasks = self.tasks[split]
        read = functools.partial(read_sample, modalities=self.specs, short_side=self.short_side)
        results = progress(in_processes(read, tasks, self.workers), len(tasks), f"{self.name} {split}")
        for task, (encoded, found, problems) in zip(tasks, results, strict=True):
            problems += [
                (UNIT, f"{task.files[name]}: {_asks_for_unit(self.specs[name], facts)}")
                for name, facts in found.items()
                if facts.whole and name in self.assumed
            ]
            for kind, text in problems:
                self.problems.setdefault(kind, []).append(text)
            for name, facts in found.items():
                self.totals[name].add(facts)
            self.left_out += bool(problems)
            yield task, {} if problems else encoded

    def _all_listed(self) -> str:
        """Where all problems are listed, if they are too many to show."""
        if all(len(found) <= SHOWN for found in self.problems.values()):
            return ""
        path = os.path.join(os.path.dirname(os.path.dirname(str(self.data_path))), f"{self.name}_problems.txt")
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(show(self.problems, shown=sum(map(len, self.problems.values())))) + "\n")
        return f"\nAll of them are listed in {path}"


def _asks_for_unit(spec: Modality, found: Found) -> str:
    return (
        f"holds whole numbers ({found.low:.0f} ... {found.high:.0f}), and their unit was not stated: give "
        f"--modalities {spec.name},metres_per_count=1/1000 for millimeters (most sensors), 1/512 for Omnidata's, or what they are"
    )


def describe(spec: Modality, totals: Totals) -> list[str]:
    """What was found in the files of a modality and how it was read, with the setting that changes it, line by line."""
    name, lines = spec.name, []
    if spec.kind == "categorical":
        ids = f"{name} has class ids {totals.low:.0f} ... {totals.high:.0f} of {spec.num_classes}"
        lines.append(f"{ids}; --modalities {name},num_classes=N changes that")
    elif spec.metres_per_count:
        unit, some = spec.metres_per_count, f"whole numbers in {totals.whole} files, else float meters"
        how = "whole numbers" if totals.whole == totals.files else some if totals.whole else "float meters"
        reach = f"{name} reaches from {totals.low * unit:.4g} to {totals.high * unit:.4g} m"
        lines.append(f"{reach}: {how}, stored as counts of {unit:.6g} m; --modalities {name},metres_per_count=X changes that")
        if spec.missing is None and totals.low == 0:
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
