"""Taskonomy, tiny split: rgb and eight targets, made smaller and encoded as MultiMAE's fine-tuning has them.

Source: MultiMAE's utils/taskonomy. Stored values times `scale` (`TARGETS`) are MultiMAE's targets.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int16, UInt8, UInt16
from PIL import Image

from maskvit.core.modalities import DEPTH
from maskvit.data.builders.archives import Contents, csv_rows, modalities, require
from maskvit.data.builders.layout import Task
from maskvit.data.pictures import read_picture

FULL = 65535
BLUR = (0.27406862, 0.45186276, 0.27406862)  # a Gaussian of deviation 1 at -1, 0 and 1
CELL = 4  # pixels: one without a value takes all of its cell with it
LAYOUT = "<task>/<building>/point_<p>_view_<v>_domain_<task>.png"


class Target(NamedTuple):
    """`most`: stored values above it are cut to it; `channels`: None for one channel of 16 bits, else the first so many of 8 bits."""

    modality: str
    scale: float
    most: int = FULL - 1
    channels: int | None = None
    more: Mapping[str, Any] = {}


TARGETS = {
    "depth_zbuffer": Target("depth", 1 / 8000, 8000, more=dict(metres_per_count=DEPTH["metres_per_count"])),
    "edge_texture": Target("edge_texture", 4 / FULL, FULL // 4),
    "edge_occlusion": Target("edge_occlusion", 1 / FULL),
    "keypoints2d": Target("keypoints2d", 1 / FULL),
    "keypoints3d": Target("keypoints3d", 1 / FULL),
    "normal": Target("normal", 1 / 255, 255, 3),
    "principal_curvature": Target("principal_curvature", 1 / 255, 255, 2),
    "reshading": Target("reshading", 1 / 255, 255, 1),
}


def taskonomy(
    root: str,
    splits: str | None = None,
    tasks: Sequence[str] = (),
    num_train: int | None = 800,
    num_val: int | None = 200,
    num_test: int | None = None,
    side: int = 384,
) -> Contents:
    """<root>/<task>/<building>/point_<p>_view_<v>_domain_<task>.png of rgb, mask_valid and the targets.

    Args:
      splits: folder of tiny_train.csv, tiny_val.csv and tiny_test.csv with the columns building, point, view; <root>/splits by default.
      tasks: names in `TARGETS`; all by default.
      num_train, num_val, num_test: the first so many rows of a list; None takes all, 0 leaves the split out.
      side: pixels of the shorter side; rgb is resized bilinearly, targets to the nearest pixel, before they are encoded.

    Raises:
      FileNotFoundError: what is missing, files of single views included.
      ValueError: an unknown task, or a list with too few rows.
    """
    chosen = tuple(tasks) or tuple(TARGETS)
    if unknown := [task for task in chosen if task not in TARGETS]:
        raise ValueError(f"tasks names {unknown[0]!r}; known: {', '.join(TARGETS)}")
    if side < 8:
        raise ValueError(f"side is {side}; give at least 8 pixels")
    folder = os.path.expanduser(splits) if splits else os.path.join(root, "splits")
    counts = {name: count for name, count in (("train", num_train), ("val", num_val), ("test", num_test)) if count != 0}
    require(root, [f"{name}/" for name in ("rgb", "mask_valid", *chosen)], LAYOUT)
    require(folder, [f"tiny_{split}.csv" for split in counts], "lists of views; num_test=0 leaves that one out")
    listed = {split: _views(os.path.join(folder, f"tiny_{split}.csv"), f"num_{split}", count) for split, count in counts.items()}
    parts = {split: [_task(root, *view, chosen) for view in views] for split, views in listed.items()}
    files = sorted({file for part in parts.values() for task in part for place in task.files.values() for file in place.split("#")})
    require(root, [os.path.relpath(file, root) for file in files], LAYOUT)
    specs = modalities(**{TARGETS[task].modality: _declare(TARGETS[task]) for task in chosen})
    loaders: dict[str, Any] = {TARGETS[task].modality: functools.partial(load_target, task=task, side=side) for task in chosen}
    return Contents(specs, parts, loaders={"rgb": functools.partial(load_rgb, side=side), **loaders})


def _declare(target: Target) -> dict[str, Any]:
    missing = FULL if target.channels is None else -1
    return dict(channels=target.channels or 1, loss="l1", scale=target.scale, missing=missing, **target.more)


def _views(path: str, name: str, count: int | None) -> list[tuple[str, int, int]]:
    """(building, point, view) of the first `count` rows."""
    rows: list[tuple[str, int, int]] = []
    for line, row in csv_rows(path, ("building", "point", "view")):
        if len(rows) == count:
            break
        try:
            rows.append((row["building"].strip(), int(row["point"]), int(row["view"])))
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: point and view must be whole numbers") from error
    if not rows or (count is not None and len(rows) < count):
        raise ValueError(f"{path} has {len(rows)} rows; {name} is {count}: lower it")
    return rows


def _task(root: str, building: str, point: int, view: int, chosen: Sequence[str]) -> Task:
    place = lambda folder, domain: os.path.join(root, folder, building, f"point_{point}_view_{view}_domain_{domain}.png")  # noqa: E731
    mask = place("mask_valid", "depth_zbuffer")
    targets = {TARGETS[task].modality: f"{place(task, task)}#{mask}" for task in chosen}
    return Task(f"{building}/point_{point}_view_{view}", {"rgb": place("rgb", "rgb"), **targets})


def _resized(array: np.ndarray, side: int, how: Image.Resampling) -> np.ndarray:
    """`array` with `side` pixels on its shorter side, the longer one rounded down, as torchvision's Resize has it."""
    height, width = array.shape[:2]
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    return np.array(Image.fromarray(array).resize(size, how))


def load_rgb(path: str, side: int) -> UInt8[np.ndarray, "h w 3"]:
    """The picture, made smaller."""
    with open(path, "rb") as file:
        array = read_picture(file.read(), channels=3).array
    return _resized(array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2), side, Image.Resampling.BILINEAR)


def valid_cells(valid: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Where all pixels of the aligned cell of `CELL` x `CELL` are valid."""
    height, width = valid.shape
    padded = np.pad(valid, ((0, -height % CELL), (0, -width % CELL)), constant_values=True)
    cells = padded.reshape(padded.shape[0] // CELL, CELL, -1, CELL).all(axis=(1, 3))
    return cells.repeat(CELL, 0).repeat(CELL, 1)[:height, :width]


def blurred(array: UInt16[np.ndarray, "h w"]) -> UInt16[np.ndarray, "h w"]:
    """A Gaussian of 3 x 3 pixels and deviation 1, mirrored at the edges."""
    values = np.pad(array.astype(np.float64), 1, mode="reflect")
    for axis in (0, 1):
        bands = [values.take(range(i, i + values.shape[axis] - 2), axis) for i in range(len(BLUR))]
        values = np.tensordot(BLUR, bands, axes=1)
    return np.rint(values).astype(np.uint16)


def load_target(place: str, task: str, side: int) -> UInt16[np.ndarray, "h w"] | Int16[np.ndarray, "h w *c"]:
    """The target of "FILE#MASK", made smaller and encoded; without a value (65,535, or -1 of 8-bit targets) where the mask says so."""
    path, _, mask = place.rpartition("#")
    target = TARGETS[task]
    with open(path, "rb") as file, open(mask, "rb") as other:
        array = read_picture(file.read()).array
        valid = read_picture(other.read(), channels=1).array == 255
    if target.channels is None:
        if array.ndim != 2 or array.dtype not in (np.dtype(np.uint16), np.dtype(np.int32)):
            raise ValueError(f"holds {array.dtype} of shape {array.shape}; 16 bits in one channel are expected")
        array = array.astype(np.uint16)
    else:
        array = array[..., None] if array.ndim == 2 else array
        if array.dtype != np.uint8 or array.shape[2] < target.channels:
            raise ValueError(f"holds {array.dtype} of shape {array.shape}; {target.channels} channels of 8 bits are expected")
        array = array[..., : target.channels]
        array = array[..., 0] if target.channels == 1 else array
    bands = np.atleast_3d(array)
    small = [_resized(np.ascontiguousarray(bands[..., band]), side, Image.Resampling.NEAREST) for band in range(bands.shape[2])]
    values = small[0] if array.ndim == 2 else np.stack(small, axis=-1)
    values = np.minimum(blurred(values) if task == "edge_occlusion" else values, target.most)
    absent = ~valid_cells(_resized(valid.astype(np.uint8), side, Image.Resampling.NEAREST).astype(bool))
    if target.channels is None:
        return np.where(absent, FULL, values).astype(np.uint16)
    return np.where(absent if values.ndim == 2 else absent[..., None], np.int16(-1), values.astype(np.int16))
