"""The TFDS builder of a folder of pictures: <root>/[<split>/]<modality>/<class or "all">/<file>, paired by name.

Everything that is wrong with the folder is told at once, by file name, and so is what was passed over and what was assumed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np

from maskvit.core.modalities import Modality
from maskvit.data.builders.labels import BAD_LABEL, NO_LABEL, UNUSED, LabelFile, class_order, read_names
from maskvit.data.builders.layout import NO_CLASS, READ, Task, find_splits, key_of, list_modality
from maskvit.data.builders.packing import MISSING, UNKNOWN_CLASS, FolderError, Packed, only_elsewhere
from maskvit.data.builders.samples import Found, read_sample
from maskvit.data.files import tell

__all__ = ["Folder", "FolderError"]

LOOKED_AT = 4  # files read before the others, to ask for a unit that nobody stated
UNIT = "unit not stated"


class Folder(Packed, skip_registration=True):  # type: ignore[call-arg]
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
      labels: a CSV or JSON lines file of (file, class) in place of class folders (`maskvit.data.builders.labels.LabelFile`).
      class_names: a file with the name of one class a line, in the order of the labels; without one the classes found are sorted. Any
        other class is then an error, and one that the split train lacks is none.
      pixel_classes: modality of class ids -> a file with their names, one a line.

    Raises:
      FileNotFoundError: no such folder, or nothing of that layout in it.
      ValueError: settings that do not fit.
    """

    flags = True

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
        labels: str | None = None,
        class_names: str | None = None,
        pixel_classes: Mapping[str, str] | None = None,
    ):
        for argument, names in (("allow_missing", allow_missing), ("assumed", assumed)):
            if unknown := sorted(set(names) - set(modalities)):
                raise ValueError(f"{argument} names {unknown[0]!r}; modalities: {', '.join(modalities)}")
        reserved = sorted({"id", "label"} & set(modalities))
        if reserved or not modalities:
            raise ValueError(f"modality {reserved[0]!r}: the name is taken by the record's own" if reserved else "no modalities given")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction is {val_fraction}; it must lie in [0, 1)")
        self.root = os.path.abspath(os.path.expanduser(root))
        self.specs, self.skip_bad = dict(modalities), skip_bad
        self.allowed, self.assumed = tuple(allow_missing), tuple(assumed)
        self.problems: dict[str, list[str]] = {}
        self.passed_over: list[str] = []
        self.left_out = 0
        named = _pixel_classes(pixel_classes or {}, modalities)
        listed = self._list_tasks(val_fraction, seed)
        tasks, names = self._label(listed, labels, class_names)
        super().__init__(
            root=self.root,
            data_dir=data_dir,
            name=name,
            modalities=modalities,
            tasks=tasks,
            label_names=names,
            recipe=dict(builder="folder", val_fraction=val_fraction, seed=seed, allow_missing=self.allowed)
            | ({"classes": names} if labels or class_names else {})
            | ({"pixel_classes": named} if named else {}),
            pixel_classes=named,
            problems=self.problems,
            left_out=self.left_out,
            allow_missing=allow_missing,
            short_side=short_side,
            skip_bad=skip_bad,
            workers=workers,
        )

    def _label(
        self, listed: Mapping[str, Sequence[Task]], labels: str | None, class_names: str | None
    ) -> tuple[dict[str, list[Task]], tuple[str, ...]]:
        """(the samples with their classes, the classes in order). Notes what is wrong; with `skip_bad` such samples are left out."""
        names = read_names(os.path.expanduser(class_names)) if class_names else ()
        rows = LabelFile(os.path.expanduser(labels), names) if labels else None
        tasks: dict[str, list[Task]] = {}
        for split, part in listed.items():
            tasks[split] = []
            for task in part:
                label, problem = rows.label(split, task) if rows else _folder_label(task, names)
                if problem:
                    self.problems.setdefault(problem[0], []).append(problem[1])
                    if self.skip_bad:
                        self.left_out += 1
                        continue
                tasks[split].append(dataclasses.replace(task, label=label))
        if rows and (unused := rows.unused()):
            self.problems.setdefault(UNUSED, []).extend(unused)
        found = {task.label for part in tasks.values() for task in part if task.label is not None}
        if not names and (strange := only_elsewhere(tasks)):
            self.problems.setdefault(UNKNOWN_CLASS, []).extend(
                f"{line}: nothing can learn it; add samples, take it out, or state all classes with --class_names FILE" for line in strange
            )
            if self.skip_bad:
                known = {task.label for task in tasks["train"]}
                found = {label for label in known if label is not None}
                self.left_out += sum(task.label not in known for part in tasks.values() for task in part)
                tasks = {split: [task for task in part if task.label in known] for split, part in tasks.items()}
        return tasks, names or tuple(class_order(found))

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
                    raise ValueError(
                        f"val_fraction {val_fraction} of {len(everything)} samples leaves the split {split!r} empty: "
                        f"give a {'larger' if split == 'val' else 'smaller'} share"
                    )
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
        """As `Packed.prepare`; prints what was passed over first, and asks for units that nobody stated."""
        for line in self.passed_over:
            print(f"{self.name}: {line}")
        self._ask_for_units()
        return super().prepare()

    def _ask_for_units(self) -> None:
        """Raise where distances are whole numbers of a unit that nobody stated, before all files are read."""
        for name in self.assumed:
            tasks = [task for tasks in self.tasks.values() for task in tasks if name in task.files]
            for number in sorted({len(tasks) * i // LOOKED_AT for i in range(LOOKED_AT)} if tasks else ()):
                task = Task(tasks[number].key, {name: tasks[number].files[name]})
                for found in read_sample(task, self.specs, None)[1].values():
                    if found.whole:
                        raise ValueError(f"{task.files[name]}: {_asks_for_unit(self.specs[name], found)}")

    def _doubts(self, task: Task, found: Mapping[str, Found]) -> list[tuple[str, str]]:
        return [
            (UNIT, f"{task.files[name]}: {_asks_for_unit(self.specs[name], facts)}")
            for name, facts in found.items()
            if facts.whole and name in self.assumed
        ]


def _pixel_classes(files: Mapping[str, str], modalities: Mapping[str, Modality]) -> dict[str, tuple[str, ...]]:
    """The names of class ids by modality. Raises ValueError for a modality without classes, or as many names as there are no classes."""
    found = {}
    for modality, file in files.items():
        spec = modalities.get(modality)
        if spec is None or spec.kind != "categorical":
            known = ", ".join(name for name, spec in modalities.items() if spec.kind == "categorical") or "none"
            raise ValueError(f"pixel_classes names {modality!r}; modalities of class ids: {known}")
        found[modality] = read_names(os.path.expanduser(file))
        if len(found[modality]) != spec.num_classes:
            raise ValueError(f"{file} names {len(found[modality])} classes, but {modality!r} has {spec.num_classes}")
    return found


def _folder_label(task: Task, names: Sequence[str]) -> tuple[str | None, tuple[str, str] | None]:
    """(class, problem) of a sample as its folder has it; as `LabelFile.label`."""
    label = task.key.split("/")[0]
    if label == NO_CLASS:
        file = next(iter(task.files.values()))
        return None, (NO_LABEL, f"{file}: lies in no class folder, and --class_names states classes") if names else None
    if names and label not in names:
        return None, (BAD_LABEL, f"{next(iter(task.files.values()))}: its folder {label!r} is none of the {len(names)} classes")
    return label, None


def _asks_for_unit(spec: Modality, found: Found) -> str:
    return (
        f"holds whole numbers ({found.low:.0f} ... {found.high:.0f}), and their unit was not stated: give "
        f"--modalities {spec.name},metres_per_count=1/1000 for millimeters (most sensors), 1/512 for Omnidata's, or what they are"
    )
