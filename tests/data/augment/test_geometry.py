"""The crop's distribution, Pillow's pixels, class ids, and missing values that do not bleed."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from maskvit.core.modalities import DEPTH, RGB, SEMSEG, Modality, parse_modalities
from maskvit.data import codec
from maskvit.data.augment.geometry import (
    Geometry,
    apply_geometry,
    center_geometry,
    draw_geometry,
    random_resized_box,
    transform,
    visible_share,
    whole_geometry,
)
from maskvit.data.augment.resizing import nearest_indices, resize_continuous
from maskvit.data.augment.settings import Augment, parse_augment
from maskvit.data.codec import RecordError
from maskvit.data.decoding import decode_record

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


@pytest.mark.parametrize(("height", "width"), [(300, 400), (100, 80), (224, 224), (231, 517)])
def test_rgb_crop_resize_flip_are_pillows(height, width):
    rgb = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    box = (11, 7, height - 20, width - 9)
    ours = apply_geometry(rgb, MODALITIES["rgb"], Geometry(box, SIZE, (0, 0), True), SIZE)
    image = Image.fromarray(rgb).crop((box[1], box[0], box[1] + box[3], box[0] + box[2]))
    image = image.resize((224, 224))  # no filter named, as in the reference
    theirs = np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, theirs)


def test_depth_without_holes_is_pillows():
    depth = counts(300, 400)
    ours = apply_geometry(depth[..., None], MODALITIES["depth"], Geometry((0, 0, 300, 400), SIZE, (0, 0), False), SIZE)
    assert ours.dtype == np.float32 and ours.shape == (224, 224, 1)
    as_float = np.asarray(Image.fromarray(depth.astype(np.float32)).resize((224, 224), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(ours[..., 0], as_float.clip(0, 65535))
    as_stored = np.asarray(Image.fromarray(depth).resize((224, 224))).astype(np.float32)  # rounds each pass
    assert np.abs(ours[..., 0] - as_stored).max() < 1.25


def test_overshoot_is_clipped_to_the_stored_range():
    step = np.zeros((64, 64, 1), np.uint16)
    step[:, 32:] = 65535
    resized = resize_continuous(step, (40, 40))
    assert resized.min() == 0 and resized.max() == 65535


@pytest.mark.parametrize("hole", [0, math.nan])
def test_missing_depth_does_not_bleed(hole):
    depth = np.full((300, 300, 1), 20000, np.float32)
    depth[:, 140:] = hole
    depth[40:60, 30:90] = hole
    modality = Modality(name="depth", **{**DEPTH, "missing": 0.0 if hole == 0 else None})
    stored = depth.astype(np.uint16) if hole == 0 else depth
    resized = apply_geometry(stored, modality, Geometry((0, 0, 300, 300), SIZE, (0, 0), False), SIZE)
    valid = ~np.isnan(resized)
    np.testing.assert_allclose(resized[valid], 20000, rtol=1e-6)
    assert abs(valid.mean() - (140 * 300 - 20 * 60) / 300**2) < 0.01
    if hole == 0:  # the trap: without declaring it, the edge does bleed
        plain = apply_geometry(stored, MODALITIES["depth"], Geometry((0, 0, 300, 300), SIZE, (0, 0), False), SIZE)
        assert ((plain > 100) & (plain < 19900)).any() and plain.max() > 20500


def test_pixels_far_from_a_hole_are_as_without_it():
    depth = counts(300, 300)[..., None]
    holed = depth.copy()
    holed[:30, :30] = 0
    plain = resize_continuous(depth, SIZE, 0)
    resized = resize_continuous(holed, SIZE, 0)
    assert np.isnan(resized[:20, :20]).all()
    np.testing.assert_allclose(resized[30:, 30:], plain[30:, 30:], rtol=1e-6)


def test_all_missing_and_stride_of_a_holed_modality():
    assert np.isnan(resize_continuous(np.zeros((9, 9, 1), np.uint16), (4, 4), 0)).all()
    modality = Modality(name="depth", **{**DEPTH, "missing": 0.0, "stride": 2})
    depth = np.full((100, 100, 1), 700, np.uint16)
    depth[:50] = 0
    resized = apply_geometry(depth, modality, Geometry((0, 0, 100, 100), (64, 64), (0, 0), True), (64, 64))
    assert resized.shape == (32, 32, 1) and np.isnan(resized[:15]).all()
    np.testing.assert_allclose(resized[17:], 700, rtol=1e-6)


@pytest.mark.parametrize("size_out", [7, 56, 96, 224, 256])
def test_nearest_indices_are_pillows(size_out):
    for size_in in range(1, 600):
        line = Image.fromarray(np.arange(size_in, dtype=np.int32)[None].repeat(2, 0))
        theirs = np.asarray(line.resize((size_out, 2), Image.Resampling.NEAREST))[0]
        np.testing.assert_array_equal(nearest_indices(size_in, size_out), theirs)


@pytest.mark.parametrize("flip", [False, True])
def test_class_ids_are_those_of_two_nearest_resizes(flip):
    ids = np.random.default_rng(0).integers(0, 133, (310, 275), dtype=np.uint8)
    box = (13, 21, 250, 201)
    ours = apply_geometry(ids, MODALITIES["semseg"], Geometry(box, SIZE, (0, 0), flip), SIZE)
    image = Image.fromarray(ids).crop((21, 13, 21 + 201, 13 + 250)).resize((224, 224), Image.Resampling.NEAREST)
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
    assert ours.dtype == np.int32 and ours.shape == (56, 56)
    np.testing.assert_array_equal(ours, np.asarray(image.resize((56, 56), Image.Resampling.NEAREST)))
    np.testing.assert_array_equal(ours, np.asarray(image)[2::4, 2::4])


def test_class_ids_out_of_range_and_missing_id():
    modality = Modality(name="semseg", **{**SEMSEG, "num_classes": 5, "missing": 255.0})
    ids = np.full((8, 8), 255, np.uint8)
    ids[4:] = 4
    whole = Geometry((0, 0, 8, 8), (16, 16), (0, 0), False)
    out = apply_geometry(ids, modality, whole, (16, 16))
    assert out.tolist() == [[-1] * 4] * 2 + [[4] * 4] * 2
    ids[7] = 5
    with pytest.raises(RecordError, match=r"'semseg': class id 5 is out of range; .*num_classes = 5 .*missing = 255"):
        apply_geometry(ids, modality, whole, (16, 16))


def test_crop_sampler_has_the_references_distribution():
    rng = np.random.default_rng(0)
    boxes = np.array([random_resized_box(rng, 375, 500) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 375).all() and (left + width <= 500).all()
    ratio, share = width / height, height * width / (375 * 500)
    assert ratio.min() > 0.74 and ratio.max() < 1.35 and share.min() > 0.195
    # Without rejections the share is uniform on (0.2, 1); boxes that do not fit are the large ones of narrow form.
    rng, wide = np.random.default_rng(1), []
    for _ in range(4000):
        box = random_resized_box(rng, 400, 400, scale=(0.2, 0.5))
        wide.append((box[2] * box[3] / 160000, math.log(box[3] / box[2])))
    shares, logs = np.array(wide).T
    assert abs(shares.mean() - 0.35) < 0.006 and abs(shares.std() - 0.3 / math.sqrt(12)) < 0.004
    assert abs(logs.mean()) < 0.01 and abs(logs.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.01


def test_crop_sampler_falls_back_to_the_center():
    rng = np.random.default_rng(0)
    assert random_resized_box(rng, 10, 1000, scale=(1.0, 1.0)) == (0, (1000 - 13) // 2, 10, 13)
    assert random_resized_box(rng, 1000, 10, scale=(1.0, 1.0)) == ((1000 - 13) // 2, 0, 13, 10)
    assert random_resized_box(rng, 1, 1) == (0, 0, 1, 1)


def test_geometry_is_shared_and_flips_half():
    rng = np.random.default_rng(0)
    flips = [draw_geometry(rng, 60, 60, SIZE, Augment()).flip for _ in range(2000)]
    assert 0.46 < np.mean(flips) < 0.54
    # one picture as three modalities: after any augmentation they still agree
    ids = np.arange(100, dtype=np.uint8)[None].repeat(100, 0)
    arrays = {"rgb": ids[..., None].repeat(3, -1), "depth": ids[..., None].astype(np.uint16), "semseg": ids}
    for seed in range(5):
        geometry = draw_geometry(np.random.default_rng(seed), 100, 100, SIZE, Augment())
        out = transform(arrays, MODALITIES, geometry, SIZE, "pil")
        assert np.abs(out["rgb"][..., 0] - out["depth"][..., 0]).max() <= 1
        assert np.abs(out["rgb"][2::4, 2::4, 0].astype(int) - out["semseg"]).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (256, 256), (100, 333), (375, 500)])
def test_evaluation_resizes_the_short_side_and_cuts_the_middle(height, width):
    rgb = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = apply_geometry(rgb, MODALITIES["rgb"], center_geometry(height, width, SIZE, 0.875), SIZE)
    short = min(height, width)
    scaled = (int(256 * width / short), int(256 * height / short))
    image = np.asarray(Image.fromarray(rgb).resize(scaled, Image.Resampling.BICUBIC))
    top, left = round((scaled[1] - 224) / 2), round((scaled[0] - 224) / 2)
    np.testing.assert_array_equal(ours, image[top : top + 224, left : left + 224])


def test_evaluation_of_non_square_sizes_covers_the_window():
    for height, width in ((50, 300), (300, 50), (97, 101)):
        geometry = center_geometry(height, width, (96, 160), 0.9)
        assert geometry.resized[0] >= 96 and geometry.resized[1] >= 160 and min(geometry.offset) >= 0


@pytest.mark.parametrize("crop", ["random_resized", "center", "none"])
def test_visible_share_is_what_the_sample_shows(crop):
    rows, columns = np.mgrid[:300, :400].astype(np.float32)  # the picture says where each pixel comes from
    where = np.stack([(rows + 0.5) / 300, (columns + 0.5) / 400], axis=-1)
    modality = Modality("place", channels=2)
    rng = np.random.default_rng(0)
    for _ in range(4):
        geometry = draw_geometry(rng, 300, 400, SIZE, Augment(crop=crop))
        top, left, height, width = visible_share(geometry, 300, 400, SIZE)
        seen = apply_geometry(where, modality, geometry, SIZE)
        seen = seen[:, ::-1] if geometry.flip else seen
        middles = (np.arange(224) + 0.5) / 224
        # the resize leans inwards at the very edge
        np.testing.assert_allclose(seen[8:-8, 100, 0], (top + height * middles)[8:-8], atol=1e-4)
        np.testing.assert_allclose(seen[100, 8:-8, 1], (left + width * middles)[8:-8], atol=1e-4)
    assert visible_share(whole_geometry(30, 40, SIZE), 30, 40, SIZE) == (0, 0, 1, 1)
    share = visible_share(center_geometry(256, 512, SIZE, 0.875), 256, 512, SIZE)
    np.testing.assert_allclose(share, (16 / 256, 144 / 512, 224 / 256, 224 / 512))


def test_crops_by_name_and_errors():
    rng = np.random.default_rng(0)
    assert draw_geometry(rng, 30, 40, SIZE, Augment(crop="none", flip=0)) == Geometry((0, 0, 30, 40), SIZE, (0, 0), False)
    middle = draw_geometry(rng, 300, 400, SIZE, Augment(crop="center", flip=1))
    assert middle == Geometry((0, 0, 300, 400), (224, 298), (0, 37), True)
    assert parse_augment(None) == Augment()
    assert parse_augment({"scale": [0.5, 1.0]}).scale == (0.5, 1.0)
    for settings, text in [
        ({"flips": 0.5}, r"config.data.augment has unknown key 'flips'; known: crop, scale, ratio, flip, resize"),
        ({"crop": "five"}, r"augment.crop is 'five'; known: random_resized, center, none"),
        ({"resize": "gpu"}, r"augment.resize is 'gpu'; known: pil, cv2"),
        ({"scale": (1.0, 0.2)}, r"augment.scale is \(1.0, 0.2\)"),
        ({"flip": 2.0}, r"augment.flip is 2.0"),
    ]:
        with pytest.raises(ValueError, match=text):
            parse_augment(settings)


def test_faster_resize_by_name():
    pytest.importorskip("cv2")
    rows, columns = np.mgrid[:300, :400]
    rgb = np.stack([rows // 2, columns // 2, (rows + columns) // 4], -1).astype(np.uint8)
    fast = resize_continuous(rgb, SIZE, None, "cv2")
    exact = resize_continuous(rgb, SIZE, None, "pil")
    assert fast.dtype == np.uint8 and fast.shape == exact.shape
    assert np.abs(fast.astype(int) - exact).max() <= 3  # smooth pictures; on noise the two differ by more
    assert resize_continuous(rgb[:20, :20, :1], SIZE, None, "cv2").shape == (224, 224, 1)


def test_faster_resize_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(ValueError, match='"cv2", but OpenCV is not installed: pip install opencv-python-headless'):
        parse_augment({"resize": "cv2"})


def test_other_modalities_need_no_code():
    modalities = parse_modalities(
        {
            "normals": dict(kind="continuous", channels=3, scale=2 / 255, mean=(1.0,), missing=0.0),
            "bands": dict(kind="continuous", channels=10, scale=1e-4, stride=2),
        }
    )
    rng = np.random.default_rng(0)
    normals = rng.integers(1, 256, (40, 50, 3), dtype=np.uint8)
    normals[:20] = 0
    bands = rng.integers(1000, 3000, (40, 50, 10)).astype(np.uint16)
    arrays = decode_record({"normals": encoded(normals), "bands": codec.encode_array(bands)}, modalities)
    out = transform(arrays, modalities, Geometry((0, 0, 40, 50), (32, 32), (0, 0), False), (32, 32), "pil")
    assert out["normals"].dtype == np.float32 and np.isnan(out["normals"][:15]).all() and not np.isnan(out["normals"][17:]).any()
    assert out["bands"].shape == (16, 16, 10) and out["bands"].dtype == np.float32
    band = Image.fromarray(bands[..., 7].astype(np.float32)).resize((32, 32), Image.Resampling.BICUBIC)
    band = band.resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(out["bands"][..., 7], np.asarray(band))


# --- directions, orientation, size --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_directions_change_sign_where_a_picture_is_mirrored(dtype):
    """A surface that faces left faces right in the mirror; stored as 0 ... 255 for -1 ... 1 or as they are."""
    scale, mean = (2 / 255, (1.0,)) if dtype == np.uint8 else (1.0, (0.0,))
    spec = parse_modalities({"normals": dict(scale=scale, mean=mean, mirrored_channels=(0,), patch=8)})["normals"]
    rng = np.random.default_rng(0)
    normals = rng.integers(0, 256, (16, 16, 3), np.uint8) if dtype == np.uint8 else rng.uniform(-1, 1, (16, 16, 3)).astype(np.float32)
    geometry = whole_geometry(16, 16, (16, 16))
    plain, flipped = (apply_geometry(normals, spec, geometry._replace(flip=flip), (16, 16)) for flip in (False, True))
    assert flipped.dtype == dtype
    values, mirrored = (picture * spec.scale - spec.mean[0] for picture in (plain.astype(np.float32), flipped.astype(np.float32)))
    np.testing.assert_allclose(mirrored[:, ::-1] * [-1, 1, 1], values, atol=1e-5)


def test_mirrored_channels_that_make_no_sense():
    for fields, reason in (
        (dict(mirrored_channels=(3,)), "channels are 0 ... 2, each once"),
        (dict(mirrored_channels=(0, 0)), "each once"),
        (dict(mirrored_channels=(0,), standardize=True), "without standardize"),
        (dict(mirrored_channels=(0,), kind="categorical", num_classes=3, loss="cross_entropy"), "needs a continuous modality"),
    ):
        with pytest.raises(ValueError, match=reason):
            parse_modalities({"normals": fields})
