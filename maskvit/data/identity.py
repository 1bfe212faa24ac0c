"""Are they the same data? What tells one data set from another, wherever it lies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from maskvit.data.codec import RecordError
from maskvit.data.sources import Source

COMPARED = 16  # records whose contents are compared: a start must not read a whole data set


def data_identity(source: Source) -> dict[str, Any]:
    """What tells the data of `source` from others and stays the same where they are moved: plain data for a checkpoint's metadata.

    "records": how many. "files", "bytes": of the splits in use, where the source has files. "sizes": SHA-256 of the sizes of those
    files. "contents": SHA-256 of `COMPARED` records spread evenly, by index; None where a record cannot be read. Ids do not
    count: of pictures they are paths.
    """
    indices = np.unique(np.linspace(0, max(0, len(source) - 1), min(COMPARED, len(source))).round().astype(int))
    identity: dict[str, Any] = {"records": len(source)}
    sizes = list(getattr(source, "file_sizes", ()))
    if sizes:
        identity |= {"files": len(sizes), "bytes": sum(sizes), "sizes": hashlib.sha256(repr(sizes).encode()).hexdigest()}
    return identity | {"contents": {str(index): _contents(source, int(index)) for index in indices}}


def _contents(source: Source, index: int) -> str | None:
    try:
        return record_digest(source[index])
    except RecordError:
        return None


def record_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of all that a record holds but its id; a value that is absent and an empty one are the same."""
    digest = hashlib.sha256()
    for key in sorted(record.keys() - {"id"}):
        value = record[key]
        if value is None or (isinstance(value, bytes) and not value):
            continue
        array = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.asarray(value)
        digest.update(f"{key} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
