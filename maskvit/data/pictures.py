"""Picture files: the one place that opens them and says what their pixels are.

Pillow chooses a reader by content, and some of its readers start programs (PostScript) or are rarely tried: only `FORMATS` are
let in. What a file says about its pixels is followed (orientation, palette, bit depth) or the file is refused with the reason.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "DIB", "GIF", "PPM", "AVIF")
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".tif", ".tiff", ".webp", ".bmp", ".dib", ".gif", ".ppm", ".pgm", ".pbm",
    ".pnm", ".pfm", ".avif",
)  # fmt: skip
EXACT = ("PNG", "TIFF", "BMP", "DIB", "GIF", "PPM")  # formats that give back the very values that were saved
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright

# What undoes each EXIF orientation, as in `PIL.ImageOps.exif_transpose`.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# How files begin that people give in place of pictures: (offset, bytes, what it is).
FOREIGN = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch it with git lfs pull"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"%PDF", "a PDF"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR: save it as .npy or as a float .tif"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif", "HEIF"),
    (4, b"ftypmsf", "HEIF"),
    (4, b"ftypisom", "a video"),
    (4, b"ftypmp4", "a video"),
    (4, b"ftypqt", "a video"),
    (0, b"\x93NUMPY", "a numpy array: name it .npy"),
    (0, b"\x89HDF", "HDF5"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "gzip-compressed: unpack it"),
    (128, b"DICM", "DICOM"),
)


class PictureError(ValueError):
    """A file that is no picture, or a damaged one."""


class PixelError(PictureError):
    """A picture whose pixels cannot be taken as what is asked for."""


class Header(NamedTuple):
    """What a file says of itself before its pixels are read.

    `mode`: Pillow's; `raw`: the stored layout in Pillow's notation ("L;4", "RGB;16B"); `bits` per sample; `maximum`: the
    largest sample of a PNM file that is scaled on reading, else 0; `signed`: whether samples of 8 bits are.
    """

    format: str
    mode: str
    raw: str
    bits: int
    maximum: int
    signed: bool
    lossy: bool
    animated: bool


class Picture(NamedTuple):
    """The pixels of a file, upright: `array` "h w" or "h w c".

    `orientation`: what the file said and what has been undone; `dropped`: an alpha or further channel that was left out.
    """

    array: np.ndarray
    header: Header
    orientation: int
    dropped: bool


@contextlib.contextmanager
def _damage(what: str) -> Iterator[None]:
    """Whatever Pillow raises on damaged data (it may be anything) as PictureError."""
    try:
        yield
    except PictureError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PictureError(f"truncated or damaged {what}: {reason}") from error


def foreign(start: bytes) -> str | None:
    """What a file is that is no picture, by its first bytes (256 are enough); None where that is not known."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page, not a picture: was a login or an error page saved?"
    if text.startswith(b"<?xml"):
        return "an SVG drawing" if b"<svg" in text else "XML"
    return next((what for offset, magic, what in FOREIGN if start[offset : offset + len(magic)] == magic), None)


@contextlib.contextmanager
def open_picture(source: bytes | str | os.PathLike[str]) -> Iterator[tuple[Image.Image, Header]]:
    """Open a picture (a path, or the bytes of a file) without reading its pixels.

    Raises:
      PictureError: no picture in one of `FORMATS`; it says what it is instead where that is known.
      OSError: a path that cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        file: Any = io.BytesIO(source) if isinstance(source, bytes) else stack.enter_context(open(source, "rb"))
        start = file.read(256)
        file.seek(0)
        if not start:
            raise PictureError("is empty (0 bytes)")
        try:
            image = stack.enter_context(Image.open(file, formats=FORMATS))
        except Image.UnidentifiedImageError as error:
            known = foreign(start)
            raise PictureError(
                f"is {known}" if known else f"not a readable picture, or a truncated one (known: {', '.join(FORMATS)})"
            ) from error
        except Image.DecompressionBombError as error:
            raise PictureError(f"is too large to be read: {error}") from error
        except Exception as error:
            raise PictureError(f"truncated or damaged picture: {error}") from error
        with _damage(image.format or "picture"):
            header = _header(image)
        yield image, header


def _header(image: Image.Image) -> Header:
    name = "JPEG" if image.format == "MPO" else str(image.format)
    tile = image.tile[0] if getattr(image, "tile", None) else None  # type: ignore[attr-defined]
    arguments = (tile[3] if isinstance(tile[3], tuple) else (tile[3],)) if tile else ()
    raw = next((part for part in arguments if isinstance(part, str) and part), image.mode)
    stated = re.search(r";(\d+)", raw)
    bits = int(stated.group(1)) if stated else 1 if image.mode == "1" else 32 if image.mode in ("I", "F") else 8
    scaled = tile is not None and tile[0] in ("ppm", "ppm_plain") and isinstance(arguments[-1], int)
    sample_format = getattr(image, "tag_v2", {}).get(339, 1) if name == "TIFF" else 1
    lossy = name not in EXACT or (name == "TIFF" and image.info.get("compression") in LOSSY_TIFF)
    animated = image.format != "MPO" and bool(getattr(image, "is_animated", False))  # MPO: a phone's gain map behind its picture
    return Header(
        name, image.mode, raw, bits, arguments[-1] if scaled else 0,
        image.mode == "L" and sample_format in (2, (2,)), lossy, animated,
    )  # fmt: skip


def read_picture(data: bytes, kind: str = "continuous", channels: int | None = None) -> Picture:
    """The pixels of a picture file as a modality of that kind (`maskvit.core.modalities`) has them, turned upright.

    Class ids are the stored samples at any bit depth: of 1 bit 0 and 1, of a palette its indices. Numbers: a palette goes through
    its colors, gray of less than 8 bits covers 0 ... 255, CMYK and the like become RGB. An alpha channel is dropped unless
    `channels` counts it. None for `channels` takes what the file has.

    Returns: "h w" for one channel (uint8, uint16, int16, int32, uint32 or float32), else uint8 "h w c".

    Raises:
      PictureError: no picture, or a damaged one.
      PixelError: several pages; class ids in a lossy format or in colors; 16-bit colors, which would lose half of their bits; other
        channels than asked for.
    """
    with open_picture(data) as (image, header):
        if header.animated:
            raise PixelError("holds several pictures (pages or frames), one is expected: store them apart")
        if kind == "categorical":
            _check_ids(header)
        elif header.bits > 8 and header.mode not in ("I", "F") and not header.mode.startswith("I;16"):
            raise PixelError(
                f"has several channels of {header.bits} bits, of which only 8 would be read: make it 8 bits, or store it as .npy"
            )
        # Pillow turns TIFF pictures itself when it loads them, and then forgets the tag.
        orientation = getattr(image, "tag_v2", {}).get(ORIENTATION, 1) if header.format == "TIFF" else None
        with _damage(header.format):
            image.load()
        if orientation is None:
            orientation = _orientation(image)
            if orientation in TURNS:
                image = image.transpose(TURNS[orientation])
        orientation = orientation if orientation in TURNS else 1
        with _damage(header.format):
            array, dropped = _ids(image, header) if kind == "categorical" else _numbers(image, header, channels)
        return Picture(array, header, orientation, dropped)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata of a good picture say nothing
        return 1


def _check_ids(header: Header) -> None:
    if header.lossy:
        raise PixelError(f"is {header.format}, whose compression changes class ids: store them as PNG, TIFF or .npy")
    if not (header.mode in ("1", "L", "LA", "La", "P", "PA", "I") or header.mode.startswith("I;16")):
        what = "fractions" if header.mode == "F" else f"colors (mode {header.mode})"
        raise PixelError(f"holds {what}, but class ids are whole numbers in one channel: store them so, as PNG or .npy")


def _ids(image: Image.Image, header: Header) -> tuple[np.ndarray, bool]:
    """(the stored samples of the first channel, whether an alpha channel was dropped)."""
    alpha = len(image.getbands()) > 1
    array = np.array(image.getchannel(0) if alpha else image)
    if header.mode == "1":
        array = array.astype(np.uint8)
    elif header.mode in ("L", "LA") and header.bits in (2, 4):
        array //= 255 // (2**header.bits - 1)  # Pillow spreads them over 0 ... 255
    if re.match(r"[1L];\d?I", header.raw):  # white is 0, and Pillow has undone it
        array = (2**header.bits - 1) - array
    return _samples(array, header), alpha


def _samples(array: np.ndarray, header: Header) -> np.ndarray:
    """One channel as it was stored: what Pillow scaled or whose sign it lost is put back."""
    if header.maximum:
        array = np.rint(array * (header.maximum / (65535 if header.mode == "I" else 255)))
        return array.astype(np.uint16 if header.maximum > 255 else np.uint8)
    if header.signed:
        return array.view(np.int8).astype(np.int16)
    if header.raw == "I;32N":
        return array.view(np.uint32)
    return array.astype(np.uint16) if header.mode.startswith("I;16") else array


def _numbers(image: Image.Image, header: Header, channels: int | None) -> tuple[np.ndarray, bool]:
    """(pixels, whether a channel was dropped)."""
    mode = header.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        if channels not in (None, 1):
            raise PixelError(f"has one channel of {header.bits} bits (mode {mode}), where {channels} channels of 8 bits are expected")
        return _samples(np.array(image), header), False
    extra = "X" in header.raw or "transparency" in image.info
    one = channels == 1
    if mode in ("P", "PA"):
        image = image.convert("RGBA" if mode == "PA" or "transparency" in image.info else "RGB")
        red, green, blue = (np.array(image.getchannel(band)) for band in "RGB")
        if one and np.array_equal(red, green) and np.array_equal(green, blue):
            return red, extra or mode == "PA"
    elif mode == "1":
        image = image.convert("L")
    elif mode in ("La", "RGBa"):
        image = image.convert("LA" if mode == "La" else "RGBA")
    elif mode not in ("L", "LA", "RGB", "RGBA", "RGBX") and not (mode == "CMYK" and channels == 4):
        image = image.convert("RGB")
    bands = image.getbands()
    kept = len(bands)
    if channels != kept and bands[-1] in ("A", "X"):
        kept, extra = kept - 1, True
    gray_for_color = channels == 3 and kept == 1
    if channels is not None and kept != channels and not gray_for_color:
        raise PixelError(f"has {kept} channel{'s' * (kept > 1)} (mode {mode}), where {channels} {'is' if one else 'are'} expected")
    array = np.array(image)
    if array.ndim == 3:
        array = array[..., 0] if kept == 1 else np.ascontiguousarray(array[..., :kept])
    return (_samples(array, header) if one else array), extra


def misaligned(orientations: Mapping[str, int], sizes: Mapping[str, tuple[int, int]]) -> str | None:
    """Why pictures of one record, turned upright, cannot be trusted to lie over each other; None where they can.

    A picture that was turned lies over one that says nothing of orientation only where their sizes prove it: after a quarter turn
    of a picture that is not square. `sizes`: (height, width) after turning.
    """
    for name, orientation in orientations.items():
        others = [other for other, theirs in orientations.items() if theirs != orientation]
        height, width = sizes[name]
        if orientation != 1 and others and (orientation < 5 or height == width):
            return (
                f"{name} has the EXIF orientation {orientation} and {others[0]} has {orientations[others[0]]}, so nothing tells whether "
                "they lie over each other: turn the pixels and remove the tag (mogrify -auto-orient), or give all of them the same tag"
            )
    return None
