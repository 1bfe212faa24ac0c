"""What a folder of pictures holds, before it is packed: per modality sizes, modes, bits, ranges and values found."""

from __future__ import annotations

import collections
import dataclasses
import os
from typing import Any

import numpy as np

from maskvit.data.builders.layout import NO_CLASS, find_modalities, find_splits, list_modality
from maskvit.data.builders.samples import load_array
from maskvit.data.files import ARRAYS
from maskvit.data.pictures import open_picture, read_picture

MAX_VALUES = 1024  # distinct whole numbers kept per modality


@dataclasses.dataclass
class Facts:
    """What the files of one modality hold; counts are over the files looked at.

    Attributes:
      files: how many there are, in all splits together; looked_at: how many of them were read in full.
      sizes: (height, width), upright -> files.
      modes: "JPEG RGB", "PNG I;16", "npy float32" -> files; bits: bits per sample -> files; channels: of "h w" arrays 1 -> files.
      lossy: files in a format that changes values (JPEG, WebP, AVIF).
      fractions: files of floating-point numbers.
      low, high: range of the finite values as stored (of class maps and palettes the ids); None where there are none.
      values: the distinct values where all are whole numbers in one channel and at most `MAX_VALUES` of them; else None.
      no_value: share of pixels that are NaN or infinite; zeros: share of pixels that are 0 in all channels.
      turned: files with an EXIF orientation that is followed; alpha: files with an alpha channel, which is dropped.
      lacking: samples of the other modalities that have no file here.
      passed_over: files and folders that do not count, with the reason.
      problems: files that cannot be read or paired, with the reason.
    """

    files: int = 0
    looked_at: int = 0
    sizes: collections.Counter[tuple[int, int]] = dataclasses.field(default_factory=collections.Counter)
    modes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    bits: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    channels: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    lossy: int = 0
    fractions: int = 0
    low: float | None = None
    high: float | None = None
    values: set[int] | None = dataclasses.field(default_factory=set)
    no_value: float = 0.0
    zeros: float = 0.0
    turned: int = 0
    alpha: int = 0
    lacking: int = 0
    passed_over: dict[str, str] = dataclasses.field(default_factory=dict)
    problems: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Look:
    """What a folder holds: `splits` (name -> samples; one that has a file of any modality), `classes` () without labels, and per
    modality its `Facts`."""

    root: str
    splits: dict[str, int]
    classes: tuple[str, ...]
    modalities: dict[str, Facts]


def look(root: str, modalities: tuple[str, ...] = (), samples: int = 64) -> Look:
    """Look at a folder <root>/[<split>/]<modality>/<class or "all">/<file> as `python -m maskvit data folder` reads it.

    Args:
      modalities: names of their folders; all that hold files that are read by default.
      samples: files per modality that are read in full, spread over all of them.

    Raises:
      FileNotFoundError: no such folder, or nothing of that layout in it (it says what was expected).
      ValueError: modalities both in `root` and in split folders.
    """
    root = os.path.abspath(os.path.expanduser(root))
    names = modalities or tuple(find_modalities(root))
    facts = {name: Facts() for name in names}
    counts: dict[str, int] = {}
    classes: set[str] = set()
    paths: dict[str, list[str]] = {name: [] for name in names}
    for split, top in find_splits(root, names).items():
        listed = {name: list_modality(os.path.join(top, name)) for name in names if os.path.isdir(os.path.join(top, name))}
        keys = set().union(*(modal.files for modal in listed.values()))
        counts[split] = len(keys)
        classes |= {key.split("/")[0] for key in keys}
        for name in names:
            if name not in listed:
                facts[name].lacking += len(keys)
                continue
            files, problems, passed_over = listed[name]
            facts[name].files += len(files)
            facts[name].lacking += len(keys) - len(files)
            facts[name].passed_over |= passed_over
            facts[name].problems |= {files.get(key, text): f"{kind}: {text}" for kind, text, key in problems}
            paths[name] += files.values()
    for name, chosen in paths.items():
        _look_at([chosen[len(chosen) * i // samples] for i in range(samples)] if len(chosen) > samples else chosen, facts[name])
    return Look(root, counts, () if classes <= {NO_CLASS} else tuple(sorted(classes)), facts)


def _look_at(paths: list[str], facts: Facts) -> None:
    pixels = empty = zeros = 0
    for path in paths:
        try:
            array = _read(path, facts)
        except (OSError, ValueError, MemoryError) as error:
            facts.problems[path] = str(error)
            continue
        facts.looked_at += 1
        facts.sizes[array.shape[0], array.shape[1]] += 1
        facts.channels[array.shape[2] if array.ndim == 3 else 1] += 1
        facts.fractions += array.dtype.kind == "f"
        known = array[np.isfinite(array)]
        if known.size:
            low, high = float(known.min()), float(known.max())
            facts.low = low if facts.low is None else min(facts.low, low)
            facts.high = high if facts.high is None else max(facts.high, high)
        pixels += array.size
        empty += array.size - known.size
        zeros += int((array == 0).sum())
        if facts.values is not None:
            whole = array.ndim == 2 and array.dtype.kind in "biu"
            facts.values = facts.values | set(np.unique(array).tolist()) if whole else None
            if facts.values is not None and len(facts.values) > MAX_VALUES:
                facts.values = None
    facts.no_value, facts.zeros = (empty / pixels, zeros / pixels) if pixels else (0.0, 0.0)


def _read(path: str, facts: Facts) -> np.ndarray:
    """The pixels of a file, of one-channel pictures as stored. Notes how they are stored."""
    suffix = os.path.splitext(path)[1].lower()
    with open(path, "rb") as file:
        data = file.read()
    if suffix in ARRAYS:
        array: np.ndarray[Any, Any] = load_array(data, suffix)
        array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
        if array.ndim not in (2, 3) or array.dtype.kind not in "biuf" or not array.size:
            raise ValueError(f"is {array.dtype} of shape {array.shape}; height x width or height x width x channels are read")
        facts.modes[f"{suffix[1:]} {array.dtype}"] += 1
        facts.bits[array.dtype.itemsize * 8] += 1
        return array
    with open_picture(data) as (_, header):
        ids = not header.lossy and header.mode in ("1", "L", "P", "PA", "I", "LA")
    facts.modes[f"{header.format} {header.mode}"] += 1
    facts.bits[header.bits] += 1
    picture = read_picture(data, "categorical" if ids else "continuous")
    facts.lossy += header.lossy
    facts.turned += picture.orientation != 1
    facts.alpha += header.mode in ("LA", "PA", "RGBA")
    return picture.array
