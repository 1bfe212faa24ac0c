"""NYU Depth V2, the 1,449 labeled frames: rgb, depth and 40 classes, 480 x 640, with the official split of 795 and 654."""

from __future__ import annotations

import functools
import os
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, UInt8, UInt16

from maskvit.core.modalities import DEPTH, SEMSEG
from maskvit.data.builders.archives import IGNORED, Contents, import_h5py, modalities, require
from maskvit.data.builders.layout import Task

LABELED, SPLITS, CLASSES = "nyu_depth_v2_labeled.mat", "splits.mat", "classMapping40.mat"
NUM_CLASSES = 40
# MultiMAE stores floor(meters * 65536 / 10).
COUNTS_PER_METER = 65536 / 10
DEPTHS = {"filled": "depths", "raw": "rawDepths"}


def nyuv2(root: str, depth: Literal["filled", "raw"] = "filled") -> Contents:
    """The folder with `LABELED`, `SPLITS` and `CLASSES`. Splits "train" and "test"; ids are the frames' positions from 0.

    Classes: the 894 of the file to 40 by `CLASSES`; class k (1 ... 40) is k - 1, pixels without a label are ignored. Depth is in counts
    of 10 / 65,536 m, 0 where nothing was measured.

    Args:
      depth: "filled" takes the depth whose holes were painted in, "raw" what the sensor measured.

    Raises:
      FileNotFoundError: what is missing.
      ImportError: h5py is not installed.
      ValueError: files that are not what their names say.
    """
    if depth not in DEPTHS:
        raise ValueError(f"depth is {depth!r}; known: {', '.join(DEPTHS)}")
    require(root, (LABELED, SPLITS, CLASSES), ", ".join((LABELED, SPLITS, CLASSES)))
    _open.cache_clear()  # the files may be others than those of an earlier call
    _class_table.cache_clear()
    path = os.path.join(root, LABELED)
    stored = _open(path)
    missing = [name for name in ("images", "labels", DEPTHS[depth]) if name not in stored]
    if missing:
        raise ValueError(f"{path} holds no array {missing[0]!r}; it holds {', '.join(sorted(stored))}")
    count = stored["images"].shape[0]
    _class_table(root)
    parts = {split: _positions(os.path.join(root, SPLITS), key, count) for split, key in (("train", "trainNdxs"), ("test", "testNdxs"))}
    if both := sorted(set(parts["train"]) & set(parts["test"])):
        raise ValueError(f"{os.path.join(root, SPLITS)} has the frame {both[0] + 1} in both splits")
    names = {"rgb": "images", "depth": DEPTHS[depth], "semseg": "labels"}
    tasks = {
        split: [Task(f"{number:04d}", {modality: f"{path}#{name}#{number}" for modality, name in names.items()}) for number in part]
        for split, part in parts.items()
    }
    specs = modalities(
        depth={**DEPTH, "missing": 0, "metres_per_count": 1 / COUNTS_PER_METER},
        semseg={**SEMSEG, "num_classes": NUM_CLASSES, "missing": IGNORED},
    )
    loaders = {"rgb": load_rgb, "depth": load_depth, "semseg": load_classes}
    return Contents(specs, tasks, loaders=loaders, pixel_classes=_class_names(os.path.join(root, CLASSES)))


@functools.lru_cache(maxsize=1)
def _open(path: str) -> Any:
    """The labeled file, opened once per process."""
    try:
        return import_h5py().File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is no HDF5 file, or a truncated one: {error}") from error


def _matrix(path: str, key: str) -> Int[np.ndarray, " n"]:
    """The whole numbers `key` of a small MATLAB file, flat."""
    from scipy.io import loadmat

    try:
        return loadmat(path)[key].astype(np.int64).reshape(-1)
    except (KeyError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} holds no numbers {key!r}: {error}") from error


def _positions(path: str, key: str, count: int) -> list[int]:
    """Positions from 0 out of MATLAB's from 1, sorted."""
    numbers = sorted(_matrix(path, key).tolist())
    if not numbers or len(set(numbers)) < len(numbers) or not 1 <= numbers[0] <= numbers[-1] <= count:
        raise ValueError(f"{path}: {key} holds {len(numbers)} numbers; different ones of 1 ... {count} are expected")
    return [number - 1 for number in numbers]


@functools.lru_cache(maxsize=1)
def _class_table(root: str) -> UInt8[np.ndarray, " n"]:
    """Class of the file (0: none) -> class 0 ... 39, or ignored."""
    classes = _matrix(os.path.join(root, CLASSES), "mapClass")
    if not len(classes) or classes.min() < 1 or classes.max() > NUM_CLASSES:
        raise ValueError(f"{os.path.join(root, CLASSES)}: mapClass must name classes 1 ... {NUM_CLASSES}")
    return np.concatenate([[IGNORED], classes - 1]).astype(np.uint8)


def _class_names(path: str) -> dict[str, tuple[str, ...]]:
    """What the file of the 40 classes calls them, where it does."""
    from scipy.io import loadmat

    found = loadmat(path).get("className")
    names = () if found is None else tuple(str(np.asarray(cell).reshape(-1)[0]) for cell in found.reshape(-1) if np.asarray(cell).size)
    return {"semseg": names} if len(names) == NUM_CLASSES else {}


def _frame(place: str) -> np.ndarray:
    """The frame of "FILE#array#number", as MATLAB stores it: the last axis first."""
    path, name, number = place.rsplit("#", 2)
    frame: np.ndarray = _open(path)[name][int(number)]
    return frame.T  # "c w h" or "w h" to "h w c" or "h w"


def load_rgb(place: str) -> UInt8[np.ndarray, "h w 3"]:
    """The picture of a frame."""
    return np.ascontiguousarray(_frame(place))


def load_depth(place: str) -> UInt16[np.ndarray, "h w"]:
    """Depth in counts, 0 where there is none. Raises ValueError for 10 m and more, which the counts do not hold."""
    meters = _frame(place).astype(np.float64)
    measured = np.isfinite(meters) & (meters > 0)
    if (meters >= 10).any():
        raise ValueError(f"has a depth of {np.nanmax(meters):.4g} m; this camera measures less than 10 m")
    return np.floor(np.where(measured, meters, 0) * COUNTS_PER_METER).astype(np.uint16)


def load_classes(place: str) -> UInt8[np.ndarray, "h w"]:
    """Classes 0 ... 39, and `IGNORED`."""
    ids = _frame(place).astype(np.int64)
    table = _class_table(os.path.dirname(place.rsplit("#", 2)[0]))
    if ids.max(initial=0) >= len(table):
        raise ValueError(f"has the class {ids.max()}; {CLASSES} names 1 ... {len(table) - 1}")
    return table[ids]
