"""Stored maps: cropped and mirrored pixel for pixel with the picture, and refused where they are of other data."""

from __future__ import annotations

import io
import json
import pathlib
import pickle
import shutil
import types

import numpy as np
import pytest
from PIL import Image

from maskvit.core.modalities import RGB, SEMSEG, parse_modalities
from maskvit.data import identity
from maskvit.data import maps as stored_maps
from maskvit.data.augment import geometry
from maskvit.data.batches import eval_batches, train_batches
from maskvit.data.builders import prepare
from maskvit.data.builders.maps import Maps
from maskvit.data.maps import MapError, MapSet, crop_map, data_identity, to_bytes
from maskvit.data.sources import ListSource

MODALITIES = parse_modalities({"rgb": {**RGB, "patch": 8}, "semseg": {**SEMSEG, "patch": 8, "stride": 4}})
PICTURE, CELL = 64, 8  # side of the pictures and of a map's cell in pixels
SIZE = (32, 32)


def encoded(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "png")
    return out.getvalue()


def picture(index: int) -> np.ndarray:
    """Red and green say which cell of the picture a pixel is in, blue which picture."""
    rows, columns = np.mgrid[:PICTURE, :PICTURE] // CELL
    return np.stack([rows * 30, columns * 30, np.full_like(rows, index)], axis=-1).astype(np.uint8)


def picture_maps(index: int) -> np.ndarray:
    """uint8 "2 8 8": the mean red and the mean green of every cell."""
    cells = picture(index).reshape(PICTURE // CELL, CELL, PICTURE // CELL, CELL, 3).mean(axis=(1, 3))
    return cells[..., :2].transpose(2, 0, 1).astype(np.uint8)


def source_of(count: int = 12, first: int = 0) -> ListSource:
    ids = np.zeros((PICTURE, PICTURE), np.uint8)
    return ListSource([{"id": f"p{first + i}", "rgb": encoded(picture(i)), "semseg": encoded(ids)} for i in range(count)])


def write(directory, source, make=picture_maps, lacking=(), name="places", **changes) -> str:
    manifest = dict(data=data_identity(source), modalities=["rgb", "semseg"], maps=2, grid=[8, 8], without_map=len(lacking)) | changes
    records = ((source[i]["id"], None if i in lacking else make(i)) for i in range(len(source)))
    Maps(data_dir=str(directory), name=name, records=records, manifest=manifest).prepare()
    return str(directory / name)


@pytest.fixture(scope="module")
def map_set(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("maps"), source_of())


# --- the crop of a map ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("top", "left", "rows", "columns", "grid"), [(0, 0, 8, 8, (8, 8)), (2, 3, 4, 4, (4, 4)), (1, 0, 6, 8, (3, 4)), (5, 7, 3, 1, (3, 1))]
)
def test_aligned_crops_are_the_cells_themselves_or_their_means(top, left, rows, columns, grid, flip):
    maps = np.random.default_rng(0).random((2, 8, 8))
    expected = maps[:, top : top + rows, left : left + columns]
    expected = expected.reshape(2, grid[0], rows // grid[0], grid[1], columns // grid[1]).mean(axis=(2, 4))
    cropped = crop_map(maps, (top / 8, left / 8, rows / 8, columns / 8), flip, grid)
    np.testing.assert_allclose(cropped, expected[..., ::-1] if flip else expected, rtol=1e-6)


def test_any_crop_of_a_ramp_is_the_ramp():
    middles = (np.arange(28) + 0.5) / 28
    maps = np.stack([np.tile(middles[:, None], (1, 28)), np.tile(middles, (28, 1))])
    rng = np.random.default_rng(1)
    for _ in range(50):
        extent = rng.uniform(0.2, 0.8, 2)
        start = rng.uniform(0.06, 0.94 - extent).clip(0.06)
        for grid in ((14, 14), (5, 9), (40, 3)):
            cropped = crop_map(maps, (*start, *extent), False, grid)
            for axis in range(2):
                wanted = start[axis] + extent[axis] * (np.arange(grid[axis]) + 0.5) / grid[axis]
                inside = (wanted > 0.1) & (wanted < 0.9)
                np.testing.assert_allclose(cropped[axis].mean(axis=1 - axis)[inside], wanted[inside], atol=1e-2)
            assert cropped.min() >= 0 and cropped.max() <= 1 and cropped.dtype == np.float32


def test_enlarging_is_bilinear_and_constant_maps_stay_constant():
    maps = np.random.default_rng(2).random((1, 6, 6))
    cropped = crop_map(maps, (1 / 6, 1 / 6, 4 / 6, 4 / 6), False, (8, 8))
    ours = np.asarray(Image.fromarray(maps[0].astype(np.float32)).resize((8, 8), Image.Resampling.BILINEAR, box=(1, 1, 5, 5)))
    np.testing.assert_allclose(cropped[0], ours, atol=1e-5)
    np.testing.assert_allclose(crop_map(np.full((1, 3, 5), 0.25), (0.03, 0.41, 0.9, 0.59), True, (14, 7)), 0.25, rtol=1e-6)


def test_eight_bits():
    assert to_bytes(np.array([0, 0.5 / 255, 1 / 255, 0.5, 1])).tolist() == [0, 0, 1, 128, 255]
    for value in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="must lie in 0 ... 1"):
            to_bytes(np.array([value, 0.5]))


# --- in batches -------------------------------------------------------------------------------------------------------


def aligned_boxes(monkeypatch):
    """Training crops that begin and end with cells of the map."""

    def draw(rng, height, width, scale, ratio):
        side = CELL * int(rng.choice([4, 8]))
        top, left = rng.integers(0, (PICTURE - side) // CELL + 1, 2) * CELL
        return int(top), int(left), side, side

    monkeypatch.setattr(geometry, "random_resized_box", draw)


def test_maps_follow_crop_and_flip_pixel_for_pixel(map_set, monkeypatch):
    aligned_boxes(monkeypatch)
    flips = 0
    with train_batches(source_of(), MODALITIES, SIZE, seed=0, global_batch=12, maps=map_set, extras=("flip", "box")) as batches:
        for batch in (next(batches) for _ in range(6)):
            assert batch["guidance"].shape == (12, 2, 4, 4) and batch["guidance"].dtype == np.float32
            for rgb, maps, box in zip(batch["rgb"], batch["guidance"], batch["box"], strict=True):
                if box[2] == 0.5:  # not resized: exactly the picture's own pooled values
                    pooled = rgb.reshape(4, 8, 4, 8, 3).mean(axis=(1, 3))[..., :2].transpose(2, 0, 1)
                    np.testing.assert_allclose(maps * 255, pooled, atol=1e-4)
                else:
                    cells = picture_maps(0).reshape(2, 4, 2, 4, 2).mean(axis=(2, 4))
                    mirrored = rgb[0, 0, 1] > rgb[0, -1, 1]
                    np.testing.assert_allclose(maps * 255, cells[..., ::-1] if mirrored else cells, atol=1e-4)
            flips += int(batch["flip"].sum())
    assert 20 < flips < 52


def test_any_training_crop_agrees_with_the_picture(map_set):
    with train_batches(source_of(), MODALITIES, SIZE, seed=0, global_batch=12, maps=map_set) as batches:
        for batch in (next(batches) for _ in range(4)):
            pooled = batch["rgb"].reshape(12, 4, 8, 4, 8, 3).mean(axis=(2, 4))[..., :2].transpose(0, 3, 1, 2)
            error = np.abs(batch["guidance"] * 255 - pooled)  # the map is flat inside its cells, 30 levels apart
            assert error.max() < 16 and error.mean() < 4


def test_maps_whatever_the_workers_and_in_the_order_of_the_inputs(map_set):
    def take(**settings):
        with train_batches(source_of(), MODALITIES, SIZE, seed=0, global_batch=12, maps=map_set, **settings) as batches:
            return [next(batches)["guidance"] for _ in range(3)]

    both = take()
    np.testing.assert_array_equal(take(workers=2), both)
    parts = [take(process_index=index, process_count=2) for index in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), both)
    swapped = take(inputs=("semseg", "rgb"))
    np.testing.assert_array_equal([maps[:, ::-1] for maps in swapped], both)
    np.testing.assert_array_equal(take(inputs=("semseg",)), [maps[:, 1:] for maps in both])


def test_one_map_serves_all_inputs_and_evaluation_crops_it_too(tmp_path):
    source = source_of()
    path = write(tmp_path, source, lambda index: picture_maps(index)[:1], modalities=["rgb"], maps=1)
    with eval_batches(source, MODALITIES, SIZE, batch_size=16, crop=None, maps=path) as batches:
        (batch,) = list(batches)
    assert batch["guidance"].shape == (16, 1, 4, 4) and (batch["guidance"][12:] == 0).all()
    np.testing.assert_allclose(batch["guidance"][3, 0] * 255, picture_maps(3)[0].reshape(4, 2, 4, 2).mean(axis=(1, 3)), atol=1e-4)


def test_a_map_set_travels_to_workers(map_set):
    opened = MapSet(map_set, source_of(), ("rgb",), (4, 4))
    again = pickle.loads(pickle.dumps(opened))
    np.testing.assert_array_equal(again.cropped(3, "p3", (0, 0, 1, 1), False), opened.cropped(3, "p3", (0, 0, 1, 1), False))
    version = stored_maps.open_maps(map_set).directory
    assert MapSet(version, source_of(), ("rgb",), (4, 4)).manifest == opened.manifest  # the version's folder does as well
    with open(f"{version}/metadata.json") as file:
        assert json.load(file)["recipe"] == opened.manifest


# --- refused ----------------------------------------------------------------------------------------------------------


def start(maps: str, source=None, inputs=None, size=SIZE, **settings):
    source = source or source_of()
    settings = dict(seed=0, global_batch=len(source), inputs=inputs, maps=maps) | settings
    with train_batches(source, MODALITIES, size, **settings) as batches:
        next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_record_without_a_map_ends_the_run(tmp_path, workers):
    path = write(tmp_path, source_of(), lacking=(5,))
    with pytest.raises(Exception, match="no map is stored for record 'p5' in .*places .1 records have none.*make the maps with") as caught:
        start(path, workers=workers)
    assert workers or caught.type is MapError


def test_maps_of_other_data(map_set, tmp_path):
    with pytest.raises(ValueError, match="made from another number of records: 12, config.data.train is 10"):
        start(map_set, source_of(10))
    with pytest.raises(
        MapError, match="no map for record 'p1': number 0 in .* is of 'p0', so it was made from another version of the data"
    ):
        start(map_set, source_of(12, first=1))
    named = source_of()
    named.name, named.split = "pictures/1.0.0", "train"
    path = write(tmp_path, named)
    start(path, named)
    newer = source_of()
    newer.name, newer.split = "pictures/2.0.0", "train"
    with pytest.raises(ValueError, match="made from another data set: 'pictures/1.0.0', config.data.train is 'pictures/2.0.0'"):
        start(path, newer)
    newer.name, newer.split = "pictures/1.0.0", "val"
    with pytest.raises(ValueError, match="made from another split: 'train', config.data.train is 'val'"):
        start(path, newer)


def test_one_exchanged_record_is_found_when_it_is_read(map_set):
    source = source_of()
    source.records[7]["id"] = "new"
    opened = MapSet(map_set, source_of(), ("rgb",), (4, 4))
    with pytest.raises(MapError, match="no map for record 'new': number 7"):
        opened.cropped(7, "new", (0, 0, 1, 1), False)


def test_maps_of_another_grid_or_other_modalities(map_set, tmp_path):
    with pytest.raises(
        ValueError, match="grid of 8 x 8, coarser than the 12 x 8 tokens of the first input modality: make them with a larger"
    ):
        start(map_set, size=(96, 64))
    three = parse_modalities({"rgb": {**RGB, "patch": 8}, "other": {**RGB, "patch": 8}})
    source = source_of()
    for record in source.records:
        record["other"] = record["rgb"]
    with pytest.raises(ValueError, match="has maps of rgb, semseg, none of the input modality 'other'"):
        train_batches(source, three, SIZE, seed=0, global_batch=4, maps=map_set)
    path = write(tmp_path, source_of(), grid=[9, 8])
    with pytest.raises(MapError, match=r"the map of record 'p\d+' in .* is uint8 \(2, 8, 8\), its manifest says \(2, 9, 8\)"):
        start(path)


def test_no_map_set(map_set, tmp_path):
    with pytest.raises(FileNotFoundError, match="no map set in .*nowhere: make the maps with python -m maskvit maps"):
        start(str(tmp_path / "nowhere"))
    prepare("scenes", str(tmp_path), num_train=1, num_val=1, size=16)
    with pytest.raises(ValueError, match="scenes is a data set, but no map set"):
        start(str(tmp_path / "scenes"))
    path = write(tmp_path, source_of())
    metadata = pathlib.Path(path) / "1.0.0" / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"recipe": {}}))
    with pytest.raises(ValueError, match="is no map set: its metadata lack 'data'"):
        start(path)


GOOD = dict(data=dict(name="x", split="train", records=3), modalities=["rgb"], maps=1, grid=[4, 4], without_map=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grid": 5}, "'grid' is 5"),
        ({"grid": [4, -4]}, "no whole sizes"),
        ({"grid": [4, "x"]}, "no whole sizes"),
        ({"grid": [4]}, "no whole sizes"),
        ({"maps": True}, "'maps' is True"),
        ({"maps": 0}, "no whole sizes"),
        ({"data": {"name": "x"}}, "its data lack 'split'"),
        ({"data": [1]}, "'data' is"),
        ({"modalities": None}, "'modalities' is None"),
    ],
)
def test_manifests_of_another_form_are_named(monkeypatch, changed, message):
    info = types.SimpleNamespace(metadata={"recipe": {**GOOD, **changed}})
    monkeypatch.setattr(stored_maps, "open_directory", lambda directory: types.SimpleNamespace(info=info))
    with pytest.raises(ValueError, match=message):
        stored_maps.read_manifest("somewhere")
    info.metadata["recipe"] = GOOD
    assert stored_maps.read_manifest("somewhere") == GOOD


def test_maps_that_were_moved_are_the_same_maps(map_set, tmp_path):
    moved = shutil.copytree(map_set, tmp_path / pathlib.Path(map_set).name)
    first, second = (identity.data_identity(stored_maps.open_maps(str(path))) for path in (map_set, moved))
    assert first["contents"] and first == second
