"""Published data sets, packed from the layout of their own archives: a function per data set lists what an extracted archive holds.

The table of them is `maskvit.data.builders.ARCHIVES`.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from maskvit.core.modalities import RGB, Modality, parse_modalities
from maskvit.data.builders.layout import Loader, Task, folders_in
from maskvit.data.files import list_files
from maskvit.data.pictures import SUFFIXES, read_picture

IGNORED = 255  # stored for pixels of no class
SHOWN = 10  # things told that an archive lacks


class Contents(NamedTuple):
    """What an archive holds; fields as the arguments of `maskvit.data.builders.packing.Packed`."""

    modalities: Mapping[str, Modality]
    tasks: Mapping[str, Sequence[Task]]
    label_names: tuple[str, ...] = ()
    loaders: Mapping[str, Loader] = {}
    pixel_classes: Mapping[str, tuple[str, ...]] = {}


class Archive(NamedTuple):
    """A row of the table.

    `where`: "module:function" below maskvit.data.builders, a function of `root` and the options that gives `Contents`; `what`: for
    the help; `layout`: of the extracted archive; `options`: name -> arguments of argparse's `add_argument`.
    """

    where: str
    what: str
    layout: str
    options: Mapping[str, Mapping[str, Any]] = {}

    def load(self) -> Callable[..., Contents]:
        """The function, imported."""
        module, _, function = self.where.partition(":")
        loaded: Callable[..., Contents] = getattr(importlib.import_module(f"maskvit.data.builders.{module}"), function)
        return loaded


def build(
    builder: str,
    archive: Archive,
    data_dir: str,
    root: str,
    name: str | None = None,
    short_side: int | None = None,
    skip_bad: bool = False,
    workers: int = 0,
    **options: Any,
) -> str:
    """Pack the archive extracted at `root`; the other settings as of `Packed`, `options` those of the row. Returns the data set's folder.

    Raises:
      FileNotFoundError: the archive lacks something, all of it listed.
      FolderError: files that cannot be used, as one list.
    """
    from maskvit.data.builders.packing import Packed, stated_fields

    root = os.path.abspath(os.path.expanduser(root))
    if not os.path.isdir(root):
        raise FileNotFoundError(f"no folder {root}: give the extracted archive, which holds {archive.layout}")
    contents = archive.load()(root, **options)
    packed = Packed(
        root=root, data_dir=data_dir, name=name or builder, recipe=dict(builder=builder, **options),
        short_side=short_side, skip_bad=skip_bad, workers=workers, **contents._asdict(),
    )  # fmt: skip
    directory = packed.prepare()
    for modality, fields in stated_fields(contents.modalities).items():
        shown = ", ".join(f"{key}={value!r}" for key, value in fields.items())
        print(f"{packed.name}: config.modalities.{modality} must have {shown}")
    return directory


def modalities(**declared: Mapping[str, Any]) -> dict[str, Modality]:
    """Specs of an archive: rgb, and the `declared` ones."""
    return parse_modalities({"rgb": RGB, **declared})


def require(root: str, paths: Iterable[str], layout: str) -> None:
    """Raise FileNotFoundError that lists which of `paths` (relative to `root`; folders end with "/") are missing."""
    check = lambda path: os.path.isdir if path.endswith("/") else os.path.isfile  # noqa: E731
    missing = [path for path in paths if not check(path)(os.path.join(root, path))]
    if missing:
        lines = [f"  {path}" for path in missing[:SHOWN]] + [f"  ... and {len(missing) - SHOWN} more"] * (len(missing) > SHOWN)
        raise FileNotFoundError("\n".join([f"{root} lacks {len(missing)} of what the archive holds ({layout}):", *lines]))


def pictures(folder: str) -> list[str]:
    """All pictures below `folder`, sorted. Raises FileNotFoundError where there are none."""
    files = list_files(folder, SUFFIXES).files
    if not files:
        raise FileNotFoundError(f"{folder} holds no pictures")
    return files


def stem(path: str) -> str:
    """The name of a file without folders and suffix."""
    return os.path.splitext(os.path.basename(path))[0]


def class_tasks(top: str, names: Mapping[str, str] | None = None) -> list[Task]:
    """The pictures of the class folders in `top`, labeled; `names`: folder -> class where they differ. An empty one is an error."""
    return [
        Task(f"{folder}/{stem(path)}", {"rgb": path}, names[folder] if names else folder)
        for folder in folders_in(top)
        for path in pictures(os.path.join(top, folder))
    ]


def pair(files: Sequence[str], partners: Mapping[str, str], first: str, second: str, layout: str) -> list[Task]:
    """Tasks of two modalities: each file of `first` and its partner of `second`. Raises FileNotFoundError that lists absent partners."""
    top = os.path.commonpath([os.path.dirname(path) for path in (*files, *partners.values())])
    require(top, [os.path.relpath(partners[path], top) for path in files], layout)
    return [Task(stem(path), {first: path, second: partners[path]}) for path in files]


def ids_from_one(path: str) -> Integer[np.ndarray, "h w"]:
    """Class ids of a picture in which 1, 2, ... are the classes: from 0, and `IGNORED` for 0."""
    with open(path, "rb") as file:
        ids = read_picture(file.read(), "categorical").array.astype(np.int16)
    return np.where(ids == 0, IGNORED, ids - 1).astype(np.int16)


def csv_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a CSV file with a header that names `columns`. Raises ValueError where it does not, or a row ends early."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} has no column {missing[0]!r}; its first line names {', '.join(reader.fieldnames or ()) or 'none'}")
        for row in reader:
            if any(row[name] is None for name in columns):
                raise ValueError(f"{path}, line {reader.line_num}: fewer fields than the first line has columns")
            yield reader.line_num, row


def read_json(path: str) -> Any:
    """A JSON file. Raises ValueError naming it where it is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def import_h5py() -> Any:
    """The module h5py, which is an extra. Raises ImportError that says how to get it."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError("this archive holds HDF5 files, which need h5py: python -m pip install 'maskvit[hdf5]'") from error
    return h5py
