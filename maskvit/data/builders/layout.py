"""Where the files of a folder of pictures lie: <root>/[<split>/]<modality>/<class or "all">/<file>, paired by class and name."""

from __future__ import annotations

import dataclasses
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from maskvit.data.files import ARRAYS, is_hidden, list_files
from maskvit.data.pictures import SUFFIXES

READ = (*SUFFIXES, *ARRAYS)
NO_CLASS = "all"  # the class folder of data without labels
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test")  # names by which split folders are known

TWICE, OUTSIDE, NAMES = "two files for one name", "files outside the class folders", "names that are no valid UTF-8"


Loader = Callable[[str], np.ndarray]  # the array of a file, in place of `maskvit.data.pictures.read_picture`; raises ValueError


@dataclasses.dataclass(frozen=True)
class Task:
    """One sample to read: modality -> file; `label` is its class by name, None without one; `label_set`: all that are right, by number."""

    key: str
    files: dict[str, str]
    label: str | None = None
    label_set: tuple[int, ...] | None = None


class Modal(NamedTuple):
    """The files of one modality.

    `files`: class/name without suffix -> file; `problems`: (kind, text, key or ""); `passed_over`: other files -> reason.
    """

    files: dict[str, str]
    problems: list[tuple[str, str, str]]
    passed_over: dict[str, str]


def key_of(path: str, top: str) -> str:
    """class/name of a file without its suffix. Names that differ in their Unicode form alone (as macOS makes them) are one."""
    name = os.path.splitext(os.path.relpath(path, top))[0].replace(os.sep, "/")
    name = unicodedata.normalize("NFC", name)
    return name if "/" in name else f"{NO_CLASS}/{name}"


def list_modality(folder: str) -> Modal:
    """The files of the modality in `folder`. Two files for one name, and files beside class folders, are problems."""
    listing = list_files(folder, READ)
    files: dict[str, str] = {}
    problems: list[tuple[str, str, str]] = []
    for path in listing.files:
        key = key_of(path, folder)
        try:
            key.encode()
        except UnicodeEncodeError:
            problems.append((NAMES, ascii(path), key))
            continue
        if key in files:
            problems.append((TWICE, f"{files[key]} and {path}", key))
        files[key] = path
    if len({key.split("/")[0] for key in files}) > 1:
        problems += [
            (OUTSIDE, f"{path}: the other files lie in class folders, and {NO_CLASS!r} means that there are none", key)
            for key, path in files.items()
            if key.split("/")[0] == NO_CLASS
        ]
    return Modal(files, problems, listing.passed_over)


def folders_in(folder: str) -> list[str]:
    """Names of the folders in `folder` that are not hidden, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))


def find_splits(root: str, modalities: Sequence[str]) -> dict[str, str]:
    """Split -> its folder: `root` itself as "train", or those of its folders that hold a modality.

    Raises:
      FileNotFoundError: no such folder, or none of the modalities in it.
      ValueError: modalities both in `root` and in split folders, or a split of a name that cannot be one.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"no folder {root}")
    splits = {
        entry: os.path.join(root, entry)
        for entry in folders_in(root)
        if entry not in modalities and any(os.path.isdir(os.path.join(root, entry, name)) for name in modalities)
    }
    direct = [name for name in modalities if os.path.isdir(os.path.join(root, name))]
    if direct and splits:
        raise ValueError(
            f"{root} holds {direct[0]}/ and {next(iter(splits))}/ with modalities of its own: what is the split of {direct[0]}/? "
            "Give each split a folder, or none"
        )
    for split in splits:
        if not re.fullmatch(r"\w+", split):
            raise ValueError(f"{os.path.join(root, split)} is a split by what it holds, but its name is none: use letters, digits and _")
    if direct:
        return {"train": root}
    if not splits:
        raise FileNotFoundError(
            f"{root} holds none of the modalities {', '.join(modalities)}: expected {root}/<modality>/<class or {NO_CLASS}>/<file>, "
            f"or one such tree per split ({root}/train/..., {root}/val/...)"
            + (
                f"; it holds {', '.join(folders_in(root)[:5])}: if these are classes, move them into {root}/rgb/"
                if folders_in(root)
                else ""
            )
        )
    return splits


def find_modalities(root: str) -> list[str]:
    """The modalities that a folder seems to hold: its folders, or those in its split folders, that hold files that are read.

    Raises FileNotFoundError where there is no such folder, or nothing of that layout in it.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"no folder {root}")
    splits = [name for name in folders_in(root) if name.lower() in SPLITS]
    tops = [os.path.join(root, split) for split in splits] or [root]
    found = {name for top in tops for name in folders_in(top) if list_files(os.path.join(top, name), READ).files}
    if not found:
        loose = [name for top in tops for name in os.listdir(top) if os.path.splitext(name)[1].lower() in READ]
        raise FileNotFoundError(
            f"{root} holds no folder with pictures or arrays: expected {root}/<modality>/<class or {NO_CLASS}>/<file>"
            + (f"; {len(loose)} files lie beside the folders (such as {sorted(loose)[0]}): move them into {tops[0]}/rgb/" if loose else "")
        )
    return sorted(found)
