"""Encoded pixels: packed arrays that decode fast, and one `decode` for them and for ordinary image files.

Layout of a packed array, little endian: magic b"MVA1" | dtype code u1 | filter u1 | number of axes u1 | axes u4 each |
one zstd frame with its checksum. 16-bit PNG is the bottleneck of a depth pipeline; rows minus the row above, low and
high bytes apart, then zstd, packs depth about as well and decodes several times faster.
"""

from __future__ import annotations

import io
import struct

import numpy as np
import zstandard
from PIL import Image

MAGIC = b"MVA1"
DTYPES = ("uint8", "uint16", "int16", "float32")
PLAIN, PLANES, DELTA = 0, 1, 2  # bytes as they are; byte planes apart; differences between rows, then byte planes apart
LEVEL = 9  # of zstd: costs time at build only, decoding speed does not depend on it
_HEADER = struct.Struct("<4sBBB")


def encode_array(array: np.ndarray) -> bytes:
    """Pack an array of dtype uint8, uint16, int16 or float32 and any shape without loss.

    Raises:
      ValueError: another dtype, or more than 255 axes.
    """
    if array.dtype.name not in DTYPES:
        raise ValueError(f"cannot pack an array of {array.dtype}; known: {', '.join(DTYPES)}")
    if array.ndim > 255:
        raise ValueError(f"cannot pack an array of {array.ndim} axes; at most 255")
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


def decode(data: bytes) -> np.ndarray:
    """Unpack a packed array, or decode a JPEG, PNG or any other image that Pillow reads.

    Returns: a writeable array; an image gives uint8 "h w" (grey, palette indices), uint8 "h w 3" (colour; alpha is dropped),
      uint16 "h w" (16-bit grey), or int32 / float32 "h w" for the rare formats that hold them.

    Raises:
      ValueError: no image and no packed array, or a truncated or damaged one.
    """
    if not data:
        raise ValueError("cannot decode 0 bytes: the modality is absent from this sample")
    return _unpack(data) if data[:4] == MAGIC else _decode_image(data)


def _unpack(data: bytes) -> np.ndarray:
    try:
        _, code, chosen, axes = _HEADER.unpack_from(data)
        shape = struct.unpack_from(f"<{axes}I", data, _HEADER.size)
        dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        frame = memoryview(data)[_HEADER.size + 4 * axes :]
        if zstandard.frame_content_size(frame) != size:  # before any allocation: a damaged size must not ask for memory
            raise ValueError(f"shape {shape} of {dtype} does not fit the frame")
        raw = zstandard.ZstdDecompressor().decompress(frame)
        if len(raw) != size or chosen not in (PLAIN, PLANES, DELTA):
            raise ValueError("the content does not fit its header")
    except (struct.error, IndexError, ValueError, zstandard.ZstdError) as error:
        raise ValueError(f"truncated or damaged packed array ({len(data)} bytes): {error}") from error
    if chosen == PLAIN:
        return np.frombuffer(bytearray(raw), dtype).reshape(shape)
    planes = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1)
    if chosen == PLANES:
        return np.array(planes.T, order="C").view(dtype).reshape(shape)
    values = planes[1].astype(np.uint16)
    values <<= 8
    values |= planes[0]
    values = values.reshape(shape)
    for row in range(1, shape[0]):  # vectorised along the row; `np.add.accumulate` over axis 0 is slower
        values[row] += values[row - 1]
    return values.view(dtype)


def _decode_image(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.mode in ("L", "P"):
                return np.array(image)
            if image.mode.startswith("I;16"):
                return np.array(image).astype(np.uint16)
            if image.mode in ("I", "F"):
                return np.array(image)
            if image.mode == "1":
                return np.array(image.convert("L"))
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable image or packed array, or a truncated one ({len(data)} bytes): {error}") from error
