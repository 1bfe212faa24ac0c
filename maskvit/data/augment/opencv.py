"""OpenCV's arithmetic on 8-bit pictures in numpy, for recipes that were made with it: resizing without antialiasing, gray, HSV.

Integer for integer as OpenCV's own code has it where that is the same on all machines; else (enlarging, HSV to RGB) some values
differ by one.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

from maskvit.data.augment.resizing import opencv_library

WEIGHT_BITS = 11  # of the fixed-point weights of the bilinear resize
GRAY = (9798, 19235, 3735)  # 0.299, 0.587, 0.114 in 15 bits

# (row, column, rows, columns): the part of a resized picture that is computed.
Window = tuple[int, int, int, int]


def nearest_rows(size_in: int, size_out: int) -> Int[np.ndarray, " size_out"]:
    """Source index of every output pixel of OpenCV's nearest resize: floor(i * size_in / size_out), without Pillow's half pixel."""
    return np.minimum(np.floor(np.arange(size_out) * (1.0 / (size_out / size_in))).astype(np.int64), size_in - 1)


def resize_nearest(array: Shaped[np.ndarray, "h w *c"], size: tuple[int, int], window: Window | None = None) -> np.ndarray:
    """Resize to `size` (height, width) by the nearest pixel, and cut `window` out of the result (all of it where None)."""
    top, left, height, width = window or (0, 0, *size)
    rows = nearest_rows(array.shape[0], size[0])[top : top + height]
    columns = nearest_rows(array.shape[1], size[1])[left : left + width]
    return array[np.ix_(rows, columns)]


def resize_bilinear(
    picture: UInt8[np.ndarray, "h w c"], size: tuple[int, int], window: Window | None = None, resize: str = "pil"
) -> UInt8[np.ndarray, "height width c"]:
    """Resize to `size` (height, width): bilinear between the middles of pixels, without antialiasing; `window` as in `resize_nearest`.

    `resize`: "cv2" asks OpenCV itself, which is faster.
    """
    top, left, height, width = window or (0, 0, *size)
    if picture.shape[:2] == tuple(size):
        return picture[top : top + height, left : left + width]
    if resize == "cv2":
        cv2 = opencv_library("config.data.augment.resize")
        resized = cv2.resize(np.ascontiguousarray(picture), size[::-1], interpolation=cv2.INTER_LINEAR)
        return resized.reshape(*size, picture.shape[2])[top : top + height, left : left + width]
    above, row_weight = (part[top : top + height] for part in _between(picture.shape[0], size[0]))
    before, column_weight = (part[left : left + width] for part in _between(picture.shape[1], size[1]))
    below, after = np.minimum(above + 1, picture.shape[0] - 1), np.minimum(before + 1, picture.shape[1] - 1)
    used, places = np.unique(np.concatenate([above, below]), return_inverse=True)
    source, weight = picture[used].astype(np.int32), column_weight[:, None]
    # Along the rows first; then down, in the order and with the shifts of OpenCV's own integers.
    lines = source[:, before] * (2**WEIGHT_BITS - weight) + source[:, after] * weight
    lines >>= 4
    weight = row_weight[:, None, None]
    upper = ((2**WEIGHT_BITS - weight) * lines[places[:height]]) >> 16
    lower = (weight * lines[places[height:]]) >> 16
    return ((upper + lower + 2) >> 2).astype(np.uint8)


def _between(size_in: int, size_out: int) -> tuple[Int[np.ndarray, " size_out"], Int[np.ndarray, " size_out"]]:
    """(the pixel before each output pixel's middle, weight of the one behind it in `WEIGHT_BITS` bits)."""
    places = ((np.arange(size_out) + 0.5) * (1.0 / (size_out / size_in)) - 0.5).astype(np.float32)
    before = np.floor(places).astype(np.int64)
    share = places - before.astype(np.float32)
    share[(before < 0) | (before >= size_in - 1)] = 0
    return np.clip(before, 0, size_in - 1), np.rint(share * 2**WEIGHT_BITS).astype(np.int32)


def to_gray(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
    """Brightness: 0.299 red, 0.587 green and 0.114 blue."""
    values = picture.astype(np.int32)
    red, green, blue = (values[..., band] * weight for band, weight in enumerate(GRAY))
    return ((red + green + blue + (1 << 14)) >> 15).astype(np.uint8)


@functools.cache
def _reciprocals() -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """255 / i and 30 / i for i of 0 ... 255, in 12 bits."""
    numbers = np.maximum(np.arange(256), 1)
    tables = (np.rint((top << 12) / (times * numbers)) for top, times in ((255, 1), (180, 6)))
    saturation, hue = (np.where(np.arange(256) == 0, 0, table).astype(np.int32) for table in tables)
    return saturation, hue


def to_hsv(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Hue in 0 ... 179 (half degrees), saturation and value in 0 ... 255."""
    red, green, blue = (picture[..., band].astype(np.int32) for band in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    of_saturation, of_hue = _reciprocals()
    saturation = (spread * of_saturation[value] + (1 << 11)) >> 12
    sector = np.where(value == red, green - blue, np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread))
    hue = (sector * of_hue[spread] + (1 << 11)) >> 12
    return np.stack([np.where(hue < 0, hue + 180, hue), saturation, value], axis=-1).astype(np.uint8)


def from_hsv(hsv: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """The RGB picture of what `to_hsv` gives."""
    one = np.float32(1)
    hue = hsv[..., 0].astype(np.float32) * np.float32(6 / 180)
    saturation, value = (hsv[..., band].astype(np.float32) * np.float32(1 / 255) for band in (1, 2))
    sector = np.floor(hue)
    share = hue - sector
    levels: list[Float[np.ndarray, "h w"]] = [
        value, value * (one - saturation), value * (one - saturation * share), value * (one - saturation * (one - share)),
    ]  # fmt: skip
    # Which level red, green and blue have in each sixth of the circle.
    order = np.array([(0, 3, 1), (2, 0, 1), (1, 0, 3), (1, 2, 0), (3, 1, 0), (0, 1, 2)])[sector.astype(np.int64) % 6]
    picture = np.take_along_axis(np.stack(levels, axis=-1), order, axis=-1)
    return np.clip(picture * np.float32(255), 0, 255).astype(np.uint8)  # truncated, as OpenCV's vector code does it
