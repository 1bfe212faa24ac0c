"""Hypersim: rendered rooms with rgb, depth and 40 classes, 768 x 1024, by the official split of scenes."""

from __future__ import annotations

import os

import numpy as np
from jaxtyping import Float32, Int16

from maskvit.core.modalities import DEPTH, SEMSEG
from maskvit.data.builders.archives import IGNORED, Contents, csv_rows, import_h5py, modalities, require
from maskvit.data.builders.layout import Task

METADATA = "metadata_images_split_scene_v1.csv"
COLUMNS = ("scene_name", "camera_name", "frame_id", "included_in_public_release", "split_partition_name")
LAYOUT = "<scene>/images/scene_<camera>_{final_preview,geometry_hdf5}/frame.*"
FOCAL, WIDTH = 886.81, 1024  # focal length in pixels of a picture of that width
NUM_CLASSES = 40


def hypersim(root: str, split_file: str | None = None) -> Contents:
    """The scenes (ai_001_001 and so on) in <root>; splits "train", "val" and "test" as the metadata have them.

    rgb is the tone-mapped preview (JPEG), classes are NYU's 40 (class k is k - 1; -1 is ignored). The files hold distances from the
    optical center; they become depth along the optical axis, as other data sets have it. Cameras of a few scenes are tilted lenses, whose
    depth is then approximate.

    Args:
      split_file: `METADATA` of the repository apple/ml-hypersim (evermotion_dataset/analysis); <root>'s own by default.

    Raises:
      FileNotFoundError: what is missing, frames included.
      ImportError: h5py is not installed.
    """
    import_h5py()
    path = os.path.expanduser(split_file) if split_file else os.path.join(root, METADATA)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}: give --split_file {METADATA} of the repository apple/ml-hypersim")
    tasks: dict[str, list[Task]] = {}
    for _, row in csv_rows(path, COLUMNS):
        if row["included_in_public_release"].strip().lower() != "true":
            continue
        scene, camera, frame = row["scene_name"].strip(), row["camera_name"].strip(), int(row["frame_id"])
        place = os.path.join(root, scene, "images", f"scene_{camera}_")
        files = {
            "rgb": f"{place}final_preview/frame.{frame:04d}.tonemap.jpg",
            "depth": f"{place}geometry_hdf5/frame.{frame:04d}.depth_meters.hdf5",
            "semseg": f"{place}geometry_hdf5/frame.{frame:04d}.semantic.hdf5",
        }
        tasks.setdefault(row["split_partition_name"].strip(), []).append(Task(f"{scene}/{camera}_{frame:04d}", files))
    if not tasks:
        raise ValueError(f"{path} names no frame of the public release")
    require(root, [os.path.relpath(file, root) for part in tasks.values() for task in part for file in task.files.values()], LAYOUT)
    specs = modalities(depth={**DEPTH, "missing": 0}, semseg={**SEMSEG, "num_classes": NUM_CLASSES, "missing": IGNORED})
    return Contents(specs, tasks, loaders={"depth": load_depth, "semseg": load_classes})


def _read(path: str) -> np.ndarray:
    try:
        with import_h5py().File(path, "r") as file:
            array: np.ndarray = file["dataset"][:]
            return array
    except (OSError, KeyError) as error:
        raise ValueError(f"is no HDF5 file with an array 'dataset', or a truncated one: {error}") from error


def load_depth(path: str) -> Float32[np.ndarray, "h w"]:
    """Depth along the optical axis in meters, of distances from the optical center; NaN where the renderer met nothing.

    Source: issue 9 of apple/ml-hypersim.
    """
    distance = _read(path).astype(np.float32)
    height, width = distance.shape
    focal = FOCAL * width / WIDTH
    x, y = (np.arange(side, dtype=np.float32) - (side - 1) / 2 for side in (width, height))
    return (distance * focal / np.sqrt(x[None] ** 2 + y[:, None] ** 2 + focal**2)).astype(np.float32)


def load_classes(path: str) -> Int16[np.ndarray, "h w"]:
    """Classes 0 ... 39, and `IGNORED` where the file has -1."""
    ids = _read(path).astype(np.int16)
    return np.where(ids < 1, IGNORED, ids - 1).astype(np.int16)
