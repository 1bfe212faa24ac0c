"""The finished parts of a map set that is being made: files that a stopped run leaves, and the next one takes up."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8


class Parts:
    """The finished parts of a map set; each file appears whole or not at all.

    `settings`: what the maps are made from; a folder with other settings is refused. `count`: number of parts.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], count: int):
        self.directory, self.count = directory, count
        file = directory / "settings.json"
        wanted = json.loads(json.dumps(dict(settings)))  # as if it had been stored
        if file.is_file():
            try:
                stored = json.loads(file.read_text())
            except ValueError as error:
                raise ValueError(f"{file} is damaged ({error}): remove {directory}, and the maps are made anew") from error
            check_same(
                stored, wanted, f"{directory} holds parts of a stopped run", f"finish it with its own settings, or remove {directory}"
            )
            self.settings = stored
            return
        directory.mkdir(parents=True, exist_ok=True)
        self.settings = {**wanted, "date": datetime.date.today().isoformat()}
        _write_whole(file, json.dumps(self.settings, indent=2).encode())

    def path(self, number: int) -> Path:
        return self.directory / f"part_{number:06d}.npz"

    @property
    def first_missing(self) -> int:
        """Number of the first part that is not there; `count` where all are."""
        return next((number for number in range(self.count) if not self.path(number).is_file()), self.count)

    def write(self, number: int, ids: Sequence[str], maps: UInt8[np.ndarray, "k m h w"], found: Sequence[bool]) -> None:
        """Store one part. `found`: False for records without a map, whose place in `maps` holds zeros."""
        partial = self.path(number).with_suffix(".partial")
        with open(partial, "wb") as file:
            np.savez(file, ids=np.array(ids, dtype=str), maps=maps, found=np.array(found, dtype=bool))
        os.replace(partial, self.path(number))

    def records(self) -> Iterator[tuple[str, UInt8[np.ndarray, "m h w"] | None]]:
        """(id, maps or None) of every record, in order."""
        for number in range(self.count):
            with np.load(self.path(number)) as part:
                ids, maps, found = part["ids"], part["maps"], part["found"]
            for identity, here, has in zip(ids, maps, found, strict=True):
                yield str(identity), here if has else None

    def summary(self) -> dict[str, Any]:
        """What the manifest says of the maps themselves; `ids_sha256` is over all ids, each followed by a line feed."""
        shape, without, digest = None, 0, hashlib.sha256()
        for identity, maps in self.records():
            digest.update(identity.encode() + b"\n")
            shape = shape if maps is None else maps.shape
            without += maps is None
        if shape is None:
            raise ValueError(f"not one of the {without} records got a map: they could not be read or lack a modality")
        return dict(maps=shape[0], grid=list(shape[1:]), without_map=without, ids_sha256=digest.hexdigest())


def check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raise ValueError, naming the key, where `wanted` differs from what is stored under its keys."""
    for key, value in wanted.items():
        if stored.get(key) != value:
            raise ValueError(f"{what} made with {key} = {stored.get(key)!r}, asked for is {value!r}: {remedy}")


def _write_whole(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
