"""What a record's bytes become: decoded arrays that fit their declaration, or the reason why not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from maskvit.core.modalities import DEPTH, RGB, SEMSEG, parse_modalities
from maskvit.data import codec
from maskvit.data.codec import RecordError
from maskvit.data.decoding import absent, decode_record

MODALITIES = parse_modalities({"rgb": RGB, "depth": DEPTH, "semseg": SEMSEG})
SIZE = (224, 224)


def encoded(array: np.ndarray, form: str = "png") -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, form)
    return out.getvalue()


def counts(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth uint16 depth with noise, away from the ends of the range."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    return (20000 + 40 * rows + 25 * columns + rng.integers(0, 300, (height, width))).astype(np.uint16)


def test_decode_record():
    rgb = np.zeros((20, 30, 3), np.uint8)
    record = {"rgb": encoded(rgb, "jpeg"), "depth": codec.encode_array(counts(20, 30)), "semseg": b""}
    arrays = decode_record(record, MODALITIES)
    assert {name: (array.shape, array.dtype.name) for name, array in arrays.items()} == {
        "rgb": ((20, 30, 3), "uint8"),
        "depth": ((20, 30, 1), "uint16"),
    }
    with pytest.raises(RecordError, match="rgb 20 x 30, semseg 10 x 30"):
        decode_record({"rgb": record["rgb"], "semseg": encoded(np.zeros((10, 30), np.uint8))}, MODALITIES)
    with pytest.raises(RecordError, match="modality 'rgb': .*truncated"):
        decode_record({"rgb": record["rgb"][:100]}, MODALITIES)
    with pytest.raises(RecordError, match="modality 'depth': has 3 channels .mode RGB., where 1 is expected"):
        decode_record({"depth": record["rgb"]}, MODALITIES)
    with pytest.raises(RecordError, match=r"modality 'rgb': has shape \(20, 30, 1\)"):  # 16-bit grey is no color picture
        decode_record({"rgb": record["depth"]}, MODALITIES)
    with pytest.raises(RecordError, match="is JPEG, whose compression changes class ids"):
        decode_record({"semseg": record["rgb"]}, MODALITIES)
    with pytest.raises(RecordError, match="none of the modalities rgb, depth, semseg"):
        decode_record({"rgb": b""}, MODALITIES)


def test_grey_cmyk_and_palette_pictures_become_color():
    grey = np.random.default_rng(0).integers(0, 256, (12, 10), dtype=np.uint8)
    arrays = decode_record({"rgb": encoded(grey)}, MODALITIES)
    np.testing.assert_array_equal(arrays["rgb"], np.repeat(grey[..., None], 3, 2))
    palette = Image.new("P", (10, 12), 3)
    palette.putpalette([0, 0, 0, 9, 9, 9, 7, 7, 7, 200, 100, 50])
    out = io.BytesIO()
    palette.save(out, "png")
    assert (decode_record({"rgb": out.getvalue()}, MODALITIES)["rgb"] == (200, 100, 50)).all()
    assert (decode_record({"semseg": out.getvalue()}, MODALITIES)["semseg"] == 3).all()
    out = io.BytesIO()
    Image.new("CMYK", (10, 12), (0, 255, 255, 0)).save(out, "jpeg")
    assert decode_record({"rgb": out.getvalue()}, MODALITIES)["rgb"].shape == (12, 10, 3)


def test_absent_modalities():
    assert (absent(MODALITIES["semseg"], SIZE, np.dtype(np.int32)) == -1).all()
    assert np.isnan(absent(MODALITIES["depth"], SIZE, np.dtype(np.float32))).all()
    assert (absent(MODALITIES["rgb"], SIZE, np.dtype(np.uint8)) == 0).all()


def test_turned_pictures_of_a_record():
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.fromarray(np.rot90(rgb)).save(out, "png", exif=exif)
    record = {"rgb": out.getvalue(), "depth": codec.encode_array(counts(20, 30))}
    np.testing.assert_array_equal(decode_record(record, MODALITIES)["rgb"], rgb)
    with pytest.raises(RecordError, match="rgb 20 x 30 after turning it, depth 30 x 20"):
        decode_record({**record, "depth": codec.encode_array(counts(30, 20))}, MODALITIES)
    exif[0x0112] = 3
    out = io.BytesIO()
    Image.fromarray(rgb[::-1, ::-1]).save(out, "png", exif=exif)
    with pytest.raises(RecordError, match="rgb has the EXIF orientation 3 and depth has 1"):
        decode_record({**record, "rgb": out.getvalue()}, MODALITIES)


def test_placeholders_are_no_pictures():
    with pytest.raises(RecordError, match="modality 'rgb': is 1 x 1 pixels; at least 8 x 8"):
        decode_record({"rgb": encoded(np.zeros((1, 1, 3), np.uint8))}, MODALITIES)
    with pytest.raises(RecordError, match="is 8 x 900 pixels; the longer side may be 100 times the shorter one at most"):
        decode_record({"rgb": encoded(np.zeros((8, 900, 3), np.uint8))}, MODALITIES)
