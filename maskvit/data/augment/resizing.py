"""Resizing as Pillow does it: bicubic with antialiasing for numbers, nearest for class ids; missing values do not bleed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from PIL import Image

RESIZES = ("pil", "cv2")
MIN_VALID = 0.5  # share of a resized pixel's support that must have been measured


def check_resize(resize: str, where: str) -> None:
    """Raise if `resize` is no known method or its library is not installed."""
    if resize not in RESIZES:
        raise ValueError(f"{where} is {resize!r}; known: {', '.join(RESIZES)}")
    if resize == "cv2":
        opencv_library(where)


def nearest_indices(size_in: int, size_out: int) -> Int[np.ndarray, " size_out"]:
    """Source index of every output pixel of Pillow's nearest resize: floor((i + 0.5) * size_in / size_out).

    Pillow adds the step up instead of multiplying; where the exact value is whole, only the same sum gives its pixel.
    """
    steps = np.full(size_out, size_in / size_out)
    steps[0] *= 0.5
    return np.minimum(np.add.accumulate(steps).astype(np.int64), size_in - 1)


def resize_continuous(
    array: Shaped[np.ndarray, "h w c"], size: tuple[int, int], missing: float | int | None = None, resize: str = "pil"
) -> Shaped[np.ndarray, "height width c"]:
    """Resize numbers to `size` (height, width), bicubic and antialiased.

    A pixel is missing where a channel is NaN or all channels equal `missing`. Values and validity are resized apart and
    divided, so that the stored value of "missing" never bleeds into its neighbors; where less than half of a result's
    support is valid it is NaN, in all channels. Integer types are clipped to their range.

    Returns: uint8 for uint8 with `missing` None (Pillow's own result, or OpenCV's), else float32.
    """
    if array.dtype == np.uint8 and missing is None:
        return _resize_uint8(array, size, resize)
    values = array.astype(np.float32)
    valid = valid_pixels(values, missing)
    if valid.all():
        result = _resize_float(values, size)
    elif not valid.any():
        return np.full((*size, array.shape[2]), np.nan, np.float32)
    else:
        weight = _resize_float(valid[..., None].astype(np.float32), size)
        result = _resize_float(np.where(valid[..., None], values, np.float32(0)), size)
        enough = weight >= MIN_VALID
        result = np.where(enough, result / np.where(enough, weight, 1), np.float32(np.nan))
    if array.dtype.kind in "iu":
        limits = np.iinfo(array.dtype)
        np.clip(result, limits.min, limits.max, out=result)
    return result


def valid_pixels(values: Float[np.ndarray, "h w c"], missing: float | int | None) -> Bool[np.ndarray, "h w"]:
    valid = ~np.isnan(values).any(axis=2)
    if missing is not None and not math.isnan(missing):
        valid &= (values != np.float32(missing)).any(axis=2)
    return valid


def _resize_float(values: Float[np.ndarray, "h w c"], size: tuple[int, int]) -> Float[np.ndarray, "height width c"]:
    if values.shape[:2] == tuple(size):
        return values
    out = np.empty((*size, values.shape[2]), np.float32)
    for band in range(values.shape[2]):
        image = Image.fromarray(np.ascontiguousarray(values[..., band]))  # mode F
        out[..., band] = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))
    return out


def _resize_uint8(array: np.ndarray, size: tuple[int, int], resize: str) -> np.ndarray:
    if array.shape[:2] == tuple(size):
        return array
    if resize == "cv2":
        cv2 = opencv_library("config.data.augment.resize")
        shrinks = size[0] <= array.shape[0] and size[1] <= array.shape[1]
        method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        return cv2.resize(np.ascontiguousarray(array), size[::-1], interpolation=method).reshape(*size, array.shape[2])
    if array.shape[2] == 3:
        image = Image.fromarray(np.ascontiguousarray(array))
        return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))
    bands = (Image.fromarray(np.ascontiguousarray(array[..., band])) for band in range(array.shape[2]))
    return np.stack([np.asarray(band.resize(size[::-1], Image.Resampling.BICUBIC)) for band in bands], axis=-1)


def opencv_library(where: str) -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            f'{where} is "cv2", but OpenCV is not installed: pip install opencv-python-headless, or set it to "pil"'
        ) from error
    cv2.setNumThreads(0)  # the loader has its own threads and processes
    return cv2
