"""Crops of dense tasks against their recipes, written out step by step; padding that is missing; targets that stay on their pictures."""

from __future__ import annotations

import functools
import io

import numpy as np
import pytest
from PIL import Image

from maskvit.core.modalities import DEPTH, RGB, SEMSEG, parse_modalities
from maskvit.data import codec
from maskvit.data.augment import change_pictures, opencv
from maskvit.data.augment.dense import DENSE, DenseRecord, covering_size, evaluated, fitting_size
from maskvit.data.augment.geometry import random_resized_once_box
from maskvit.data.augment.settings import parse_augment
from maskvit.data.batches import eval_batches, train_batches
from maskvit.data.codec import RecordError
from maskvit.data.sources import ListSource
from maskvit.sharding import make_mesh, place_batch

SIZE = (32, 32)
MODALITIES = parse_modalities(
    {
        "rgb": {**RGB, "patch": 8},
        "depth": {**DEPTH, "patch": 8, "missing": 0.0},
        "semseg": {**SEMSEG, "patch": 8, "stride": 1, "num_classes": 6, "missing": 255},
    }
)
PICTURES = frozenset({"rgb"})


def arrays(height: int, width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A smooth picture; its depth is what its blue shows, its classes are quarters of it, with some of both missing."""
    rows, columns = np.mgrid[:height, :width]
    red, green = rows * 255 // height, columns * 255 // width
    rgb = np.stack([red, green, (red + green) // 2], axis=-1).astype(np.uint8)
    depth = (1 + 100 * ((red + green) // 2))[..., None].astype(np.uint16)
    semseg = (2 * (rows * 2 // height) + columns * 2 // width + 1).astype(np.uint8)
    depth[: height // 8], semseg[:, : width // 8] = 0, 255
    return {"rgb": rgb, "depth": depth, "semseg": semseg}


def cut(crop: str, seed: int, height: int = 60, width: int = 90, **settings) -> dict[str, np.ndarray]:
    augment = parse_augment(dict(crop=crop, **settings))
    rng = np.random.default_rng(seed)
    record = DenseRecord(arrays(height, width), MODALITIES, PICTURES, "pil")
    return DENSE[crop](rng, record, SIZE, augment, functools.partial(change_pictures, rng, augment=augment))


def nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = ([i * old // new for i in range(new)] for old, new in zip(array.shape[:2], size, strict=True))
    return array[rows][:, columns]


def padded(array: np.ndarray, value: float, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Grown below and to the right to at least `size`."""
    more = [(0, max(0, side - have)) for side, have in zip(size, array.shape[:2], strict=True)]
    return np.pad(array, more + [(0, 0)] * (array.ndim - 2), constant_values=value)


def marked(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Missing values as a batch has them."""
    depth, semseg = found["depth"].astype(np.float32), found["semseg"].astype(np.int32)
    return {"rgb": found["rgb"], "depth": np.where(depth == 0, np.nan, depth), "semseg": np.where(semseg == 255, -1, semseg)}


def assert_same(ours, theirs):
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
        assert ours[name].dtype == {"rgb": np.uint8, "depth": np.float32, "semseg": np.int32}[name]


# --- the recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_large_scale_jitter_step_by_step(seed):
    found, rng = arrays(60, 90), np.random.default_rng(seed)
    if rng.random() < 0.5:
        found = {name: array[:, ::-1] for name, array in found.items()}
    scaled = (21, 32)  # 60 x 90 made to fit 32 x 32
    steps = [scaled]
    factor = rng.uniform(0.1, 2.0)
    steps.append((int(21 * factor), int(32 * factor)))
    for size in steps:
        found = {n: opencv.resize_bilinear(a, size) if n == "rgb" else nearest(a, size) for n, a in found.items()}
    found = marked(found)
    found = {name: padded(array, {"rgb": 128, "depth": np.nan, "semseg": -1}[name]) for name, array in found.items()}
    u, v = rng.random(2)
    top, left = int((found["rgb"].shape[0] - 32) * u), int((found["rgb"].shape[1] - 32) * v)
    assert_same(cut("large_scale_jitter", seed), {n: a[top : top + 32, left : left + 32] for n, a in found.items()})


@pytest.mark.parametrize("seed", range(4))
def test_shortest_step_by_step(seed):
    found, rng = arrays(60, 90), np.random.default_rng(seed)
    found = {n: opencv.resize_bilinear(a, (32, 48)) if n == "rgb" else nearest(a, (32, 48)) for n, a in found.items()}
    if rng.random() < 0.5:
        found = {name: array[:, ::-1] for name, array in found.items()}
    left = int(16 * rng.random(2)[1])  # nothing is left over in height
    assert_same(cut("shortest", seed), marked({name: array[:, left : left + 32] for name, array in found.items()}))


@pytest.mark.parametrize("seed", range(6))
def test_ratio_range_step_by_step(seed):
    settings = dict(base_size=(128, 32), cat_max_ratio=0.75)
    found, rng = arrays(60, 90), np.random.default_rng(seed)
    ratio = rng.uniform(0.5, 2.0)
    scale = min(int(128 * ratio) / 90, int(32 * ratio) / 60)
    size = int(60 * scale + 0.5), int(90 * scale + 0.5)
    found = {n: opencv.resize_bilinear(a, size) if n == "rgb" else nearest(a, size) for n, a in found.items()}

    def draw():
        return [int(rng.integers(0, max(side - 32, 0) + 1)) for side in size]

    top, left = draw()
    for _ in range(10):
        ids = found["semseg"][top : top + 32, left : left + 32]
        counts = [int((ids == k).sum()) for k in range(1, 5) if (ids == k).any()]
        if len(counts) > 1 and max(counts) / sum(counts) < 0.75:
            break
        top, left = draw()
    found = marked({name: array[top : top + 32, left : left + 32] for name, array in found.items()})
    if rng.random() < 0.5:
        found = {name: array[:, ::-1] for name, array in found.items()}
    rgb = padded(found["rgb"].astype(int), -1)
    rgb = np.where(rgb < 0, (124, 116, 104), rgb).astype(np.uint8)  # the reference pads what is normalized with 0
    assert_same(
        cut("ratio_range", seed, **settings), {"rgb": rgb, "depth": padded(found["depth"], np.nan), "semseg": padded(found["semseg"], -1)}
    )


def test_crops_of_one_class_are_drawn_again():
    """One corner is of another class: few crops show enough of it, and with the limit many more do."""
    corner = arrays(200, 200)
    corner["semseg"] = np.ones((200, 200), np.uint8)
    corner["semseg"][:100, :100] = 2

    def mixed_share(limit: float) -> float:
        settings = parse_augment(dict(crop="ratio_range", base_size=(128, 128), factor=(1.0, 1.0), cat_max_ratio=limit))
        shares = []
        for seed in range(150):
            record = DenseRecord(corner, MODALITIES, PICTURES, "pil")
            ids = DENSE["ratio_range"](np.random.default_rng(seed), record, SIZE, settings, lambda pictures: pictures)["semseg"]
            shares.append(max((ids == 1).mean(), (ids == 2).mean()) < 0.75)
        return float(np.mean(shares))

    assert mixed_share(1.0) < 0.25 < 0.6 < mixed_share(0.75)


def test_colors_change_on_the_fitted_picture_before_the_scale():
    """The mean that contrast turns around is that of the whole fitted picture, not of the crop."""
    settings = dict(color_jitter=dict(probability=1.0, brightness=(1, 1), contrast=(0.5, 0.5), saturation=(1, 1), hue=(0, 0)), flip=0.0)
    fitted = opencv.resize_bilinear(arrays(60, 90)["rgb"], (21, 32))
    mean = opencv.to_gray(fitted).mean()
    made = cut("large_scale_jitter", 1, factor=(1.0, 1.0), **settings)
    expected = np.clip(fitted * 0.5 + mean * 0.5, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(made["rgb"][:21], expected)
    assert (made["rgb"][21:] == 128).all()  # padding keeps its color


@pytest.mark.parametrize("crop", list(DENSE))
def test_targets_stay_on_their_picture(crop):
    """Depth says which blue a pixel has: after any crop and flip it still does."""
    compared = 0
    for seed in range(12):
        made = cut(crop, seed, 300, 200, **(dict(base_size=(128, 40)) if crop == "ratio_range" else {}))
        there = ~np.isnan(made["depth"][..., 0])
        from_depth, blue = (made["depth"][there][:, 0] - 1) / 100, made["rgb"][there][:, 2]
        if there.sum() > 100 and blue.std() > 5:
            assert np.corrcoef(from_depth, blue)[0, 1] > 0.97
            compared += 1
    assert compared > 6


def test_strides_take_pixel_4k_and_mirrors_turn_directions():
    modalities = parse_modalities(
        {
            "rgb": {**RGB, "patch": 8},
            "semseg": {**SEMSEG, "patch": 8, "num_classes": 250, "missing": 255},
            "normals": dict(patch=8, scale=2 / 255, mean=(1.0,), mirrored_channels=(0,), missing=0.0),
        }
    )
    ids = np.arange(32, dtype=np.uint8)[None].repeat(32, 0)
    normals = np.random.default_rng(0).integers(1, 256, (32, 32, 3), dtype=np.uint8)
    normals[:4] = 0
    record = {"rgb": np.zeros((32, 32, 3), np.uint8), "semseg": ids, "normals": normals}
    made = evaluated(DenseRecord(record, modalities, PICTURES, "pil"), SIZE, "pad")
    assert made["semseg"].shape == (8, 8) and made["semseg"][0].tolist() == list(range(0, 32, 4))
    dense = DenseRecord(record, modalities, PICTURES, "pil")
    dense.flip()
    mirrored = dense.finish(SIZE, {})["normals"]
    assert np.isnan(mirrored[:4]).all()
    expected = normals[4:].astype(float)
    expected[..., 0] = 255 - expected[..., 0]
    np.testing.assert_allclose(mirrored[4:, ::-1], expected)


def test_sizes():
    assert fitting_size(480, 640, (640, 640)) == (480, 640) and fitting_size(683, 512, (512, 512)) == (512, 384)
    assert covering_size(480, 640, (256, 256)) == (256, 341) and covering_size(100, 50, (32, 64)) == (128, 64)


def test_a_class_out_of_range_is_a_bad_sample():
    wrong = arrays(40, 40)
    wrong["semseg"][:] = 9
    record = DenseRecord(wrong, MODALITIES, PICTURES, "pil")
    with pytest.raises(RecordError, match="class id 9 is out of range"):
        evaluated(record, SIZE, "pad")


# --- in batches -----------------------------------------------------------------------------------------------------------


def encoded(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "png")
    return out.getvalue()


def stored(index: int) -> dict:
    found = arrays(40 + index, 60, index)
    return {
        "id": str(index), "rgb": encoded(found["rgb"]), "depth": codec.encode_array(found["depth"]), "semseg": encoded(found["semseg"]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def source() -> ListSource:
    return ListSource([stored(index) for index in range(12)])


def take(source, count: int, augment: dict, modalities=MODALITIES, **settings) -> list[dict]:
    with train_batches(source, modalities, SIZE, **dict(dict(seed=3, global_batch=4, augment=augment), **settings)) as batches:
        return [next(batches) for _ in range(count)]


def same(ours, theirs) -> bool:
    return all(np.array_equal(one[n], other[n], equal_nan=n == "depth") for one, other in zip(ours, theirs, strict=True) for n in one)


LARGE = dict(crop="large_scale_jitter", color_jitter=dict(probability=0.5))
ONLY_RGB = {"rgb": MODALITIES["rgb"]}


@pytest.mark.parametrize(
    ("augment", "modalities"),
    [
        (LARGE, MODALITIES),
        (dict(crop="shortest", color_jitter=dict(hue=(-0.2, 0.2)), gray=0.3), MODALITIES),
        (dict(crop="ratio_range", base_size=(128, 32), photometric_distortion={}), MODALITIES),
        (dict(randaugment="rand-m9-mstd0.5-inc1", scale=(0.08, 1.0)), ONLY_RGB),
        (dict(three_augment=True), MODALITIES),
        (dict(crop="random_resized_once", scale=(0.08, 1.0)), MODALITIES),
    ],
)
def test_a_resumed_run_draws_what_an_uninterrupted_one_does(source, augment, modalities):
    whole = take(source, 5, augment, modalities)
    assert same(take(source, 2, augment, modalities, start_step=3), whole[3:])
    parts = [take(source, 2, augment, modalities, process_index=index, process_count=2) for index in range(2)]
    assert same([{n: np.concatenate([part[step][n] for part in parts]) for n in whole[0]} for step in range(2)], whole[:2])
    assert not same(take(source, 2, augment, modalities, seed=4), whole[:2])


def test_workers_draw_the_same(source):
    augment = dict(crop="large_scale_jitter", color_jitter={})
    assert same(take(source, 2, augment, workers=2, extras=("size",)), take(source, 2, augment, extras=("size",)))


def test_colors_are_drawn_after_the_crop(source):
    """The crop, the flip, and with them depth and classes, are those of a run without colors."""
    plain = take(source, 3, {})
    for colors in (dict(color_jitter=dict(probability=1.0)), dict(three_augment=True), dict(gray=1.0)):
        for one, other in zip(plain, take(source, 3, colors), strict=True):
            np.testing.assert_array_equal(one["depth"], other["depth"])
            np.testing.assert_array_equal(one["semseg"], other["semseg"])
            assert (one["rgb"] != other["rgb"]).any(axis=(1, 2, 3)).all()


def test_one_draw_clamped():
    rng = np.random.default_rng(0)
    boxes = np.array([random_resized_once_box(rng, 100, 400, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert (top + height <= 100).all() and (left + width <= 400).all() and top.min() == 0 == left.min()
    # An area of a quarter and more is higher than the picture: the rows are all of it then, though never all of the width.
    assert 0.68 < (height == 100).mean() < 0.86 and width.max() < 235
    boxes = np.array([random_resized_once_box(rng, 100, 400, (0.05, 0.15), (3 / 4, 4 / 3)) for _ in range(4000)])
    shares, logs = boxes[:, 2] * boxes[:, 3] / 40000, np.log(boxes[:, 3] / boxes[:, 2])  # small enough to fit
    assert abs(shares.mean() - 0.1) < 0.002 and abs(shares.std() - 0.1 / np.sqrt(12)) < 0.002
    assert abs(logs.mean()) < 0.01 and abs(logs.std() - 2 * np.log(4 / 3) / np.sqrt(12)) < 0.01
    assert random_resized_once_box(rng, 8, 8, (1.0, 1.0), (1.0, 1.0)) == (0, 0, 8, 8)


@pytest.mark.parametrize(
    ("augment", "changes", "settings", "message"),
    [
        (LARGE, {}, dict(extras=("box",)), "the batch key 'box' goes with one crop of a record, but .*'large_scale_jitter' is resized"),
        (LARGE, {}, dict(whole_every=2), "the whole picture goes with one crop"),
        (LARGE, {"depth": {**DEPTH, "patch": 8}}, {}, "'large_scale_jitter' pads pictures, but modality 'depth' has nothing that"),
        (dict(crop="ratio_range"), {"semseg": None}, {}, "cat_max_ratio is 0.75, which one modality with class ids decides, .* have none"),
        (dict(randaugment="rand-m9-inc1"), {}, {}, "moves the pixels of 8-bit RGB pictures alone, but the data have 'depth' too"),
        (dict(color_jitter={}), {"rgb": None}, {}, "color_jitter changes 8-bit RGB pictures, but depth, semseg are none"),
        (dict(gray=0.1), {"rgb": {**RGB, "patch": 8, "missing": 0}}, {}, "gray changes 8-bit RGB pictures, but depth, rgb, semseg are"),
    ],
)
def test_what_the_data_do_not_allow(source, augment, changes, settings, message):
    modalities = {name: spec for name, spec in MODALITIES.items() if changes.get(name, spec) is not None}
    modalities |= parse_modalities({name: fields for name, fields in changes.items() if fields is not None})
    with pytest.raises(ValueError, match=message):
        take(source, 1, augment, dict(sorted(modalities.items())), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(crop="large"), "crop is 'large'; known: random_resized, center, none, random_resized_once, large_scale_jitter, shortest"),
        (dict(factor=(0.5, 2.0)), "factor is .0.5, 2.0., but the crop 'random_resized' has no such option: .*'large_scale_jitter', "),
        (dict(crop="shortest", base_size=(512, 512)), "base_size is .512, 512., but the crop 'shortest' has no such option"),
        (dict(crop="large_scale_jitter", scale=(0.2, 1.0)), "scale is .0.2, 1.0., but the crop 'large_scale_jitter' has no such option"),
        (dict(crop="large_scale_jitter", factor=(0.0, 2.0)), "factor is .0.0, 2.0.; it must be"),
        (dict(crop="ratio_range", base_size=(512, 2048)), "base_size is .512, 2048.; it must be .long, short."),
        (dict(crop="ratio_range", cat_max_ratio=75), "cat_max_ratio is 75; it must be above 0 and at most 1"),
        (dict(crop="shortest", views=dict(local_crops=2)), "crop is 'shortest', but views are random crops"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        parse_augment(settings)


# --- evaluation -----------------------------------------------------------------------------------------------------------


def evaluation(source, **settings) -> list[dict]:
    with eval_batches(source, MODALITIES, SIZE, **dict(dict(batch_size=8), **settings)) as batches:
        return list(batches)


def test_evaluation_pads(source):
    first = evaluation(source, crop="pad")[0]
    found = arrays(43, 60, 3)  # the fourth record
    expected = {n: opencv.resize_bilinear(a, (23, 32)) if n == "rgb" else nearest(a, (23, 32)) for n, a in found.items()}
    expected = {n: padded(a, {"rgb": 128, "depth": np.nan, "semseg": -1}[n]) for n, a in marked(expected).items()}
    assert_same({name: first[name][3] for name in expected}, expected)


def test_evaluation_covers_and_cuts_the_middle(source):
    first = evaluation(source, crop="shortest")[0]
    found, size = arrays(43, 60, 3), (32, 45)
    expected = {n: opencv.resize_bilinear(a, size) if n == "rgb" else nearest(a, size) for n, a in found.items()}
    assert_same({name: first[name][3] for name in expected}, marked({name: array[:, 6:38] for name, array in expected.items()}))


@pytest.mark.parametrize("workers", [0, 2])
def test_targets_at_their_stored_size(source, workers):
    batches = evaluation(source, crop="pad", extras=("size",), originals=("semseg", "depth"), workers=workers)
    assert [len(batch["original/semseg"]) for batch in batches] == [8, 8]
    sizes = np.concatenate([batch["size"] for batch in batches])
    assert sizes.dtype == np.int32 and sizes.tolist() == [[40 + index, 60] for index in range(12)] + [[0, 0]] * 4
    for index in range(12):
        batch, row, expected = batches[index // 8], index % 8, marked(arrays(40 + index, 60, index))
        for name in ("semseg", "depth"):
            array = batch[f"original/{name}"][row]
            np.testing.assert_array_equal(array, expected[name])
            assert array.dtype == expected[name].dtype
    assert batches[1]["original/semseg"][7].shape == (0, 0) and batches[1]["original/depth"][7].shape == (0, 0, 1)
    placed = place_batch(batches[0], make_mesh())  # what is of no one size stays on the host
    assert sorted(placed.values) == ["depth", "rgb", "semseg"]


def test_a_record_that_cannot_be_used_has_no_original():
    broken = [stored(0), {**stored(1), "rgb": b"no picture"}, {**stored(2), "semseg": b""}]
    source = ListSource(broken, may_lack=("semseg",))
    (batch,) = evaluation(source, batch_size=3, crop="shortest", originals=("semseg",), extras=("size",))
    assert batch["valid"].tolist() == [True, False, True] and batch["present"][:, 2].tolist() == [True, True, False]
    assert [array.shape for array in batch["original/semseg"]] == [(40, 60), (0, 0), (0, 0)]
    assert batch["size"].tolist() == [[40, 60], [0, 0], [42, 60]] and (batch["semseg"][2] == -1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(crop="squash"), "crop is 'squash'; it must be above 0 and at most 1, or one of 'pad', 'shortest', or None"),
        (dict(crop="pad", extras=("box",)), "the batch key 'box' goes with one crop of a record, but the crop 'pad' is resized"),
        (dict(originals=("normals",)), "originals names 'normals', which is not declared"),
    ],
)
def test_evaluation_that_makes_no_sense(source, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluation(source, **settings)


def test_padding_needs_a_value_that_means_missing(source):
    plain = parse_modalities({"rgb": {**RGB, "patch": 8}, "depth": {**DEPTH, "patch": 8}})
    with pytest.raises(ValueError, match="the crop 'pad' pads pictures, but modality 'depth' has nothing that means missing"):
        eval_batches(source, plain, SIZE, batch_size=4, crop="pad")
    with eval_batches(source, plain, SIZE, batch_size=4, crop="shortest") as batches:  # nothing is padded
        assert np.isfinite(next(batches)["depth"]).all()
