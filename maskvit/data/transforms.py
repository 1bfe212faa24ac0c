"""From one encoded record to arrays of the model's size: decode, one crop and one flip for all modalities, resize.

Pure functions of numpy and Pillow. The sampling is that of torchvision's RandomResizedCrop, the resize that of Pillow
(bicubic with antialiasing for numbers, nearest for class ids); both are pinned by tests.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Shaped
from PIL import Image

from maskvit.core.configuration import check_arguments
from maskvit.core.modalities import Modality
from maskvit.data import codec
from maskvit.data.codec import RecordError
from maskvit.data.pictures import misaligned
from maskvit.data.views import MultiCrop

CROPS = ("random_resized", "center", "none")
RESIZES = ("pil", "cv2")
TRIES = 10  # of the crop sampler before it falls back to the central crop
MIN_SIDE = 8  # pixels of a picture's shorter side: what is smaller is a placeholder
MAX_ASPECT = 100  # longer side over shorter side: what is longer would be enlarged beyond all memory before the middle is cut out
MIN_VALID = 0.5  # share of a resized pixel's support that must have been measured


@dataclasses.dataclass(frozen=True)
class Augment:
    """What training does to a record before it is resized (`config.data.augment`).

    Attributes:
      crop: "random_resized", "center" (short side to the image size, middle cut out) or "none" (the whole picture).
      scale: range of the crop's share of the picture's area.
      ratio: range of the crop's width over its height, drawn log-uniformly.
      flip: probability of a left-right flip.
      resize: "pil" (exact, the reference's) or "cv2" (faster on uint8, needs OpenCV; other modalities stay with "pil").
      views: two large and several small views of a record in place of one (self-distillation); None for one.
    """

    crop: str = "random_resized"
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float | int = 0.5
    resize: str = "pil"
    views: MultiCrop | None = None

    def __post_init__(self) -> None:
        where = "config.data.augment"
        if self.views is not None and self.crop != "random_resized":
            raise ValueError(f"{where}.crop is {self.crop!r}, but views are random crops: set it to 'random_resized'")
        if self.crop not in CROPS:
            raise ValueError(f"{where}.crop is {self.crop!r}; known: {', '.join(CROPS)}")
        check_resize(self.resize, f"{where}.resize")
        for name in ("scale", "ratio"):
            value = getattr(self, name)
            if len(value) != 2 or not 0 < value[0] <= value[1]:
                raise ValueError(f"{where}.{name} is {tuple(value)}; it must be (low, high) with 0 < low <= high")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"{where}.flip is {self.flip}; it is a probability between 0 and 1")


def parse_augment(settings: Mapping[str, Any] | None) -> Augment:
    """Turn `config.data.augment` into `Augment`. Raises ValueError on an unknown key, listing the known ones."""
    settings = dict(settings or {})
    check_arguments("config.data.augment", Augment, settings)
    plain = lambda block: {key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in block.items()}  # noqa: E731
    values: dict[str, Any] = plain(settings)
    given = values.pop("views", None) or {}
    check_arguments("config.data.augment.views", MultiCrop, given)
    views: dict[str, Any] = plain(given)
    return Augment(**values, views=MultiCrop(**views) if views else None)


def check_resize(resize: str, where: str) -> None:
    """Raise if `resize` is no known method or its library is not installed."""
    if resize not in RESIZES:
        raise ValueError(f"{where} is {resize!r}; known: {', '.join(RESIZES)}")
    if resize == "cv2":
        _cv2(where)


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode_record(record: Mapping[str, Any], modalities: Mapping[str, Modality]) -> dict[str, np.ndarray]:
    """Decode every modality that the record has.

    Args:
      record: per modality encoded bytes (`maskvit.data.codec`) or an array; a missing key or b"" means absent.

    Returns: continuous "h w c" (any number type), categorical "h w" (integers), all of one height and width.

    Raises:
      RecordError: undecodable, other channels than declared, a size that is none of a picture (`unfit_size`), sizes that differ,
        pictures turned by their EXIF orientation that may not lie over the others, or no modality at all.
    """
    arrays, orientations = {}, {}
    for name, modality in modalities.items():
        data = record.get(name)
        if data is None or len(data) == 0:
            continue
        try:
            array, orientations[name] = _decode(data, modality)
            arrays[name] = _check_array(array, modality)
        except RecordError as error:
            raise RecordError(f"modality {name!r}: {error}") from error
    if not arrays:
        raise RecordError(f"has none of the modalities {', '.join(modalities)}")
    sizes = {name: array.shape[:2] for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(
            f"{name} {height} x {width}{' after turning it' if orientations[name] != 1 else ''}" for name, (height, width) in sizes.items()
        )
        raise RecordError(f"modalities differ in height x width ({listed}); store them at one size")
    if reason := misaligned(orientations, sizes):
        raise RecordError(reason)
    return arrays


def _decode(data: bytes | np.ndarray, modality: Modality) -> tuple[np.ndarray, int]:
    """(array, the EXIF orientation that was followed)."""
    if isinstance(data, np.ndarray):
        return data, 1
    if data[:4] == codec.MAGIC:
        return codec.unpack_array(data), 1
    picture = codec.decode_picture(data, modality)
    return picture.array, picture.orientation


def _check_array(array: np.ndarray, modality: Modality) -> np.ndarray:
    if modality.kind == "categorical":
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[..., 0]
        if array.ndim != 2 or array.dtype.kind not in "iu":
            raise RecordError(f"class ids must be integers of shape height x width, not {array.dtype} {array.shape}")
    else:
        if array.ndim == 2:
            # gray pictures occur in every color data set (ImageNet has some)
            gray = modality.channels == 3 and array.dtype == np.uint8
            array = np.repeat(array[..., None], 3, axis=2) if gray else array[..., None]
        if array.ndim != 3 or array.shape[2] != modality.channels or 0 in array.shape:
            raise RecordError(
                f"has shape {array.shape}; config declares {modality.channels} channels, so height x width x {modality.channels}"
            )
        if array.dtype.kind not in "iuf":
            raise RecordError(f"has dtype {array.dtype}, which is no number")
    if reason := unfit_size(array.shape[0], array.shape[1]):
        raise RecordError(reason)
    return array


def unfit_size(height: int, width: int) -> str | None:
    """Why a picture of that size is none; None where it is one."""
    if min(height, width) < MIN_SIDE:
        return f"is {height} x {width} pixels; at least {MIN_SIDE} x {MIN_SIDE} are needed"
    if max(height, width) > MAX_ASPECT * min(height, width):
        return f"is {height} x {width} pixels; the longer side may be {MAX_ASPECT} times the shorter one at most"
    return None


def output_dtype(array: np.ndarray, modality: Modality) -> np.dtype:
    """dtype in a batch: int32 class ids; uint8 where it is stored so and every value counts; float32 otherwise."""
    if modality.kind == "categorical":
        return np.dtype(np.int32)
    return np.dtype(np.uint8 if array.dtype == np.uint8 and modality.missing is None else np.float32)


def check_class_ids(array: Integer[np.ndarray, "h w"], modality: Modality) -> None:
    """Raise RecordError where an id is neither a class of the modality nor its missing id."""
    outside = (array < 0) | (array >= modality.num_classes)
    if modality.missing is not None:
        outside &= array != modality.missing
    if outside.any():
        raise RecordError(
            f"modality {modality.name!r}: class id {int(array[outside][0])} is out of range; config.modalities.{modality.name} has "
            f"num_classes = {modality.num_classes} (ids 0 ... {modality.num_classes - 1}) and missing = {modality.missing}: "
            "set these to what is stored"
        )


def check_values(array: np.ndarray, modality: Modality) -> None:
    """Raise RecordError for a class id out of range, or for NaN where the modality declares that nothing is missing."""
    if modality.kind == "categorical":
        check_class_ids(array, modality)
    elif modality.missing is None and array.dtype.kind == "f" and np.isnan(array).any():
        raise RecordError(
            f"modality {modality.name!r} has NaN pixels, but config.modalities.{modality.name}.missing is None: set it to the value that "
            "means missing (NaN always does as well)"
        )


# --- geometry ---------------------------------------------------------------------------------------------------------


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
    """Draw the flip and the box of one sample; all its modalities share them."""
    flip = bool(rng.random() < augment.flip)
    if augment.crop == "center":
        return center_geometry(height, width, image_size, 1.0)._replace(flip=flip)
    whole = whole_geometry(height, width, image_size)
    if augment.crop == "random_resized":
        return whole._replace(box=random_resized_box(rng, height, width, augment.scale, augment.ratio), flip=flip)
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


# --- resizing ---------------------------------------------------------------------------------------------------------


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
    valid = _valid(values, missing)
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


def _valid(values: Float[np.ndarray, "h w c"], missing: float | int | None) -> Bool[np.ndarray, "h w"]:
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
        cv2 = _cv2("config.data.augment.resize")
        shrinks = size[0] <= array.shape[0] and size[1] <= array.shape[1]
        method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        return cv2.resize(np.ascontiguousarray(array), size[::-1], interpolation=method).reshape(*size, array.shape[2])
    if array.shape[2] == 3:
        image = Image.fromarray(np.ascontiguousarray(array))
        return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))
    bands = (Image.fromarray(np.ascontiguousarray(array[..., band])) for band in range(array.shape[2]))
    return np.stack([np.asarray(band.resize(size[::-1], Image.Resampling.BICUBIC)) for band in bands], axis=-1)


def _cv2(where: str) -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            f'{where} is "cv2", but OpenCV is not installed: pip install opencv-python-headless, or set it to "pil"'
        ) from error
    cv2.setNumThreads(0)  # the loader has its own threads and processes
    return cv2


# --- whole records ----------------------------------------------------------------------------------------------------


def transform(
    arrays: Mapping[str, np.ndarray], modalities: Mapping[str, Modality], geometry: Geometry, image_size: tuple[int, int], resize: str
) -> dict[str, np.ndarray]:
    """Bring every decoded modality of one record to the model's size. Raises RecordError, naming the modality."""
    return {name: apply_geometry(array, modalities[name], geometry, image_size, resize) for name, array in arrays.items()}


def absent(modality: Modality, image_size: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """What stands in a batch for a modality that a sample lacks: -1 (class ids), NaN (float32) or 0 (uint8)."""
    size = modality.size(image_size)
    if modality.kind == "categorical":
        return np.full(size, -1, np.int32)
    return np.full((*size, modality.channels), 0 if dtype == np.uint8 else np.nan, dtype)
