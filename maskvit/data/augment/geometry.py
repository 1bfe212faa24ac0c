"""One crop and one flip for all modalities of a record: drawing it, and bringing arrays to the model's size.

Pure functions of numpy and Pillow. The sampling is that of torchvision's RandomResizedCrop; it is pinned by tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from maskvit.core.modalities import Modality
from maskvit.data.augment.resizing import nearest_indices, resize_continuous
from maskvit.data.augment.settings import Augment
from maskvit.data.decoding import check_class_ids

TRIES = 10  # of the crop sampler before it falls back to the central crop


class Geometry(NamedTuple):
    """Where a picture of the model's size comes from: cut `box`, resize it to `resized`, cut at `offset`, flip."""

    box: tuple[int, int, int, int]  # top, left, height, width in source pixels
    resized: tuple[int, int]  # height, width
    offset: tuple[int, int]  # top, left in the resized picture
    flip: bool


def random_resized_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) as torchvision's RandomResizedCrop does: area and log-ratio uniform, at most ten
    tries, then the largest central crop whose ratio is allowed.
    """
    area = height * width
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(TRIES):
        target = area * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(log_low + (log_high - log_low) * rng.random())
        box_width, box_height = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = rng.integers(0, height - box_height + 1), rng.integers(0, width - box_width + 1)
            return int(top), int(left), box_height, box_width
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        box_width = min(width, max(1, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_resized_once_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) as MAE's linear probe does: one draw of area and ratio, sides clamped to the picture."""
    target = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    box_height = min(height, max(1, round(math.sqrt(target / aspect))))
    box_width = min(width, max(1, round(math.sqrt(target * aspect))))
    top, left = rng.integers(0, height - box_height + 1), rng.integers(0, width - box_width + 1)
    return int(top), int(left), box_height, box_width


def center_geometry(height: int, width: int, image_size: tuple[int, int], crop: float | int) -> Geometry:
    """The evaluation protocol: resize so that the picture just covers image_size / crop, then cut out the middle.

    For square sizes: short side to floor(size / crop), the long side in proportion, rounded down.
    """
    # 1e-6: a side that is whole in exact arithmetic must not lose a pixel to rounding
    factor = max(math.floor(image_size[0] / crop + 1e-6) / height, math.floor(image_size[1] / crop + 1e-6) / width)
    rows = max(image_size[0], math.floor(height * factor + 1e-6))
    columns = max(image_size[1], math.floor(width * factor + 1e-6))
    offset = (round((rows - image_size[0]) / 2), round((columns - image_size[1]) / 2))
    return Geometry((0, 0, height, width), (rows, columns), offset, False)


def draw_geometry(rng: np.random.Generator, height: int, width: int, image_size: tuple[int, int], augment: Augment) -> Geometry:
    """Draw the flip and the box of one sample, of a crop that is not one of dense tasks; all its modalities share them."""
    flip = bool(rng.random() < augment.flip)
    if augment.crop == "center":
        return center_geometry(height, width, image_size, 1.0)._replace(flip=flip)
    whole = whole_geometry(height, width, image_size)
    if augment.crop == "random_resized":
        return whole._replace(box=random_resized_box(rng, height, width, augment.scale, augment.ratio), flip=flip)
    if augment.crop == "random_resized_once":
        return whole._replace(box=random_resized_once_box(rng, height, width, augment.scale, augment.ratio), flip=flip)
    return whole._replace(flip=flip)


def whole_geometry(height: int, width: int, image_size: tuple[int, int]) -> Geometry:
    """The whole picture, squeezed to `image_size`."""
    return Geometry((0, 0, height, width), (image_size[0], image_size[1]), (0, 0), False)


def visible_share(geometry: Geometry, height: int, width: int, image_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """(top, left, height, width) of what the model sees of a picture of height x width, as shares of that picture in 0 ... 1.

    For crops that resize and then cut it is the cut area. The flip comes after it and does not change it.
    """
    top, left, box_height, box_width = geometry.box
    per_row, per_column = box_height / geometry.resized[0], box_width / geometry.resized[1]
    return (
        (top + geometry.offset[0] * per_row) / height,
        (left + geometry.offset[1] * per_column) / width,
        image_size[0] * per_row / height,
        image_size[1] * per_column / width,
    )


def apply_geometry(
    array: Shaped[np.ndarray, "h w *c"], modality: Modality, geometry: Geometry, image_size: tuple[int, int], resize: str = "pil"
) -> np.ndarray:
    """Cut, resize and flip one modality, then bring it to image_size / stride.

    Returns: continuous uint8 (what is stored so and has no missing value) or float32 "h w c" with NaN where missing;
      categorical int32 "h w", -1 where missing. A stride is a second resize after the flip, as in the reference: with
      stride 4 class ids are those of rows and columns 4k + 2.

    Raises:
      RecordError: a class id out of range.
    """
    final = modality.size(image_size)
    if modality.kind == "categorical":
        ids = array[np.ix_(*(_source_indices(axis, geometry, image_size, final) for axis in (0, 1)))].astype(np.int32)
        check_class_ids(ids, modality)
        if modality.missing is not None:
            ids[ids == modality.missing] = -1
        return ids
    top, left, height, width = geometry.box
    picture = resize_continuous(array[top : top + height, left : left + width], geometry.resized, modality.missing, resize)
    top, left = geometry.offset
    picture = picture[top : top + image_size[0], left : left + image_size[1]]
    if geometry.flip:
        picture = mirror(picture, modality)
    if final != tuple(image_size):
        picture = resize_continuous(picture, final, None, resize)  # missing values are NaN by now
    return np.ascontiguousarray(picture)


def mirror(picture: Shaped[np.ndarray, "h w c"], modality: Modality) -> Shaped[np.ndarray, "h w c"]:
    """Left to right, in stored units: what points to the left points to the right then (`Modality.mirrored_channels`)."""
    mirrored = picture[:, ::-1]
    if not modality.mirrored_channels:
        return mirrored
    mirrored = mirrored.copy()
    for channel in modality.mirrored_channels:
        mean = modality.mean[channel if len(modality.mean) > 1 else 0]
        values = 2 * mean / modality.scale - mirrored[..., channel].astype(np.float32)
        if mirrored.dtype == np.uint8:
            values = np.clip(np.rint(values), 0, 255)
        mirrored[..., channel] = values
    return mirrored


def _source_indices(axis: int, geometry: Geometry, image_size: tuple[int, int], final: tuple[int, int]) -> Int[np.ndarray, " size"]:
    """The source rows (axis 0) or columns (axis 1) that two nearest resizes, a cut and a flip in between pick."""
    start = geometry.offset[axis]
    picked = nearest_indices(geometry.box[2 + axis], geometry.resized[axis])[start : start + image_size[axis]]
    if axis == 1 and geometry.flip:
        picked = picked[::-1]
    if final[axis] != image_size[axis]:
        picked = picked[nearest_indices(image_size[axis], final[axis])]
    return picked + geometry.box[axis]


def draw_crop(
    rng: np.random.Generator, height: int, width: int, size: tuple[int, int], scale: tuple[float, float], augment: Augment
) -> Geometry:
    """Draw one view: a random crop of a share of `scale`, resized to `size`, maybe mirrored."""
    flip = bool(rng.random() < augment.flip)
    return Geometry(random_resized_box(rng, height, width, scale, augment.ratio), size, (0, 0), flip)


def transform(
    arrays: Mapping[str, np.ndarray], modalities: Mapping[str, Modality], geometry: Geometry, image_size: tuple[int, int], resize: str
) -> dict[str, np.ndarray]:
    """Bring every decoded modality of one record to the model's size. Raises RecordError, naming the modality."""
    return {name: apply_geometry(array, modalities[name], geometry, image_size, resize) for name, array in arrays.items()}
