"""Picture files: what their pixels are taken for in every mode, bit depth and orientation, and what is refused with its name."""

from __future__ import annotations

import io
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from maskvit.data.pictures import PictureError, PixelError, misaligned, open_picture, read_picture

RAMP = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16)
COLORS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)


def encoded(array: np.ndarray, form: str, mode: str | None = None, **settings) -> bytes:
    out = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(out, form, **settings)
    return out.getvalue()


def png(rows: np.ndarray, bits: int, color: int = 0, channels: int = 1) -> bytes:
    """A PNG of samples "h w*channels" packed into `bits` each, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = rows.shape
    packed = [np.packbits(np.unpackbits(row.astype(">u2").view(np.uint8)).reshape(-1, 16)[:, 16 - bits :]).tobytes() for row in rows]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width // channels, height, bits, color, 0, 0, 0))
    palette = chunk(b"PLTE", bytes(i % 256 for i in range(3 * 2**bits))) if color == 3 else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + palette
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed)))
        + chunk(b"IEND", b"")
    )


def ids(data: bytes) -> np.ndarray:
    return read_picture(data, "categorical").array


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("color", [0, 3])
def test_class_ids_are_the_stored_samples_at_any_bit_depth(bits, color):
    if (bits, color) == (16, 3):
        return  # there are no such palettes
    samples = (np.arange(12 * 16).reshape(12, 16) * 37) % 2**bits
    np.testing.assert_array_equal(ids(png(samples, bits, color)), samples)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "GIF", "PPM"], ids=str.lower)
def test_class_ids_in_every_exact_format(form):
    np.testing.assert_array_equal(ids(encoded(RAMP, form)), RAMP)
    if form != "GIF":  # which has no pictures of 1 bit; PBM stores black as 1
        mask = RAMP % 3 == 0
        stored = ids(encoded(mask, form))
        assert set(np.unique(stored)) == {0, 1} and np.array_equal(stored, ~mask if form == "PPM" else mask)


def test_class_ids_of_more_kinds():
    big = RAMP.astype(np.uint16) * 300
    for form in ("PNG", "TIFF"):
        np.testing.assert_array_equal(ids(encoded(big, form)), big)
    negative = RAMP.astype(np.int32) - 5
    np.testing.assert_array_equal(ids(encoded(negative, "TIFF")), negative)
    np.testing.assert_array_equal(ids(encoded(RAMP, "PNG", "LA")), RAMP)
    big_endian = io.BytesIO()
    Image.frombytes("I;16B", (16, 12), big.astype(">u2").tobytes()).save(big_endian, "TIFF")
    np.testing.assert_array_equal(ids(big_endian.getvalue()), big)
    # a PGM whose largest sample is 4: Pillow spreads 0 ... 4 over 0 ... 255
    np.testing.assert_array_equal(ids(b"P5 3 2 4\n" + bytes([0, 1, 2, 3, 4, 0])), [[0, 1, 2], [3, 4, 0]])
    np.testing.assert_array_equal(ids(b"P5 2 1 999\n" + struct.pack(">2H", 998, 7)), [[998, 7]])
    # white is 0: Pillow inverts what it reads
    out = io.BytesIO()
    Image.fromarray(RAMP).save(out, "TIFF", tiffinfo={262: 0})
    np.testing.assert_array_equal(ids(out.getvalue()), 255 - np.array(Image.open(out)))
    # signed samples of 8 bits
    out = io.BytesIO()
    Image.fromarray(RAMP).save(out, "TIFF", tiffinfo={339: 2})
    np.testing.assert_array_equal(ids(out.getvalue()), RAMP.view(np.int8))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(RAMP, "JPEG"), "is JPEG, whose compression changes class ids"),
        (encoded(COLORS, "WEBP", lossless=True), "is WEBP"),
        (encoded(RAMP, "AVIF"), "is AVIF"),
        (encoded(RAMP, "TIFF", compression="jpeg"), "is TIFF, whose compression"),
        (encoded(COLORS, "PNG"), "holds colors .mode RGB."),
        (encoded(COLORS, "PNG", "RGBA"), "holds colors .mode RGBA."),
        (encoded(RAMP.astype(np.float32), "TIFF"), "holds fractions"),
        (encoded(RAMP, "TIFF", save_all=True, append_images=[Image.fromarray(RAMP)]), "holds several pictures"),
    ],
)
def test_class_ids_that_are_refused(data, reason):
    with pytest.raises(PixelError, match=reason):
        read_picture(data, "categorical")


def test_colors_of_every_mode():
    for form, mode in [
        ("PNG", "RGBA"),
        ("TIFF", "RGBA"),
        ("TIFF", "RGBX"),
        ("BMP", "RGB"),
        ("PPM", "RGB"),
        ("TIFF", "YCbCr"),
        ("TIFF", "CMYK"),
    ]:
        data = encoded(COLORS, form, mode)
        picture = read_picture(data, channels=3)
        assert picture.array.shape == (12, 16, 3) and picture.dropped == (mode in ("RGBA", "RGBX"))
        assert np.abs(picture.array.astype(int) - COLORS).max() <= (3 if mode == "YCbCr" else 0), mode
    palette = encoded(np.where(COLORS > 99, 200, 10).astype(np.uint8), "PNG", "P")
    np.testing.assert_array_equal(read_picture(palette, channels=3).array, np.array(Image.open(io.BytesIO(palette)).convert("RGB")))
    for mode in ("1", "L", "LA"):
        assert read_picture(encoded(RAMP, "PNG", mode), channels=3).array.shape == (12, 16)  # gray
    np.testing.assert_array_equal(np.unique(read_picture(encoded(RAMP > 9, "PNG"), channels=3).array), [0, 255])


def test_four_channels_are_kept_where_they_are_asked_for():
    four = np.dstack([COLORS, RAMP])
    np.testing.assert_array_equal(read_picture(encoded(four, "TIFF"), channels=4).array, four)
    np.testing.assert_array_equal(
        read_picture(encoded(four, "TIFF", "CMYK"), channels=4).array, np.array(Image.fromarray(four).convert("CMYK"))
    )
    with pytest.raises(PixelError, match="has 3 channels .mode RGB., where 4 are expected"):
        read_picture(encoded(COLORS, "PNG"), channels=4)


def test_one_channel():
    for form, mode, dropped in (("PNG", "L", False), ("PNG", "LA", True), ("TIFF", "LA", True)):
        picture = read_picture(encoded(RAMP, form, mode), channels=1)
        assert picture.dropped is dropped
        np.testing.assert_array_equal(picture.array, RAMP)
    gray_palette = encoded(RAMP, "GIF")
    np.testing.assert_array_equal(read_picture(gray_palette, channels=1).array, RAMP)
    for array in (RAMP.astype(np.uint16) * 99, RAMP.astype(np.int32) * 9999, RAMP.astype(np.float32) / 7):
        np.testing.assert_array_equal(read_picture(encoded(array, "TIFF"), channels=1).array, array)
    np.testing.assert_array_equal(
        read_picture(b"P5 2 1 9999\n" + struct.pack(">2H", 9998, 7), channels=1).array, [[9998, 7]]
    )  # a depth map
    for array, reason in ((COLORS, "has 3 channels .mode RGB., where 1 is expected"), (np.dstack([COLORS, RAMP]), "has 3 channels")):
        with pytest.raises(PixelError, match=reason):
            read_picture(encoded(array, "PNG"), channels=1)


def test_loss_of_bit_depth_is_refused():
    samples = np.arange(12 * 12).reshape(12, 12) * 400
    for color, channels in ((2, 3), (4, 2), (6, 4)):
        for asked in (1, 3, 4, None):
            with pytest.raises(PixelError, match="several channels of 16 bits, of which only 8 would be read"):
                read_picture(png(samples, 16, color, channels), channels=asked)
    for array in (RAMP.astype(np.uint16), RAMP.astype(np.int32), RAMP.astype(np.float32)):
        with pytest.raises(PixelError, match="where 3 channels of 8 bits are expected"):
            read_picture(encoded(array, "TIFF"), channels=3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("form", "mode"), [("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "I;16"), ("TIFF", "L"), ("WEBP", "RGB")])
def test_pictures_are_turned_as_their_orientation_says(form, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = RAMP.astype(np.uint16) * 7 if mode == "I;16" else RAMP if mode == "L" else COLORS
    data = encoded(array, form, mode if mode == "P" else None, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    picture = read_picture(data)
    assert picture.orientation == orientation
    np.testing.assert_array_equal(picture.array, np.array(expected.convert("RGB") if mode == "P" else expected))
    if form == "PNG" and mode != "RGB":
        assert ids(data).shape == picture.array.shape[:2]


def test_damaged_metadata_do_not_hide_a_good_picture():
    data = encoded(COLORS, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage")
    assert read_picture(data).orientation == 1


def test_alignment_of_turned_pictures():
    sizes = dict(rgb=(40, 30), depth=(40, 30))
    assert misaligned(dict(rgb=1, depth=1), sizes) is None
    assert misaligned(dict(rgb=6, depth=6), sizes) is None
    assert misaligned(dict(rgb=6, depth=1), sizes) is None  # a quarter turn: had depth not been upright, its size would differ
    for orientation in (2, 3, 4):
        assert "rgb has the EXIF orientation" in misaligned(dict(depth=1, rgb=orientation), sizes)
    assert "nothing tells whether" in misaligned(dict(rgb=6, depth=1), dict(rgb=(30, 30), depth=(30, 30)))


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"<?xml version='1.0'?><svg></svg>", "SVG"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\x76\x2f\x31\x01", "OpenEXR: save it as .npy"),
        (b"%PDF-1.7", "a PDF"),
        (b"\x93NUMPY\x01\0", "name it .npy"),
        (b"hello", "not a readable picture"),
        (encoded(COLORS, "PNG")[:20], "truncated"),
    ],
)
def test_what_is_no_picture_is_named(start, what):
    with pytest.raises(PictureError, match=what):
        read_picture(start)


def test_truncated_files_of_every_format():
    for form in ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "AVIF"):
        noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
        data = encoded(noise, form)
        for length in (len(data) // 3, len(data) // 2, len(data) - len(data) // 10):
            with pytest.raises(PictureError, match="truncated"):
                read_picture(data[:length])


def test_no_picture_starts_another_program(monkeypatch, tmp_path):
    """PostScript inside x.png: Pillow's reader for it runs Ghostscript."""

    def refuse(*arguments, **_):
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    path = tmp_path / "x.png"
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n", b"\xc5\xd0\xd3\xc6" + bytes(28)):
        path.write_bytes(data)
        with pytest.raises(PictureError, match="PostScript"), open_picture(path):
            pass
        with pytest.raises(PictureError, match="PostScript"):
            read_picture(data)


def test_mutated_files_are_read_or_refused_and_nothing_else():
    """Whatever Pillow raises on damage, here it is a PictureError; a fault of ours would leave as itself."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(COLORS, form, exif=exif) for form in ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM")]
    files += [encoded(RAMP, "TIFF", mode) for mode in ("1", "L", "P", "LA", "I", "F")] + [b"P5 4 4 9\n" + bytes(16)]
    refused = 0
    for number in range(600):
        data = bytearray(files[number % len(files)])
        for position in rng.integers(0, min(len(data), 300), rng.integers(1, 6)):
            data[position] = rng.integers(0, 256)
        for arguments in (("continuous", 3), ("continuous", 1), ("categorical",)):
            try:
                read_picture(bytes(data), *arguments)
            except PictureError:
                refused += 1
    assert 600 < refused < 1800
