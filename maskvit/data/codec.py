"""Encoded pixels: packed arrays that decode fast, and one `decode` for them and for ordinary pictures.

Layout of a packed array, little endian: magic b"MVA1" | dtype code u1 | filter u1 | number of axes u1 | axes u4 each |
one zstd frame with its checksum. 16-bit PNG is the bottleneck of a depth pipeline; rows minus the row above, low and
high bytes apart, then zstd, packs depth about as well and decodes several times faster.
"""

from __future__ import annotations

import math
import struct

import numpy as np
import zstandard

from maskvit.core.modalities import Modality
from maskvit.data.pictures import Picture, PictureError, read_picture

MAGIC = b"MVA1"
DTYPES = ("uint8", "uint16", "int16", "float32")
PLAIN, PLANES, DELTA = 0, 1, 2  # bytes as they are; byte planes apart; differences between rows, then byte planes apart
LEVEL = 9  # of zstd: costs time at build only, decoding speed does not depend on it
LARGEST = 2**31  # bytes of one array
_HEADER = struct.Struct("<4sBBB")


class RecordError(ValueError):
    """One record cannot be used: undecodable, sizes that differ, values that its modality does not allow."""


def encode_array(array: np.ndarray) -> bytes:
    """Pack an array of dtype uint8, uint16, int16 or float32 and any shape without loss.

    Raises:
      ValueError: another dtype, more than 255 axes, or more than `LARGEST` bytes.
    """
    if array.dtype.name not in DTYPES:
        raise ValueError(f"cannot pack an array of {array.dtype}; known: {', '.join(DTYPES)}")
    if array.ndim > 255 or array.nbytes > LARGEST:
        raise ValueError(f"cannot pack an array of {array.ndim} axes and {array.nbytes} bytes; at most 255 and {LARGEST}")
    data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    chosen = PLAIN if array.dtype.itemsize == 1 else PLANES
    if array.dtype.itemsize == 2 and array.ndim >= 2 and array.size:
        chosen = DELTA
        data = data.view("<u2")
        data = np.concatenate([data[:1], data[1:] - data[:-1]])  # modulo 2**16, as the sum that undoes it
    if chosen != PLAIN:
        data = data.reshape(-1).view(np.uint8).reshape(-1, array.dtype.itemsize).T
    header = _HEADER.pack(MAGIC, DTYPES.index(array.dtype.name), chosen, array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
    return header + zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compress(data.tobytes())


def decode(data: bytes, modality: Modality | None = None) -> np.ndarray:
    """Unpack a packed array, or read a picture as `modality` has it (`maskvit.data.pictures.read_picture`), turned upright.

    Returns: a writeable array; a picture gives "h w" for one channel and uint8 "h w c" for several.

    Raises:
      RecordError: no picture and no packed array, a truncated or damaged one, or pixels that are not what `modality` declares.
    """
    if not data:
        raise RecordError("cannot decode 0 bytes: the modality is absent from this sample")
    return unpack_array(data) if data[:4] == MAGIC else decode_picture(data, modality).array


def decode_picture(data: bytes, modality: Modality | None = None) -> Picture:
    """As `decode`, for a picture: with the orientation that was followed. Raises RecordError."""
    kind = "continuous" if modality is None else modality.kind
    try:
        return read_picture(data, kind, modality.channels if modality is not None and kind == "continuous" else None)
    except PictureError as error:
        raise RecordError(f"{error} ({len(data)} bytes)") from error


def unpack_array(data: bytes) -> np.ndarray:
    """Unpack a packed array. Raises RecordError for a truncated or damaged one, or one of more than `LARGEST` bytes."""
    try:
        return _unpack(data)
    except (struct.error, IndexError, ValueError, OverflowError, MemoryError, zstandard.ZstdError) as error:
        raise RecordError(f"truncated or damaged packed array ({len(data)} bytes): {error}") from error


def _unpack(data: bytes) -> np.ndarray:
    _, code, chosen, axes = _HEADER.unpack_from(data)
    shape = struct.unpack_from(f"<{axes}I", data, _HEADER.size)
    dtype = np.dtype(DTYPES[code]).newbyteorder("<")
    size = math.prod(shape) * dtype.itemsize
    if chosen not in (PLAIN, PLANES, DELTA) or (chosen == DELTA and (dtype.itemsize != 2 or not size)):
        raise ValueError(f"filter {chosen} does not fit {dtype} of shape {shape}")
    frame = memoryview(data)[_HEADER.size + 4 * axes :]
    if size > LARGEST or zstandard.frame_content_size(frame) != size:  # before any allocation: a damaged size must not ask for memory
        raise ValueError(f"shape {shape} of {dtype} does not fit the frame")
    raw = zstandard.ZstdDecompressor().decompress(frame)
    if len(raw) != size:
        raise ValueError("the content does not fit its header")
    if chosen == PLAIN:
        return np.frombuffer(bytearray(raw), dtype).reshape(shape)
    planes = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1)
    if chosen == PLANES:
        return np.array(planes.T, order="C").view(dtype).reshape(shape)
    values = planes[1].astype(np.uint16)
    values <<= 8
    values |= planes[0]
    values = values.reshape(shape)
    for row in range(1, shape[0]):  # vectorized along the row; `np.add.accumulate` over axis 0 is slower
        values[row] += values[row - 1]
    return values.view(dtype)
