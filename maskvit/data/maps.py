"""Stored maps: importance over the whole picture of every record of a data set, cropped and flipped as the picture is.

A map set is a data set of its own (`maskvit.data.builders.maps` writes it): record i has the id of record i of the data set
that it was made from and `map`, a packed uint8 array "m h w" over the whole picture, 0 ... 255 for 0 ... 1; m is 1 (one map
for all modalities) or one per modality. Its manifest says what it was made from, and how.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from maskvit.core.modalities import Modality
from maskvit.data import codec
from maskvit.data.codec import RecordError
from maskvit.data.sources import Source, TfdsSource, open_directory

REMEDY = "make the maps with python -m maskvit maps for these data, or set config.objective.guidance.path to another map set"
# What a manifest must hold.
MANIFEST: dict[str, Any] = {"data": dict, "modalities": (list, tuple), "maps": int, "grid": (list, tuple), "without_map": int}
PROBES = 8  # ids compared before the first batch


class MapError(RuntimeError):
    """A record whose stored map is missing. Not one bad sample among good ones: it ends the run."""


def data_identity(source: Source) -> dict[str, Any]:
    """What tells one data set from another: name with version, split and number of records ("" where a source has no name)."""
    return {"name": str(getattr(source, "name", "")), "split": str(getattr(source, "split", "")), "records": len(source)}


def to_bytes(values: Float[np.ndarray, "*s"]) -> UInt8[np.ndarray, "*s"]:
    """0 ... 1 to the nearest of 256 levels. Raises ValueError for values outside."""
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"a map has values from {values.min()} to {values.max()}; they must lie in 0 ... 1")
    return np.rint(values * 255).astype(np.uint8)


def crop_map(
    maps: Float[np.ndarray, "m h w"], box: tuple[float, float, float, float], flip: bool, grid: tuple[int, int]
) -> Float[np.ndarray, "m rows columns"]:
    """The part `box` of maps (top, left, height, width as shares of the picture) at another grid, then mirrored if `flip`.

    A value is the mean of the map over the cell's own area, fractions of map cells counted; a cell smaller than a map cell
    takes a window as large as one around its middle, which is bilinear interpolation. Nothing is read beyond the picture.
    """
    rows = _window_weights(box[0], box[2], maps.shape[1], grid[0])
    columns = _window_weights(box[1], box[3], maps.shape[2], grid[1])
    if flip:
        columns = columns[::-1]
    return (rows @ maps @ columns.T).astype(np.float32)


def _window_weights(start: float, extent: float, cells: int, size: int) -> Float[np.ndarray, "size cells"]:
    """What each of `cells` map cells adds to each of `size` cells that lie evenly in start ... start + extent."""
    step = extent * cells / size
    middles = start * cells + (np.arange(size) + 0.5) * step
    half = max(step, 1.0) / 2
    low, high = np.clip(middles - half, 0, cells)[:, None], np.clip(middles + half, 0, cells)[:, None]
    edges = np.arange(cells)
    overlap = np.clip(np.minimum(high, edges + 1) - np.maximum(low, edges), 0, None)
    return overlap / overlap.sum(axis=1, keepdims=True)


class MapSet:
    """The stored maps of an opened data set. Picklable.

    Args:
      path: the map set's folder, <data_dir>/<name> or that of its version.
      source: the data that the maps must be of.
      inputs: the model's input modalities.
      grid: (rows, columns) of the maps that `cropped` gives.

    Attributes:
      manifest: what the set was made from, and how.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: no map set, one of other data, modalities or version, or one coarser than `grid`.
      MapError: ids that are not those of the data.
    """

    def __init__(self, path: str, source: Source, inputs: Sequence[str], grid: tuple[int, int]):
        self.path = os.path.abspath(os.path.expanduser(path))
        self.grid = grid
        self._stored = open_maps(self.path)
        self.manifest = read_manifest(self._stored.directory)
        self._check_data(source)
        self._shape = (int(self.manifest["maps"]), *self.manifest["grid"])
        self._rows = self._rows_of(inputs)
        if self._shape[1] < grid[0] or self._shape[2] < grid[1]:
            raise ValueError(
                f"the maps in {self.path} have a grid of {self._shape[1]} x {self._shape[2]}, coarser than the {grid[0]} x {grid[1]} "
                "tokens of the first input modality: make them with a larger image_size or out.grid, or lower config.image_size"
            )
        for index in np.unique(np.linspace(0, len(source) - 1, PROBES).astype(int)):
            try:
                identity = source[int(index)]["id"]
            except (RecordError, OSError):
                continue  # a damaged record: the loader deals with those
            self._record(int(index), identity)

    def cropped(self, index: int, identity: str, box: tuple[float, float, float, float], flip: bool) -> Float[np.ndarray, "m rows columns"]:
        """The maps of record `index`, whose id must be `identity`, under `box` and `flip` as `crop_map` has them.

        m is 1, or the number of inputs, in their order. Raises MapError where there is none.
        """
        data = self._record(index, identity)["map"]
        if len(data) == 0:
            raise MapError(
                f"no map is stored for record {identity!r} in {self.path} ({self.manifest['without_map']} records have none, because they "
                f"could not be read or lack {' and '.join(self.manifest['modalities'])}): {REMEDY}"
            )
        array = codec.decode(data)
        if array.shape != self._shape or array.dtype != np.uint8:
            raise MapError(f"the map of record {identity!r} in {self.path} is {array.dtype} {array.shape}, its manifest says {self._shape}")
        return crop_map(array[self._rows].astype(np.float32) / np.float32(255), box, flip, self.grid)

    def empty(self) -> Float[np.ndarray, "m rows columns"]:
        """What stands for the maps of no record."""
        return np.zeros((len(self._rows), *self.grid), np.float32)

    def _record(self, index: int, identity: str) -> dict[str, Any]:
        record = self._stored[index]
        if record["id"] != identity:
            raise MapError(
                f"no map for record {identity!r}: number {index} in {self.path} is of {record['id']!r}, so it was made from another "
                f"version of the data: {REMEDY}"
            )
        return record

    def _check_data(self, source: Source) -> None:
        made_from, opened = self.manifest["data"], data_identity(source)
        for key, what in (("name", "data set"), ("split", "split"), ("records", "number of records")):
            if made_from[key] != opened[key]:
                raise ValueError(
                    f"the maps in {self.path} were made from another {what}: {made_from[key]!r}, config.data.train is {opened[key]!r} "
                    f"({source.describe()}): {REMEDY}"
                )

    def _rows_of(self, inputs: Sequence[str]) -> list[int]:
        if self._shape[0] == 1:
            return [0]
        names = list(self.manifest["modalities"])
        for name in inputs:
            if name not in names:
                raise ValueError(f"{self.path} has maps of {', '.join(names)}, none of the input modality {name!r}: {REMEDY}")
        return [names.index(name) for name in inputs]


def open_maps(path: str) -> TfdsSource:
    """The records of a map set, {"id", "map"}. Raises as `MapSet`."""
    path = os.path.abspath(os.path.expanduser(path))
    if os.path.isfile(os.path.join(path, "dataset_info.json")):
        data_dir, name = path, ""
    else:
        data_dir, name = os.path.split(path)
    modalities: Mapping[str, Modality] = {"map": Modality("map")}
    try:
        return TfdsSource(modalities, data_dir=data_dir, name=name, split="maps")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no map set in {path}: {REMEDY}") from error
    except ValueError as error:
        raise ValueError(f"{path} is a data set, but no map set ({error}): {REMEDY}") from error


def read_manifest(directory: str) -> dict[str, Any]:
    """What the map set in `directory` (that of a version) was made from, and how. Raises ValueError where it does not say."""
    manifest = dict(open_directory(directory).info.metadata or {}).get("recipe", {})
    if not isinstance(manifest, dict):
        raise ValueError(f"{directory} is no map set: its recipe is {manifest!r:.80}")
    lacking = [key for key in MANIFEST if key not in manifest]
    if lacking:
        raise ValueError(f"{directory} is no map set: its metadata lack {lacking[0]!r}")
    for key, kind in MANIFEST.items():
        if not isinstance(manifest[key], kind) or isinstance(manifest[key], bool):
            raise ValueError(f"{directory}/metadata.json: {key!r} is {manifest[key]!r:.80}, which no map set has there")
    wrong = [key for key in ("name", "split", "records") if key not in manifest["data"]]
    whole = [number for number in (manifest["maps"], *manifest["grid"]) if isinstance(number, int) and number >= 1]
    if wrong or len(whole) != 3:
        raise ValueError(
            f"{directory}/metadata.json: its data lack {wrong[0]!r}"
            if wrong
            else f"{directory}/metadata.json: its maps have no whole sizes"
        )
    return manifest
