"""Packed arrays come back bit for bit, image files are read whole, damage is told."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import zstandard
from PIL import Image

from maskvit.data.codec import RecordError, decode, encode_array


def depth_frame(height: int = 120, width: int = 160) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).normal(0, 3, (height, width))
    frame = (2000 + 3 * y + 500 * np.sin(x / 40) * np.cos(y / 30) + noise).astype(np.uint16)
    frame[20:40, 50:90] = 0
    return frame


def image_bytes(array: np.ndarray, form: str, mode: str | None = None) -> bytes:
    out = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(out, form)
    return out.getvalue()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (7, 1), (1, 9), (31, 17), (13, 11, 4), (3, 0, 2)])
def test_round_trip(dtype, shape):
    rng = np.random.default_rng(1)
    array = rng.normal(0, 1e4, shape).astype(dtype) if dtype == "float32" else rng.integers(0, 2**16, shape).astype(dtype)
    if dtype == "float32" and array.size > 2:
        array.reshape(-1)[:2] = np.nan, np.inf
    back = decode(encode_array(array))
    assert back.dtype == array.dtype and back.shape == array.shape
    np.testing.assert_array_equal(back, array)
    back[...] = 0  # writeable


def test_views_and_byte_orders_round_trip():
    frame = depth_frame()
    for array in (frame[::2, ::3], frame.T, frame.astype(">u2")):
        np.testing.assert_array_equal(decode(encode_array(array)), array)


def test_depth_is_no_larger_than_png():
    frame = depth_frame(375, 500)
    assert len(encode_array(frame)) <= 1.05 * len(image_bytes(frame, "PNG"))


def test_images():
    frame = depth_frame()
    decoded = decode(image_bytes(frame, "PNG"))
    assert decoded.dtype == np.uint16
    np.testing.assert_array_equal(decoded, frame)
    color = np.random.default_rng(2).integers(0, 256, (20, 30, 3), np.uint8)
    np.testing.assert_array_equal(decode(image_bytes(color, "PNG")), color)
    assert decode(image_bytes(color, "JPEG")).shape == (20, 30, 3)
    assert decode(image_bytes(color, "PNG", "RGBA")).shape == (20, 30, 3)


@pytest.mark.parametrize("make", [encode_array, lambda a: image_bytes(a, "PNG")], ids=["packed", "png"])
def test_truncation_is_an_error(make):
    data = make(depth_frame())
    for length in (3, 5, 8, 20, 60, len(data) // 2, len(data) - 1 if data[:4] == b"MVA1" else len(data) // 3):
        with pytest.raises(ValueError, match="truncated"):
            decode(data[:length])


def test_damage_is_an_error():
    data = bytearray(encode_array(depth_frame()))
    for position in (4, 5, 6, 8, len(data) // 2, len(data) - 2):
        damaged = bytearray(data)
        damaged[position] ^= 0x55
        with pytest.raises(ValueError, match="damaged"):
            decode(bytes(damaged))


def test_what_cannot_be_coded():
    with pytest.raises(ValueError, match="float64.*known: uint8"):
        encode_array(np.zeros(3))
    with pytest.raises(ValueError, match="absent"):
        decode(b"")
    with pytest.raises(ValueError, match="not a readable picture"):
        decode(b"hello world, I am no picture")


def test_every_damaged_byte_of_a_packed_array_is_a_bad_record():
    """Header, shape and content: never an IndexError, never memory that the file itself does not hold."""
    data = encode_array(np.arange(48, dtype=np.uint16).reshape(6, 8))
    for position in range(4, len(data)):
        for value in (0, 1, 2, 3, 4, 127, 255):
            damaged = data[:position] + bytes([value]) + data[position + 1 :]
            try:
                assert decode(damaged).size <= 48
            except RecordError:
                pass


def test_a_shape_beyond_all_memory_is_refused():
    frame = zstandard.ZstdCompressor().compress(b"")
    for code, chosen, shape in ((1, 2, (2**16, 2**16, 2**16, 2**16)), (3, 1, (2**31, 2**31)), (0, 2, (4, 4)), (1, 2, (0, 4)), (9, 0, (4,))):
        data = struct.pack("<4sBBB", b"MVA1", code, chosen, len(shape)) + struct.pack(f"<{len(shape)}I", *shape) + frame
        with pytest.raises(RecordError, match="damaged packed array"):
            decode(data)
    # a frame that claims as much as the header: 8 TiB of zeros
    claimed = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**43) + b"\x01\x00\x00"
    data = struct.pack("<4sBBB", b"MVA1", 0, 0, 2) + struct.pack("<2I", 2**22, 2**21) + claimed
    with pytest.raises(RecordError, match="does not fit the frame"):
        decode(data)
