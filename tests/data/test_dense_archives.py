"""ADE20K, COCO, NYUv2, Hypersim and Taskonomy from tiny archives in the layout of the official ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from maskvit.core.config_files import load_config
from maskvit.core.modalities import DEPTH, RGB, SEMSEG, parse_modalities
from maskvit.data import codec
from maskvit.data.builders import ARCHIVES
from maskvit.data.builders.packing import stated_fields
from tests.data.archives import array, packed, picture, told
from tests.runs import ROOT

RNG = np.random.default_rng(0)


def maps(num_classes, **depth):
    declared = dict(rgb=RGB, semseg={**SEMSEG, "num_classes": num_classes, "missing": 255})
    return parse_modalities(declared | ({"depth": {**DEPTH, "missing": 0, **depth}} if depth else {}))


# ADE20K


def ade_archive(root):
    ids = {}
    for split, count in (("training", 2), ("validation", 1)):
        for number in range(count):
            name, size = f"ADE_{split[:3]}_{number:08d}", (10 + number, 12)
            picture(root / "images" / split / f"{name}.jpg", number, size)
            ids[name] = RNG.integers(0, 151, size).astype(np.uint8)
            ids[name][0, :3] = 0, 1, 150
            array(root / "annotations" / split / f"{name}.png", ids[name])
    return ids


def test_ade20k(tmp_path, capsys):
    root = tmp_path / "in"
    command = ["ade20k", "--root", str(root), "--data_dir", str(tmp_path / "tfds")]
    root.mkdir()
    assert "lacks 4" in (said := told(capsys, *command)) and "annotations/validation/" in said
    stored = ade_archive(root)
    source = packed("ade20k", root, maps(150))
    assert len(source) == 2 and "label" not in source[0]
    for index in range(2):
        ids, expected = codec.decode(source[index]["semseg"]), stored[f"ADE_tra_{index:08d}"].astype(int)
        assert ids.shape == (10 + index, 12)  # at its own size
        np.testing.assert_array_equal(ids == 255, expected == 0)
        np.testing.assert_array_equal(ids[ids != 255] + 1, expected[expected > 0])
        assert source[index]["rgb"] == (root / "images" / "training" / f"ADE_tra_{index:08d}.jpg").read_bytes()
    assert len(packed("ade20k", root, maps(150), split="val")) == 1
    said = capsys.readouterr().out
    assert "config.modalities.semseg must have kind='categorical', num_classes=150, missing=255" in said
    assert source.pixel_classes == {} and "no objectInfo150.txt, which names the classes" in said
    names = [f"thing {number}, other name" for number in range(1, 149)] + ["screen, silver screen", "screen, CRT screen"]
    rows = [f"{number}\t0.01\t12\t3\t{name}" for number, name in enumerate(names, 1)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
    named = packed("ade20k", root, maps(150), name="named").pixel_classes["semseg"]
    assert named[0] == "thing 1" and named[-2:] == ("screen, silver screen", "screen, CRT screen") and len(named) == 150
    (root / "objectInfo150.txt").write_text("\n".join(rows[:-1]) + "\n")
    assert "does not list the classes 1 ... 150" in told(capsys, *command[:-1], str(tmp_path / "short"))
    (root / "objectInfo150.txt").unlink()
    array(root / "annotations" / "training" / "ADE_tra_00000000.png", np.full((10, 12), 151, np.uint8))
    other = [*command[:-1], str(tmp_path / "other")]
    assert "has 150 on 120 pixels; allowed: 0 ... 149 and 255" in told(capsys, *other)
    (root / "annotations" / "validation" / "ADE_val_00000000.png").unlink()
    assert "lacks 1" in (said := told(capsys, *other)) and "annotations/validation/ADE_val_00000000.png" in said


# COCO

CATEGORIES = [{"id": 200, "name": "rug"}, {"id": 1, "name": "person"}, {"id": 92, "name": "banner"}]  # classes by id: 1, 92, 200


def coco_archive(root):
    """Two pictures with segments; the ids of segments need all three bytes of a color."""
    segments = {"000000000139": {3226956: 200, 70000: 1}, "000000000285": {5: 92}}
    expected = {}
    for split, names in (("train", tuple(segments)), ("val", ("000000000285",))):
        entries = []
        for name in names:
            picture(root / f"{split}2017" / f"{name}.jpg", 7, (8, 9))
            chosen = RNG.choice([0, *segments[name]], (8, 9))
            colors = np.stack([chosen % 256, chosen // 256 % 256, chosen // 65536], axis=-1).astype(np.uint8)
            array(root / "annotations" / f"panoptic_{split}2017" / f"{name}.png", colors)
            classes = {0: 255} | {segment: (1, 92, 200).index(category) for segment, category in segments[name].items()}
            expected[split, name] = np.vectorize(classes.get)(chosen)
            info = [{"id": segment, "category_id": category, "iscrowd": 0} for segment, category in segments[name].items()]
            entries.append({"image_id": int(name), "file_name": f"{name}.png", "segments_info": info})
        (root / "annotations" / f"panoptic_{split}2017.json").write_text(json.dumps({"annotations": entries, "categories": CATEGORIES}))
    return expected


def test_coco_segments_and_ready_maps(tmp_path, capsys):
    root = tmp_path / "in"
    expected = coco_archive(root)
    source = packed("coco", root, maps(3))
    assert len(source) == 2
    for record in (source[0], source[1]):
        name = record["id"].removeprefix("train/")
        np.testing.assert_array_equal(codec.decode(record["semseg"]), expected["train", name])
    command = ["coco", "--root", str(root), "--data_dir", str(tmp_path / "tfds")]
    assert "neither annotations/panoptic_semseg_train2017/ nor panoptic_semseg_train2017/" in told(capsys, *command, "--maps", "semantic")
    for (split, name), ids in expected.items():
        array(root / f"panoptic_semseg_{split}2017" / f"{name}.png", ids.astype(np.uint8))
    assert source.pixel_classes == {"semseg": ("person", "banner", "rug")}
    ready = packed("coco", root, maps(3), maps="semantic", name="ready")
    np.testing.assert_array_equal(codec.decode(ready[1]["semseg"]), codec.decode(source[1]["semseg"]))
    array(root / "annotations" / "panoptic_val2017" / "000000000285.png", np.full((8, 9, 3), 1, np.uint8))
    assert "has the segment 65793, which the annotations do not name" in told(capsys, *command)
    (root / "annotations" / "panoptic_val2017.json").write_text('{"annotations": [{}]}')
    assert "panoptic_val2017.json is no file of panoptic annotations" in told(capsys, *command)


# NYUv2


def nyu_archive(root, frames=5, size=(12, 16)):
    """MATLAB's files: HDF5 with the axes reversed, and two older ones. Returns the frames as pictures."""
    h5py = pytest.importorskip("h5py")
    from scipy.io import savemat

    root.mkdir()
    rgb = RNG.integers(0, 256, (frames, *size, 3), np.uint8)
    depth = RNG.uniform(0.7, 9.9, (frames, *size)).astype(np.float32)
    raw = np.where(RNG.uniform(size=depth.shape) < 0.3, 0, depth).astype(np.float32)
    labels = RNG.integers(0, 895, (frames, *size)).astype(np.uint16)
    labels[:, 0, :3] = 0, 1, 894
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        for name, values in (("images", rgb), ("depths", depth), ("rawDepths", raw), ("labels", labels)):
            file[name] = values.transpose(0, *range(values.ndim - 1, 0, -1))
    classes = RNG.integers(1, 41, 894)
    savemat(root / "splits.mat", {"trainNdxs": np.array([[2], [5], [3]]), "testNdxs": np.array([[1], [4]])})
    names = np.array([f"thing {number}" for number in range(40)], object)[None]
    savemat(root / "classMapping40.mat", {"mapClass": classes[None].astype(float), "className": names})
    return rgb, depth, raw, labels, classes


def test_nyuv2(tmp_path, capsys):
    root = tmp_path / "in"
    rgb, depth, raw, labels, classes = nyu_archive(root)
    specs = maps(40, metres_per_count=10 / 65536)
    source = packed("nyuv2", root, specs)
    assert [source[i]["id"] for i in range(len(source))] == ["train/0001", "train/0002", "train/0004"]
    assert source.pixel_classes == {"semseg": tuple(f"thing {number}" for number in range(40))}
    for index, frame in enumerate((1, 2, 4)):
        record = source[index]
        np.testing.assert_array_equal(codec.decode(record["rgb"]), rgb[frame])
        np.testing.assert_array_equal(codec.decode(record["depth"]), np.floor(depth[frame].astype(np.float64) * 65536 / 10))
        ids = codec.decode(record["semseg"])
        np.testing.assert_array_equal(ids == 255, labels[frame] == 0)
        assert ids[0, 1] == classes[0] - 1 and ids[0, 2] == classes[893] - 1
        np.testing.assert_array_equal(ids[ids != 255], classes[labels[frame][labels[frame] > 0] - 1] - 1)
    assert [packed("nyuv2", root, specs, split="test")[i]["id"] for i in range(2)] == ["test/0000", "test/0003"]
    counts = codec.decode(packed("nyuv2", root, specs, depth="raw", name="nyuv2_raw")[0]["depth"])
    np.testing.assert_array_equal(counts == 0, raw[1] == 0)


def test_what_is_wrong_with_nyuv2_is_named(tmp_path, capsys):
    from scipy.io import savemat

    root = tmp_path / "in"
    nyu_archive(root)
    command = ["nyuv2", "--root", str(root), "--data_dir", str(tmp_path / "tfds")]
    savemat(root / "splits.mat", {"trainNdxs": np.array([[1], [6]]), "testNdxs": np.array([[2]])})
    assert "trainNdxs holds 2 numbers; different ones of 1 ... 5 are expected" in told(capsys, *command)
    savemat(root / "splits.mat", {"trainNdxs": np.array([[1], [2]]), "testNdxs": np.array([[2]])})
    assert "has the frame 2 in both splits" in told(capsys, *command)
    (root / "nyu_depth_v2_labeled.mat").rename(root / "other.mat")
    assert "lacks 1" in (said := told(capsys, *command)) and "nyu_depth_v2_labeled.mat" in said
    (root / "nyu_depth_v2_labeled.mat").write_bytes(b"MATLAB 5.0")
    assert "nyu_depth_v2_labeled.mat is no HDF5 file" in told(capsys, *command)


# Hypersim


def test_hypersim(tmp_path, capsys):
    h5py = pytest.importorskip("h5py")
    root, size = tmp_path / "in", (12, 16)
    rows = ["scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name"]
    distances, ids = {}, {}
    for scene, split in (("ai_001_001", "train"), ("ai_002_001", "val")):
        images = root / scene / "images"
        picture(images / "scene_cam_00_final_preview" / "frame.0003.tonemap.jpg", 3, size)
        (images / "scene_cam_00_geometry_hdf5").mkdir()
        distances[scene] = RNG.uniform(1, 20, size).astype(np.float16)
        distances[scene][2, 2] = np.nan
        ids[scene] = RNG.choice([-1, *range(1, 41)], size).astype(np.int16)
        for name, values in (("depth_meters", distances[scene]), ("semantic", ids[scene])):
            with h5py.File(images / "scene_cam_00_geometry_hdf5" / f"frame.0003.{name}.hdf5", "w") as file:
                file["dataset"] = values
        rows += [f"{scene},cam_00,3,True,,{split}", f"{scene},cam_00,4,False,bad,"]
    command = ["hypersim", "--root", str(root), "--data_dir", str(tmp_path / "tfds")]
    assert "give --split_file metadata_images_split_scene_v1.csv" in told(capsys, *command)
    (root / "metadata_images_split_scene_v1.csv").write_text("\n".join(rows) + "\n")
    source = packed("hypersim", root, maps(40, metres_per_count=1 / 512))
    assert len(source) == 1 and source[0]["id"] == "train/ai_001_001/cam_00_0003"
    stored = codec.decode(source[0]["semseg"]).astype(int)
    np.testing.assert_array_equal(np.where(stored == 255, -1, stored + 1), ids["ai_001_001"])
    focal = 886.81 * size[1] / 1024
    for row, column in ((0, 0), (5, 7), (11, 3)):  # the cosine of the ray's angle to the axis, pixel by pixel
        ray = np.array([column - 7.5, row - 5.5, focal])
        meters = float(distances["ai_001_001"][row, column]) * focal / np.linalg.norm(ray)
        assert abs(codec.decode(source[0]["depth"])[row, column] / 512 - meters) <= 0.51 / 512
    assert codec.decode(source[0]["depth"])[2, 2] == 0
    (root / "ai_002_001" / "images" / "scene_cam_00_geometry_hdf5" / "frame.0003.semantic.hdf5").unlink()
    assert "ai_002_001/images/scene_cam_00_geometry_hdf5/frame.0003.semantic.hdf5" in told(capsys, *command)


# Taskonomy

SIXTEEN = ("depth_zbuffer", "edge_texture", "edge_occlusion", "keypoints2d", "keypoints3d")


def taskonomy_archive(root, size=32):
    views = [("allensville", 0, 1), ("allensville", 3, 0), ("beechwood", 12, 4)]
    targets = {}
    for building, point, view in views:
        place = lambda folder, domain, b=building, p=point, v=view: root / folder / b / f"point_{p}_view_{v}_domain_{domain}.png"  # noqa: E731
        array(place("rgb", "rgb"), RNG.integers(0, 256, (size, size, 3), np.uint8))
        for task in SIXTEEN:
            targets[building, point, task] = RNG.integers(0, 65536, (size, size)).astype(np.uint16)
            array(place(task, task), targets[building, point, task])
        for task in ("normal", "principal_curvature", "reshading"):
            targets[building, point, task] = RNG.integers(0, 256, (size, size, 3), np.uint8)
            array(place(task, task), targets[building, point, task])
        valid = np.full((size, size), 255, np.uint8)
        valid[9, 14] = 0
        array(place("mask_valid", "depth_zbuffer"), valid)
    (root / "splits").mkdir()
    for split, rows in (("train", views[:2]), ("val", views[2:]), ("test", views)):
        lines = ["building,point,view", *(",".join(map(str, row)) for row in rows)]
        (root / "splits" / f"tiny_{split}.csv").write_text("\n".join(lines) + "\n")
    return targets


@pytest.mark.parametrize("name", ["ade20k", "hypersim", "nyuv2", "taskonomy"])
def test_the_recipes_read_what_is_stored(name, tmp_path, monkeypatch):
    """Every shipped config of the data set: its modalities, what each is declared to be, and its splits."""
    root, options = tmp_path / "in", {}
    if name == "ade20k":
        ade_archive(root)
    elif name == "nyuv2":
        nyu_archive(root)
    elif name == "taskonomy":
        taskonomy_archive(root)
        options = dict(num_train=2, num_val=1)
    else:
        root.mkdir()
        rows = [f"ai_001_00{n},cam_00,0,True,,{split}" for n, split in enumerate(("train", "val", "test"))]
        header = "scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name"
        (root / "metadata_images_split_scene_v1.csv").write_text("\n".join([header, *rows]) + "\n")
        from maskvit.data.builders import hypersim

        monkeypatch.setattr(hypersim, "require", lambda *_: None)  # the frames themselves are of no interest here
        monkeypatch.setattr(hypersim, "import_h5py", lambda: None)
    contents = ARCHIVES[name].load()(str(root), **options)
    stored = stated_fields(contents.modalities)
    recipes = [str(path) for path in sorted((ROOT / "configs" / "finetune").glob("*.py")) if f"_{name}" in path.name]
    assert recipes
    for recipe in recipes:
        config = load_config(recipe).to_dict()
        assert config["data"]["train"]["name"] == name
        for modality, fields in stated_fields(parse_modalities(config["modalities"])).items():
            for field, value in stored[modality].items():
                same = pytest.approx(value) if isinstance(value, float) else value
                assert fields.get(field) == same, (recipe, field)
        splits = {config["data"]["train"]["split"], *(b["data_from"]["split"] for b in config["evaluators"].values() if b.get("data_from"))}
        assert splits <= set(contents.tasks), recipe
    if name == "taskonomy":
        declared_there = [parse_modalities(load_config(recipe).to_dict()["modalities"]) for recipe in recipes]
        scales = {modality: spec.scale for specs in declared_there for modality, spec in specs.items()}
        assert scales == {modality: spec.scale for modality, spec in contents.modalities.items()}


def declared(**fields):
    return parse_modalities({"rgb": RGB, **fields})


def test_taskonomy_targets_are_those_of_multimae(tmp_path, capsys):
    """At the stored size, so that the encodings can be followed value by value."""
    root = tmp_path / "in"
    targets = taskonomy_archive(root)
    one = dict(channels=1, loss="l1")
    specs = declared(
        depth=dict(one, scale=1 / 8000, missing=65535, metres_per_count=1 / 512),
        **{task: dict(one, missing=65535, scale=1 / 65535) for task in ("edge_occlusion", "keypoints3d")},
        edge_texture=dict(one, missing=65535, scale=4 / 65535),
        normal=dict(one, channels=3, missing=-1, scale=1 / 255),
        principal_curvature=dict(one, channels=2, missing=-1, scale=1 / 255),
        reshading=dict(one, missing=-1, scale=1 / 255),
    )
    settings = dict(num_train=2, num_val=1, side=32)
    source = packed("taskonomy", root, specs, **settings)
    assert [source[i]["id"] for i in range(2)] == ["train/allensville/point_0_view_1", "train/allensville/point_3_view_0"]
    values = {name: codec.decode(source[0][name]) for name in specs}
    absent = np.zeros((32, 32), bool)
    absent[8:12, 12:16] = True  # the cell of the one invalid pixel
    stored = {task: targets["allensville", 0, task] / (65535 if task in SIXTEEN else 255) for task in (*SIXTEEN, "normal", "reshading")}
    kernel = np.outer(*(2 * [np.exp([-0.5, 0, -0.5])]))
    around = np.pad(stored["edge_occlusion"], 1, mode="reflect")
    blurred = sum(kernel[i, j] * around[i : i + 32, j : j + 32] for i in range(3) for j in range(3)) / kernel.sum()
    expected = {
        "depth": np.clip(stored["depth_zbuffer"], 0, 8000 / 65535) * 65535 / 8000,
        "edge_texture": np.clip(stored["edge_texture"], 0, 0.25) * 4,
        "edge_occlusion": blurred,
        "keypoints3d": stored["keypoints3d"],
        "normal": stored["normal"],
        "principal_curvature": targets["allensville", 0, "principal_curvature"][..., :2] / 255,
        "reshading": stored["reshading"][..., 0],
    }
    for name, target in expected.items():
        empty = values[name] == specs[name].missing
        np.testing.assert_array_equal(empty.all(-1) if empty.ndim == 3 else empty, absent, err_msg=name)
        np.testing.assert_allclose((values[name] * specs[name].scale)[~absent], target[~absent], atol=5e-5, err_msg=name)
    assert len(packed("taskonomy", root, specs, split="test", **settings)) == 3


def test_taskonomy_is_made_smaller_and_takes_the_first_rows(tmp_path, capsys):
    root = tmp_path / "in"
    targets = taskonomy_archive(root)
    specs = declared(keypoints2d=dict(channels=1, loss="l1", missing=65535, scale=1 / 65535))
    source = packed("taskonomy", root, specs, tasks=["keypoints2d"], num_train=1, num_val=1, num_test=0, side=16)
    assert len(source) == 1
    nearest = np.array(Image.fromarray(targets["allensville", 0, "keypoints2d"]).resize((16, 16), Image.Resampling.NEAREST))
    values = codec.decode(source[0]["keypoints2d"])
    same = values != 65535
    assert same.mean() >= 1 - 16 / 256
    np.testing.assert_array_equal(values[same], np.minimum(nearest, 65534)[same])
    smaller = Image.open(root / "rgb" / "allensville" / "point_0_view_1_domain_rgb.png").resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(codec.decode(source[0]["rgb"]), np.array(smaller))
    command = ["taskonomy", "--root", str(root), "--data_dir", str(tmp_path / "tfds"), "--num_val", "1"]
    assert "tiny_train.csv has 2 rows; num_train is 800: lower it" in told(capsys, *command)
    assert "tasks names 'depth'; known: depth_zbuffer" in told(capsys, *command, "--tasks", "depth")
    (root / "normal" / "beechwood" / "point_12_view_4_domain_normal.png").unlink()
    assert "normal/beechwood/point_12_view_4_domain_normal.png" in told(capsys, *command, "--num_train", "2")
    (root / "splits" / "tiny_test.csv").unlink()
    assert "tiny_test.csv" in told(capsys, *command, "--num_train", "2")
