"""From an encoded record to arrays: every modality decoded and held against its declaration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Integer

from maskvit.core.modalities import Modality
from maskvit.data import codec
from maskvit.data.codec import RecordError
from maskvit.data.pictures import misaligned

MIN_SIDE = 8  # pixels of a picture's shorter side: what is smaller is a placeholder
MAX_ASPECT = 100  # longer side over shorter side: what is longer would be enlarged beyond all memory before the middle is cut out


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


def absent(modality: Modality, image_size: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """What stands in a batch for a modality that a sample lacks: -1 (class ids), NaN (float32) or 0 (uint8)."""
    size = modality.size(image_size)
    if modality.kind == "categorical":
        return np.full(size, -1, np.int32)
    return np.full((*size, modality.channels), 0 if dtype == np.uint8 else np.nan, dtype)
