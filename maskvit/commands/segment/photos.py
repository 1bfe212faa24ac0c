"""Photos and their label maps: found, paired by name and checked before any model runs.

A label map is a picture of class ids in one channel, of the size of its photo; 255 means that a pixel is not labeled.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer, UInt8

from maskvit.core.errors import all_mistakes
from maskvit.core.patches import resampling_matrix
from maskvit.data.builders.labels import read_names
from maskvit.data.builders.layout import list_modality
from maskvit.data.files import tell
from maskvit.data.pictures import misaligned, read_picture

NOT_LABELED = 255


class Labeled(NamedTuple):
    """A photo with its label map.

    `name`: of both files, without folder "all" and suffix; `size`: (height, width) of the photo turned upright; `ids`: of the same size,
    `NOT_LABELED` where a pixel has no label.
    """

    name: str
    photo: Path
    mask: Path
    ids: UInt8[np.ndarray, "h w"]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.ids.shape[0], self.ids.shape[1]


def find_pairs(photos: Path, masks: Path) -> list[tuple[str, Path, Path]]:
    """(name, photo, label map) of every photo below `photos`, in the order of names.

    Raises FileNotFoundError for a folder that is not there or holds no photo; `Mistakes` for photos without a map, maps without a photo,
    and files that are not read.
    """
    for folder in (photos, masks):
        if not folder.is_dir():
            layout = ": photos belong in DIR/rgb/ and label maps of the same names in DIR/semseg/" if masks.name == "semseg" else ""
            raise FileNotFoundError(f"{folder} is no folder{layout}")
    found = [list_modality(str(folder)) for folder in (photos, masks)]
    if not found[0].files:
        raise FileNotFoundError("\n  ".join([f"no photos below {photos}", *tell(found[0].passed_over, photos)]))
    with all_mistakes() as checks:
        for folder, modal in zip((photos, masks), found, strict=True):
            checks.mistakes += [text for _, text, _ in modal.problems]
            passed_over = {path: reason for path, reason in modal.passed_over.items() if reason != "hidden"}
            checks.mistakes += [f"{folder}: {line}" for line in tell(passed_over, folder)]
        names, others = (modal.files for modal in found)
        lacking = {key: path for key, path in names.items() if key not in others}
        checks.mistakes += [f"{path} has no label map: expected {_bare(key)}.png in {masks}" for key, path in lacking.items()]
        checks.mistakes += [f"{path} has no photo of its name in {photos}" for key, path in others.items() if key not in names]
    return [(_bare(key), Path(path), Path(others[key])) for key, path in names.items()]


def _bare(key: str) -> str:
    return key.removeprefix("all/")


def read_labeled(pairs: Sequence[tuple[str, Path, Path]], names: Sequence[str], source: str) -> list[Labeled]:
    """The label maps of some photos.

    `names`: of the classes, from the file `source`; () takes any id below 255. Raises `Mistakes` that name each file and what is wrong.
    """
    labeled = []
    with all_mistakes() as checks:
        for name, photo, mask in pairs:
            with checks.check(OSError):
                labeled.append(Labeled(name, photo, mask, _read_ids(photo, mask, names, source)))
    return labeled


def _read_ids(photo: Path, mask: Path, names: Sequence[str], source: str) -> UInt8[np.ndarray, "h w"]:
    pictures = {}
    for kind, path in (("continuous", photo), ("categorical", mask)):
        try:
            pictures[path] = read_picture(path.read_bytes(), kind)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    ids = pictures[mask].array
    sizes = {str(path): (picture.array.shape[0], picture.array.shape[1]) for path, picture in pictures.items()}
    (height, width), (rows, columns) = sizes.values()
    if (rows, columns) != (height, width):
        raise ValueError(f"{mask} is {columns} x {rows} pixels, but its photo {photo} is {width} x {height}: they must have one size")
    if reason := misaligned({str(path): picture.orientation for path, picture in pictures.items()}, sizes):
        raise ValueError(reason)
    most = len(names) if names else NOT_LABELED
    if outside := [int(i) for i in np.unique(ids) if i != NOT_LABELED and not 0 <= i < most]:
        count = int(np.isin(ids, outside).sum())
        told = ", ".join(map(str, outside[:5])) + (", ..." if len(outside) > 5 else "")
        allowed = f"{source} names the classes 0 ... {most - 1}" if names else f"class ids are 0 ... {most - 1}"
        raise ValueError(f"{mask} has the class id {told} on {count} pixels, but {allowed}, and {NOT_LABELED} means not labeled")
    return ids.astype(np.uint8)


def class_names(labeled: Sequence[Labeled], file: Path | None) -> tuple[str, ...]:
    """The names in `file`, one a line; without one the ids up to the highest that is labeled."""
    if file is not None:
        return read_names(os.fspath(file))
    return tuple(map(str, range(max((int(i.max()) + 1 for one in labeled if (i := one.ids[one.ids != NOT_LABELED]).size), default=0))))


def photos_by_class(labeled: Sequence[Labeled], num_classes: int) -> Int[np.ndarray, " k"]:
    """In how many photos each class is labeled."""
    there = [np.bincount(one.ids[one.ids != NOT_LABELED], minlength=num_classes) > 0 for one in labeled]
    return np.stack(there).sum(axis=0)


def check_enough(labeled: Sequence[Labeled], names: Sequence[str], root: Path) -> list[str]:
    """Raise ValueError where nothing can be learned from the labels; returns warnings about classes that too few photos have."""
    counts = photos_by_class(labeled, len(names))
    if not counts.any():
        raise ValueError(f"no pixel of the {len(labeled)} label maps below {root} is labeled: all of them are {NOT_LABELED}")
    if (counts > 0).sum() < 2:
        only = names[int(counts.argmax())]
        raise ValueError(f"only the class {only!r} is labeled below {root}: a segmenter needs at least two classes")
    if sum(bool((one.ids != NOT_LABELED).any()) for one in labeled) < 2:
        raise ValueError(f"only one photo below {root} is labeled: at least two are needed, one to learn from and one to check with")
    missing = [name for name, count in zip(names, counts, strict=True) if not count]
    warnings = [
        f"the class {name!r} is labeled in one photo only: where that photo is left out it cannot be learned, and scores as wrong"
        for name, count in zip(names, counts, strict=True)
        if count == 1
    ]
    if missing and not all(name.isdecimal() for name in missing):
        warnings.append(f"no photo is labeled with {', '.join(missing)}: such pixels will get another class")
    empty = [str(one.mask) for one in labeled if not (one.ids != NOT_LABELED).any()]
    return warnings + [f"{path} has no labeled pixel" for path in empty]


# Label maps at the model's size


def label_counts(ids: UInt8[np.ndarray, "h w"], size: tuple[int, int], num_classes: int) -> Int[np.ndarray, "u v k"]:
    """How many labeled pixels of each class fall on every pixel of the photo squeezed to `size` = (u, v)."""
    rows, columns = (_cells(old, new) for old, new in zip(ids.shape, size, strict=True))
    known = ids != NOT_LABELED
    cells = (rows[:, None] * size[1] + columns)[known] * num_classes + ids[known]
    return np.bincount(cells, minlength=size[0] * size[1] * num_classes).reshape(*size, num_classes).astype(np.int32)


def enlarged(ids: Integer[np.ndarray, "u v"], size: tuple[int, int]) -> Integer[np.ndarray, "h w"]:
    """A map of the squeezed photo at the photo's own (height, width), by the cells of `label_counts`."""
    rows, columns = (_cells(new, old) for old, new in zip(ids.shape, size, strict=True))
    return ids[np.ix_(rows, columns)]


def _cells(pixels: int, cells: int) -> Int[np.ndarray, " p"]:
    """The cell that the center of each of `pixels` pixels lies in."""
    return ((np.arange(pixels) + 0.5) * cells / pixels).astype(np.int64)


def patch_labels(counts: Int[np.ndarray, "u v k"], patch: int) -> Int[np.ndarray, " n"]:
    """The class that most labeled pixels of each patch have, row by row; -1 where none is labeled, the least of equal ones."""
    height, width, num_classes = counts.shape
    of_patch = counts.reshape(height // patch, patch, width // patch, patch, num_classes).sum(axis=(1, 3)).reshape(-1, num_classes)
    return np.where(of_patch.any(axis=1), of_patch.argmax(axis=1), -1)


def class_map(scores: Float[np.ndarray, "n k"], grid: tuple[int, int], size: tuple[int, int]) -> Int[np.ndarray, "u v"]:
    """The class of the greatest score at every pixel of `size`; scores of patches are resampled bilinearly."""
    rows, columns = (resampling_matrix(old, new, "bilinear") for old, new in zip(grid, size, strict=True))
    fine = np.einsum("ui,ijk,vj->uvk", rows, scores.reshape(*grid, -1), columns, optimize=True)
    return fine.argmax(axis=-1).astype(np.int32)


def confusion(predicted: Int[np.ndarray, "u v"], counts: Int[np.ndarray, "u v k"]) -> Int[np.ndarray, "k k"]:
    """Labeled pixels by (their class, the class that they are given)."""
    num_classes = counts.shape[-1]
    given = np.eye(num_classes, dtype=np.int64)[predicted.reshape(-1)]
    return counts.reshape(-1, num_classes).T.astype(np.int64) @ given
