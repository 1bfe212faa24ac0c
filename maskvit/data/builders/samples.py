"""One sample of a folder: its files read, checked against what the modalities declare, and encoded for the record.

JPEG and PNG pictures keep their bytes; everything else is packed without loss. Distances in meters (float arrays) become counts.
"""

from __future__ import annotations

import io
import os
import types
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from maskvit.core.modalities import Modality
from maskvit.data import codec
from maskvit.data.augment.resizing import nearest_indices, resize_continuous
from maskvit.data.builders.layout import Loader, Task
from maskvit.data.decoding import unfit_size
from maskvit.data.files import ARRAYS
from maskvit.data.pictures import Picture, PixelError, foreign, misaligned, read_picture

JPEG_QUALITY = 95  # of JPEG pictures that `short_side` makes smaller
UNREADABLE, SIZE, IDS, CONTENT = "unreadable files", "wrong size", "class ids out of range", "wrong content"
TURNED = "orientation that cannot be followed"


class Found(NamedTuple):
    """What one file of a sample held, in stored units.

    `missing`, `beyond`: pixels without a value, and those of them that hold a distance which the counts cannot; `low`, `high`: range of the
    others (NaN where there is none); `whole`: whether the file holds whole numbers; `turned`: whether EXIF's orientation was
    followed; `dropped`: whether an alpha channel was left out.
    """

    missing: int
    beyond: int
    pixels: int
    low: float
    high: float
    whole: bool
    turned: bool
    dropped: bool


class _Loaded(NamedTuple):
    """A file as read: `own` are its bytes where they can be stored as they are."""

    array: np.ndarray
    own: bytes | None = None
    orientation: int = 1
    dropped: bool = False
    jpeg: bool = False
    beyond: int = 0


class _Unfit(ValueError):
    """A file that cannot be used: (kind of problem, what exactly)."""


def load_array(data: bytes, suffix: str) -> np.ndarray:
    """The array of a .npy file, or the only one of a .npz file. Raises ValueError for anything else."""
    if not data.startswith(b"\x93NUMPY" if suffix == ".npy" else b"PK"):
        known = foreign(data[:256])
        raise ValueError(f"is {known}" if known else f"is no {suffix} array" if data else "is empty (0 bytes)")
    try:
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        if suffix == ".npy":
            return np.asarray(loaded)
        names = loaded.files
        if len(names) == 1:
            return np.asarray(loaded[names[0]])
    except Exception as error:  # numpy and zipfile raise anything on damaged files
        raise ValueError(f"no readable array, or a truncated one: {str(error).splitlines()[0] if str(error) else error!r}") from error
    raise ValueError(f"holds the arrays {', '.join(names)}; store one array per file")


def _load(path: str, modality: Modality, loader: Loader | None) -> _Loaded:
    suffix = os.path.splitext(path)[1].lower()
    try:
        if loader:
            return _Loaded(loader(path))
        with open(path, "rb") as file:
            data = file.read()
        if suffix in ARRAYS:
            return _Loaded(load_array(data, suffix))
        channels = modality.channels if modality.kind == "continuous" else None
        picture = read_picture(data, modality.kind, channels)
    except (OSError, MemoryError) as error:
        raise _Unfit(UNREADABLE, getattr(error, "strerror", None) or "too large to read") from error
    except PixelError as error:
        raise _Unfit(CONTENT, str(error)) from error
    except ValueError as error:
        raise _Unfit(UNREADABLE, str(error)) from error
    if modality.kind == "continuous" and modality.metres_per_count:
        _check_distances(picture, modality.name, modality.metres_per_count)
    jpeg = picture.header.format == "JPEG"
    keeps = modality.kind == "continuous" and picture.array.dtype == np.uint8 and (jpeg or picture.header.format == "PNG")
    return _Loaded(picture.array, data if keeps else None, picture.orientation, picture.dropped, jpeg)


def _check_distances(picture: Picture, name: str, unit: float) -> None:
    """Raise for pictures that cannot be counts of a distance, `unit` meters each."""
    if picture.header.lossy:
        form = picture.header.format
        raise _Unfit(CONTENT, f"is {form}, whose compression changes distances: store them as 16-bit PNG, float .tif or .npy")
    if picture.array.dtype == np.uint8:
        raise _Unfit(
            CONTENT,
            f"has 8 bits, which as counts of {unit:.6g} m reach {255 * unit:.3g} m: it seems to be a picture of distances. Store distances "
            f"as 16-bit PNG, float .tif or .npy (a .npy of uint8 is taken as counts), or declare {name!r} as a picture "
            f"({name},metres_per_count=None)",
        )


def _class_ids(array: np.ndarray, modality: Modality) -> np.ndarray:
    """Class ids in the smallest type that holds them."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 or array.dtype.kind not in "biu":
        raise _Unfit(CONTENT, f"is {array.dtype} of shape {array.shape}; class ids are integers in one channel")
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
    outside = (array < 0) | (array >= modality.num_classes)
    if modality.missing is not None:
        outside &= array != modality.missing
    if outside.any():
        found = ", ".join(map(str, np.unique(array[outside])[:5]))
        allowed = f"0 ... {modality.num_classes - 1}" + ("" if modality.missing is None else f" and {modality.missing} (missing)")
        raise _Unfit(IDS, f"has {found} on {int(outside.sum())} pixels; allowed: {allowed}")
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    limits = np.iinfo(np.int16 if low < 0 else np.uint16)
    if not limits.min <= low <= high <= limits.max:
        raise _Unfit(IDS, f"has ids from {low} to {high}; {limits.min} ... {limits.max} can be stored")
    return array.astype(np.int16 if low < 0 else np.uint8 if high < 256 else np.uint16)


def _numbers(loaded: _Loaded, modality: Modality) -> tuple[np.ndarray, int]:
    """(values of a continuous modality in a type that can be packed, "h w" or "h w c"; how many distances were too far)."""
    array = loaded.array
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    gray = array.ndim == 2 and modality.channels == 3 and array.dtype == np.uint8
    channels = 1 if array.ndim == 2 else array.shape[2] if array.ndim == 3 else None
    if (channels != modality.channels and not gray) or array.dtype.kind not in "iuf":
        raise _Unfit(CONTENT, f"is {array.dtype} of shape {array.shape}; modality {modality.name!r} has {modality.channels} channel(s)")
    if array.dtype.kind == "f":
        if modality.metres_per_count:
            return _counts(array, modality, modality.metres_per_count)
        with np.errstate(over="ignore"):
            values = array.astype(np.float32)
        if (np.isfinite(array) & ~np.isfinite(values)).any():
            raise _Unfit(CONTENT, f"has values up to {np.nanmax(np.abs(array)):.3g}, beyond what 32 bits hold")
        return values, 0
    if array.dtype in (np.uint8, np.uint16, np.int16) or not array.size:
        return array, 0
    low, high = int(array.min()), int(array.max())
    for dtype in (np.uint16, np.int16):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype), 0
    if max(-low, high) > 2**24:
        raise _Unfit(CONTENT, f"has whole numbers from {low} to {high}, which need more than the 24 bits that are kept: scale them down")
    return array.astype(np.float32), 0


def _counts(meters: np.ndarray, modality: Modality, unit: float) -> tuple[np.ndarray, int]:
    """Meters to uint16 counts of `unit` meters; NaN, infinity, values <= 0 and what the counts cannot hold become the code for missing.

    Returns: (counts, how many distances they cannot hold).
    """
    code = 0 if modality.missing is None else modality.missing
    if not 0 <= code <= 65535 or code != int(code):
        raise _Unfit(CONTENT, f"modality {modality.name!r} has missing = {code}, which uint16 cannot hold")
    meters = meters.astype(np.float64)  # half precision would round the counts, and overflow
    with np.errstate(invalid="ignore", over="ignore"):
        counts = np.rint(meters / unit)
        measured = np.isfinite(counts) & (meters > 0)
    valid = measured & (counts <= 65535)
    if modality.missing is not None:
        valid &= counts != code
    beyond = int((measured & ~valid).sum())
    if 2 * beyond > measured.sum():
        raise _Unfit(
            CONTENT,
            f"has distances from {meters[measured].min():.6g} to {meters[measured].max():.6g}; float arrays are read as meters, and counts "
            f"of {unit:.6g} m end at {65535 * unit:.6g} m: if these are millimeters divide them "
            f"by 1000, else give {modality.name},metres_per_count another unit",
        )
    if modality.missing is None and not valid.all():
        raise _Unfit(
            CONTENT,
            f"{int((~valid).sum())} pixels hold no distance, and modality {modality.name!r} declares no code for that: set its missing (0)",
        )
    return np.where(valid, counts, code).astype(np.uint16), beyond


def _shrink(array: np.ndarray, modality: Modality, size: tuple[int, int]) -> np.ndarray:
    """Resize to `size` (height, width): nearest for class ids; missing values do not bleed into their neighbors."""
    if modality.kind == "categorical":
        return array[np.ix_(*(nearest_indices(old, new) for old, new in zip(array.shape[:2], size, strict=True)))]
    bands = array if array.ndim == 3 else array[..., None]
    result = resize_continuous(bands, size, modality.missing)
    if modality.missing is not None and array.dtype.kind != "f":
        result = np.where(np.isnan(result), modality.missing, result)
    if array.dtype.kind != "f":
        result = np.rint(result).astype(array.dtype)
    return result if array.ndim == 3 else result[..., 0]


def _encode(array: np.ndarray, modality: Modality, jpeg: bool) -> bytes:
    """Without loss, or with `jpeg` as JPEG where the array is a picture."""
    picture = array.dtype == np.uint8 and (array.ndim == 2 or array.shape[2] == 3)
    if modality.kind == "categorical" or not picture:
        return codec.encode_array(array)
    out = io.BytesIO()
    Image.fromarray(array).save(out, **(dict(format="JPEG", quality=JPEG_QUALITY) if jpeg else dict(format="PNG")))
    return out.getvalue()


def _describe(array: np.ndarray, beyond: int, loaded: _Loaded, modality: Modality) -> Found:
    absent = np.isnan(array) if array.dtype.kind == "f" else np.zeros(array.shape, bool)
    if modality.missing is not None:
        absent |= array == modality.missing
    known = array[~absent] if absent.any() else array
    low, high = (float(known.min()), float(known.max())) if known.size else (np.nan, np.nan)
    whole = loaded.array.dtype.kind in "iu"
    return Found(int(absent.sum()), beyond, absent.size, low, high, whole, loaded.orientation != 1, loaded.dropped)


def _disagreement(task: Task, arrays: Mapping[str, np.ndarray], orientations: Mapping[str, int]) -> list[tuple[str, str]]:
    """What is wrong between the modalities of a sample: sizes that differ, or turned pictures beside others."""
    sizes = {name: array.shape[:2] for name, array in arrays.items()}
    reference = next(iter(sizes), "")
    problems = []
    for name, (height, width) in sizes.items():
        if sizes[name] != sizes[reference]:
            rows, columns = sizes[reference]
            turned = " (after turning it as EXIF says)"
            ours, theirs = (turned if orientations[n] != 1 else "" for n in (name, reference))
            text = f"{task.files[name]}: {height} x {width}{ours}, but {task.files[reference]}: {rows} x {columns}{theirs}"
            problems.append((SIZE, text))
    if not problems and (reason := misaligned(orientations, sizes)):
        first = next(name for name, orientation in orientations.items() if orientation != 1)
        problems.append((TURNED, f"{task.files[first]}: {reason}"))
    return problems


def read_sample(
    task: Task,
    modalities: Mapping[str, Modality],
    short_side: int | None,
    loaders: Mapping[str, Loader] = types.MappingProxyType({}),
) -> tuple[dict[str, bytes], dict[str, Found], list[tuple[str, str]]]:
    """Read and encode one sample.

    Pictures are turned as their EXIF orientation says: by whoever decodes them where they keep their bytes, here where another
    modality must lie over them. `loaders`: modality -> what gives a file's array in place of `read_picture`; it raises ValueError.

    Returns: (modality -> bytes, modality -> what was found, problems as (kind, text)). With problems the first two are empty.
    """
    files: dict[str, _Loaded] = {}
    arrays: dict[str, np.ndarray] = {}
    beyond: dict[str, int] = {}
    problems = []
    for name, path in task.files.items():
        modality = modalities[name]
        try:
            files[name] = _load(path, modality, loaders.get(name))
            array, far = (_class_ids(files[name].array, modality), 0) if modality.kind == "categorical" else _numbers(files[name], modality)
            if 0 in array.shape:
                raise _Unfit(CONTENT, f"is empty: shape {array.shape}")
            if reason := unfit_size(array.shape[0], array.shape[1]):
                raise _Unfit(SIZE, reason)
            arrays[name], beyond[name] = array, far
        except _Unfit as error:
            kind, text = error.args
            problems.append((kind, f"{path}: {text}"))
    orientations = {name: files[name].orientation for name in arrays}
    problems += _disagreement(task, arrays, orientations)
    if problems:
        return {}, {}, problems

    encoded, found = {}, {}
    for name, array in arrays.items():
        modality, own, jpeg = modalities[name], files[name].own, False
        if own and orientations[name] != 1 and len(arrays) > 1:
            own = None
        if short_side and min(array.shape[:2]) > short_side:
            factor = short_side / min(array.shape[:2])
            height, width = (max(short_side, round(side * factor)) for side in array.shape[:2])
            array, own, jpeg = _shrink(array, modality, (height, width)), None, files[name].jpeg
        found[name] = _describe(array, beyond[name], files[name], modality)
        encoded[name] = own or _encode(array, modality, jpeg)
    return encoded, found, []
