"""Crops of dense tasks: picture and targets resized, padded and cut together, by the rules of the recipes that OpenCV made.

Pictures (8-bit RGB) are resized bilinearly without antialiasing, everything else takes the nearest pixel; strides too. What lies
beyond the picture is a stated color there, and missing (-1, NaN) everywhere else. Colors change where the recipe changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from maskvit.core.modalities import Modality
from maskvit.data.augment.geometry import mirror
from maskvit.data.augment.opencv import Window, resize_bilinear, resize_nearest
from maskvit.data.augment.resizing import valid_pixels
from maskvit.data.augment.settings import Augment
from maskvit.data.decoding import check_class_ids

CAT_TRIES = 10  # crops that are judged by their classes; the eleventh is taken as it is
PADDING = 128  # 8-bit level beyond the picture, of MultiMAE's recipes

Arrays = dict[str, np.ndarray]
Colors = Callable[[Arrays], Arrays]  # changes the colors of the named pictures


def fitting_size(height: int, width: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a picture made to fit `image_size`: its longest side is a square's side, the other rounded."""
    factor = min(image_size[0] / height, image_size[1] / width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def covering_size(height: int, width: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a picture made to cover `image_size`: its shortest side is a square's side, the other rounded."""
    factor = max(image_size[0] / height, image_size[1] / width)
    return max(image_size[0], round(height * factor)), max(image_size[1], round(width * factor))


def stored_values(array: Shaped[np.ndarray, "h w *c"], modality: Modality) -> Shaped[np.ndarray, "h w *c"]:
    """What a batch holds of decoded values, at their own size: int32 with -1, or float32 with NaN, where missing; else uint8.

    Raises RecordError for a class id out of range.
    """
    if modality.kind == "categorical":
        check_class_ids(array, modality)
        ids = array.astype(np.int32)
        if modality.missing is not None:
            ids[ids == modality.missing] = -1
        return ids
    if array.dtype == np.uint8 and modality.missing is None:
        return array
    values = array.astype(np.float32)
    return np.where(valid_pixels(values, modality.missing)[..., None], values, np.float32(np.nan))


class DenseRecord:
    """The decoded arrays of one record on their way to a sample.

    Args:
      arrays: as `maskvit.data.decoding.decode_record` gives them.
      modalities: their declarations.
      pictures: which of them are 8-bit RGB pictures.
      resize: "pil" or "cv2", as `Augment.resize`.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], modalities: Mapping[str, Modality], pictures: frozenset[str], resize: str):
        # Class ids stay as stored until the end: most of them are cut away. Of numbers, missing ones would change in a mirror.
        self.arrays = {
            name: array if modalities[name].kind == "categorical" else stored_values(array, modalities[name])
            for name, array in arrays.items()
        }
        self.modalities, self.pictures, self.resize = modalities, pictures, resize

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of all arrays."""
        height, width = next(iter(self.arrays.values())).shape[:2]
        return height, width

    def flip(self) -> None:
        """Mirror everything left to right."""
        for name, array in self.arrays.items():
            categorical = self.modalities[name].kind == "categorical"
            self.arrays[name] = array[:, ::-1] if categorical else mirror(array, self.modalities[name])

    def resized(self, name: str, size: tuple[int, int], window: Window | None = None) -> np.ndarray:
        """One modality resized to `size`, and the part `window` of it."""
        if name in self.pictures:
            return resize_bilinear(self.arrays[name], size, window, self.resize)
        return resize_nearest(self.arrays[name], size, window)

    def resize_all(self, size: tuple[int, int], window: Window | None = None) -> None:
        """Resize everything, and cut `window` out."""
        self.arrays = {name: self.resized(name, size, window) for name in self.arrays}

    def color(self, colors: Colors) -> None:
        """Change the colors of the pictures."""
        self.arrays |= colors({name: array for name, array in self.arrays.items() if name in self.pictures})

    def finish(self, image_size: tuple[int, int], levels: Mapping[str, Any]) -> Arrays:
        """Padded below and to the right to `image_size`, of a picture with `levels`; then brought to image_size / stride."""
        return {name: self._finish(name, image_size, levels) for name in self.arrays}

    def _finish(self, name: str, image_size: tuple[int, int], levels: Mapping[str, Any]) -> np.ndarray:
        array, modality = self.arrays[name], self.modalities[name]
        if modality.kind == "categorical":
            array = stored_values(array, modality)
        if array.shape[:2] != tuple(image_size):
            filled = -1 if modality.kind == "categorical" else levels[name] if name in self.pictures else np.nan
            padded = np.empty((*image_size, *array.shape[2:]), array.dtype)
            padded[...] = filled
            padded[: array.shape[0], : array.shape[1]] = array
            array = padded
        final = modality.size(image_size)
        if final != tuple(image_size):
            array = resize_bilinear(array, final, None, self.resize) if name in self.pictures else resize_nearest(array, final)
        return np.ascontiguousarray(array)


def mean_levels(modality: Modality) -> np.ndarray:
    """The 8-bit color whose model value is nearest to 0."""
    return np.clip(np.rint(np.array(modality.mean) / modality.scale), 0, 255).astype(np.uint8)


def _offset(rng: np.random.Generator, size: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
    """albumentations' random crop: int((side - crop) * u) for rows, then columns."""
    u, v = rng.random(2)
    return int(max(0, size[0] - image_size[0]) * u), int(max(0, size[1] - image_size[1]) * v)


def _window(offset: tuple[int, int], size: tuple[int, int], image_size: tuple[int, int]) -> Window:
    return (*offset, min(size[0], image_size[0]), min(size[1], image_size[1]))


def large_scale_jitter(
    rng: np.random.Generator, record: DenseRecord, image_size: tuple[int, int], augment: Augment, colors: Colors
) -> Arrays:
    """MultiMAE's semantic segmentation: flip, fit the image size, colors, scale by `factor`, pad, cut out."""
    if rng.random() < augment.flip:
        record.flip()
    record.resize_all(fitting_size(*record.size, image_size))
    record.color(colors)
    factor = rng.uniform(*(augment.factor or (1.0, 1.0)))
    size = max(1, int(record.size[0] * factor)), max(1, int(record.size[1] * factor))
    record.resize_all(size, _window(_offset(rng, size, image_size), size, image_size))
    return record.finish(image_size, dict.fromkeys(record.pictures, PADDING))


def shortest(rng: np.random.Generator, record: DenseRecord, image_size: tuple[int, int], augment: Augment, colors: Colors) -> Arrays:
    """MultiMAE's depth on NYUv2: cover the image size, flip, colors, cut out."""
    record.resize_all(covering_size(*record.size, image_size))
    if rng.random() < augment.flip:
        record.flip()
    record.color(colors)
    record.resize_all(record.size, _window(_offset(rng, record.size, image_size), record.size, image_size))
    return record.finish(image_size, {})


def ratio_range(rng: np.random.Generator, record: DenseRecord, image_size: tuple[int, int], augment: Augment, colors: Colors) -> Arrays:
    """mmsegmentation's: fit `base_size` times a draw of `factor`, cut out where no class covers too much, flip, colors, pad.

    The reference pads with 0 after normalizing, so a picture is padded with its modality's mean color.
    """
    ratio = rng.uniform(*(augment.factor or (1.0, 1.0)))
    long, short = (int(side * ratio) for side in augment.base_size or ())
    scale = min(long / max(record.size), short / min(record.size))
    size = max(1, int(record.size[0] * scale + 0.5)), max(1, int(record.size[1] * scale + 0.5))
    record.resize_all(size, _judged_window(rng, record, size, image_size, float(augment.cat_max_ratio or 1)))
    if rng.random() < augment.flip:
        record.flip()
    record.color(colors)
    return record.finish(image_size, {name: mean_levels(record.modalities[name]) for name in record.pictures})


def _judged_window(
    rng: np.random.Generator, record: DenseRecord, size: tuple[int, int], image_size: tuple[int, int], most: float
) -> Window:
    """A crop of several classes none of which covers `most` of the labeled pixels; after `CAT_TRIES` misses any crop."""
    names = [name for name in record.arrays if record.modalities[name].kind == "categorical"]
    draw = lambda: (int(rng.integers(0, max(0, size[0] - image_size[0]) + 1)), int(rng.integers(0, max(0, size[1] - image_size[1]) + 1)))  # noqa: E731
    window = _window(draw(), size, image_size)
    if most >= 1 or not names:
        return window
    ids, missing = record.resized(names[0], size), record.modalities[names[0]].missing
    for _ in range(CAT_TRIES):
        top, left, height, width = window
        classes, counts = np.unique(ids[top : top + height, left : left + width], return_counts=True)
        counts = counts[classes != missing] if missing is not None else counts
        if len(counts) > 1 and counts.max() / counts.sum() < most:
            break
        window = _window(draw(), size, image_size)
    return window


DENSE = {"large_scale_jitter": large_scale_jitter, "shortest": shortest, "ratio_range": ratio_range}


# --- evaluation ---------------------------------------------------------------------------------------------------------

EVAL_CROPS = ("pad", "shortest")


def evaluated(record: DenseRecord, image_size: tuple[int, int], crop: str) -> Arrays:
    """The counterparts in evaluation. "pad": made to fit, padded below and to the right; "shortest": made to cover, middle cut out."""
    if crop == "pad":
        record.resize_all(fitting_size(*record.size, image_size))
        return record.finish(image_size, dict.fromkeys(record.pictures, PADDING))
    size = covering_size(*record.size, image_size)
    offset = (size[0] - image_size[0]) // 2, (size[1] - image_size[1]) // 2
    record.resize_all(size, _window(offset, size, image_size))
    return record.finish(image_size, {})
