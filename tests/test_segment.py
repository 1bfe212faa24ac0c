"""`python -m maskvit segment`: a few labeled photos and a checkpoint in, class maps of new photos and a page out."""

from __future__ import annotations

import csv
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import maskvit
from maskvit.__main__ import main as maskvit_main
from maskvit.checkpoints import save_imported
from maskvit.commands.data import pictures
from maskvit.commands.segment.__main__ import main
from maskvit.commands.segment.photos import class_map, confusion, enlarged, label_counts, patch_labels
from maskvit.commands.segment.probe import fit_probe
from maskvit.core.modalities import RGB
from maskvit.core.types import Batch
from maskvit.heads.values import encoded_tokens
from maskvit.objectives import build_objective

NAMES = ("sky", "grass", "cow")


def photo(seed: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A picture of three noisy colors, and the class of every pixel."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(size)
    ids = (rows > rng.uniform(0.4, 0.6) * size[0]).astype(np.uint8)
    middle = rng.uniform(0.3, 0.7, 2) * size
    ids[(rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < (0.25 * min(size)) ** 2] = 2
    colors = np.array([[90, 140, 230], [70, 170, 60], [150, 80, 40]])[ids] + rng.normal(0, 12, (*size, 3))
    return np.clip(colors, 0, 255).astype(np.uint8), ids


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    block = dict(name="mae", encoder=dict(width=32, depth=1, heads=2), decoder=dict(width=16, depth=1, heads=2))
    config = dict(image_size=[32, 32], modalities=dict(rgb=dict(RGB, patch=8)), objective=block)
    directory = tmp_path_factory.mktemp("imported")
    save_imported(directory, jax.device_get(build_objective(config).init(jax.random.key(3))[0]), {"config": config})
    return str(directory)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three photos of two sizes, labeled in part, one of them in a folder of its own; two others with all labels; names of the classes."""
    root = tmp_path_factory.mktemp("photos")
    for number, (name, size) in enumerate((("all/a", (40, 64)), ("all/b", (64, 48)), ("all/c", (24, 24)))):
        rgb, ids = photo(number, size)
        ids[:, ::3] = 255
        save(root / "labeled" / "rgb" / f"{name}.png", rgb)
        save(root / "labeled" / "semseg" / f"{name}.png", ids)
    for number, size in enumerate(((48, 64), (30, 20))):
        rgb, ids = photo(10 + number, size)
        save(root / "new" / f"{number}.png", rgb)
        save(root / "truth" / f"{number}.png", ids)
    (root / "classes.txt").write_text("\n".join(NAMES))
    return root


def run(checkpoint, root, out, *more):
    return main(["--checkpoint", checkpoint, "--labeled", str(root / "labeled"), "--images", str(root / "new"), "--out", str(out), *more])


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def answered(checkpoint, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("answers") / "out"
    assert run(checkpoint, photos, out, "--classes", str(photos / "classes.txt"), "--truth", str(photos / "truth")) == 0
    return out


def mean_iou(pairs):
    """By the definition, from (class, true class) of pixels."""
    given, true = (np.concatenate(part) for part in zip(*((a.ravel(), b.ravel()) for a, b in pairs), strict=True))
    each = [(given == k) & (true == k) for k in range(3)], [(given == k) | (true == k) for k in range(3)]
    return 100 * np.mean([both.sum() / either.sum() for both, either in zip(*each, strict=True) if either.any()])


def test_the_written_maps_are_those_that_are_measured(answered, photos):
    maps = [(pixels(answered / "ids" / f"{n}.png.png"), pixels(photos / "truth" / f"{n}.png")) for n in range(2)]
    assert all(ids.dtype == np.uint8 and ids.shape == true.shape for ids, true in maps)
    about = json.loads((answered / "about.json").read_text())
    assert about["mean_iou_new"]["checkpoint"] == pytest.approx(mean_iou(maps), abs=1e-9)
    assert set(about["mean_iou_new"]) == set(about["mean_iou_left_out"]) == {"checkpoint", "randomly initialized encoder", "raw pixels"}
    assert about["mean_iou_new"]["raw pixels"] > 60  # three colors: anything that works tells them apart
    with open(answered / "classes.csv", newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == list(NAMES)
    text = (answered / "index.html").read_text()
    assert f"its mean IoU is {about['mean_iou_new']['checkpoint']:.1f}" in text and "cow" in text and "<script" not in text
    assert pixels(answered / "overlays" / "0.png.png").shape == (48, 64, 3)


def test_the_saved_probe_says_the_same(answered, checkpoint, photos):
    """The weights are of features as the encoder gives them: nothing else is needed to use them."""
    saved = np.load(answered / "probe.npz")
    assert saved["classes"].tolist() == list(NAMES)
    loaded = maskvit.load(checkpoint)
    rgb = pixels(photos / "truth" / "0.png")  # of the size of the photo; its pixels are not looked at
    squeezed = np.asarray(Image.open(photos / "new" / "0.png").resize((32, 32), Image.Resampling.BICUBIC))
    features = encoded_tokens(loaded.model, loaded.params, Batch({"rgb": jnp.asarray(squeezed)[None]}), inputs=("rgb",)).patches[0]
    scores = np.asarray(features) @ saved["kernel"] + saved["bias"]
    ids = enlarged(class_map(scores, (4, 4), (32, 32)), rgb.shape)
    assert (ids == pixels(answered / "ids" / "0.png.png")).mean() > 0.97  # the loader's bicubic kernel rounds otherwise


def test_more_pixels_give_more_patches_and_folders_need_no_class(checkpoint, photos, tmp_path, capsys):
    """Without folder "all", names of classes and true classes; photos are shown to the encoder at twice its size."""
    for kind in ("rgb", "semseg"):
        shutil.copytree(photos / "labeled" / kind / "all", tmp_path / "labeled" / kind)
    shutil.copytree(photos / "new", tmp_path / "new")
    (tmp_path / "new" / "cut.png").write_bytes((photos / "new" / "0.png").read_bytes()[:200])
    assert run(checkpoint, tmp_path, tmp_path / "out", "--size", "64") == 1
    said = capsys.readouterr()
    assert "2 photo(s) segmented" in said.out and "On labeled photos that it did not learn from" in said.out and "cut.png" in said.err
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert about["patches"] == [8, 8] and about["mean_iou_new"] == {}


def test_cells_measure_as_pixels_do():
    """For photos smaller and larger than the model's size."""
    rng = np.random.default_rng(0)
    for size in ((50, 21), (8, 16), (5, 300)):
        ids = rng.choice(np.array([0, 1, 2, 255], np.uint8), size)
        predicted = rng.integers(0, 3, (8, 16)).astype(np.int32)
        large, known = enlarged(predicted, size), ids != 255
        expected = np.zeros((3, 3), int)
        np.add.at(expected, (ids[known], large[known]), 1)
        counts = label_counts(ids, (8, 16), 3)
        np.testing.assert_array_equal(confusion(predicted, counts), expected)
        assert large.shape == size and counts.sum() == known.sum()
        for place, label in enumerate(patch_labels(counts, 8)):
            of_patch = counts[:, 8 * place : 8 * place + 8].sum((0, 1))
            assert of_patch[label] == of_patch.max() if of_patch.any() else label == -1


def test_a_photo_left_out_is_not_learned_from():
    """The class that one photo alone has is never given to it, and is found when it takes part."""
    rng = np.random.default_rng(0)
    centers = 4 * np.eye(4, 6)
    classes = [np.array(row).repeat(16) for row in ([0, 1, 2, 1], [0, 1, 1, 2], [0, 2, 2, 1], [0, 2, 3, 3])]
    features = [(centers[one] + rng.normal(0, 0.3, (64, 6))).astype(np.float32) for one in classes]
    counts = [np.eye(4, dtype=np.int32)[one].reshape(8, 8, 4) for one in classes]
    calls = []
    probe = fit_probe(features, counts, 1, lambda: calls.append(1))
    assert len(calls) == 4 * len(probe.tried) and probe.tried[probe.best] == max(probe.tried.values())
    assert 3 not in probe.maps[3]
    for found, true in zip(probe.maps[:3], classes, strict=False):
        assert found.ravel().tolist() == true.tolist()
    assert probe.weights.scores(features[3]).argmax(1).tolist() == classes[3].tolist()
    assert probe.patches.tolist() == [64, 80, 80, 32]


def test_strokes_stay_in_their_class(tmp_path):
    assert maskvit_main(["data", "pictures", "--out", str(tmp_path / "s"), "--labeled", "2", "--new", "1", "--size", "64"]) == 0
    from maskvit.data import scenes

    for number in range(2):
        ids = np.minimum(scenes.render(1, number, (64, 64))["semseg"], 2)
        drawn = pixels(tmp_path / "s" / "labeled" / "semseg" / f"{number:03d}.png")
        known = drawn != 255
        assert 0.01 < known.mean() < 0.4 and (drawn[known] == ids[known]).all()
    assert pixels(tmp_path / "s" / "truth" / "002.png").max() <= 2 and (tmp_path / "s" / "new" / "002.png").is_file()
    assert pictures.run(tmp_path / "t", 1, 1, 16, 0) == 0  # too small for the brush in places: no error


def set_mask(array):
    return lambda root: save(root / "labeled" / "semseg" / "all" / "a.png", np.asarray(array))


def all_masks(value):
    def change(root):
        for path in (root / "labeled" / "semseg").rglob("*.png"):
            save(path, np.full(pixels(path).shape, value, np.uint8))

    return change


FULL = np.zeros((40, 64), np.uint8)
MISTAKES = {
    "size": (set_mask(FULL[:20]), (), "a.png is 64 x 20 pixels, but its photo"),
    "colors": (set_mask(np.zeros((40, 64, 3), np.uint8)), (), "a.png: holds colors"),
    "no label at all": (all_masks(255), (), "no pixel of the 3 label maps below"),
    "one class": (all_masks(1), (), "only the class 'grass' is labeled"),
    "unknown id": (set_mask(FULL + 7), (), "a.png has the class id 7 on 2560 pixels, but"),
    "no mask": (lambda root: (root / "labeled" / "semseg" / "all" / "b.png").unlink(), (), "b.png has no label map: expected b.png in"),
    "no photo": (lambda root: (root / "labeled" / "rgb" / "all" / "b.png").unlink(), (), "b.png has no photo of its name in"),
    "no folder": (lambda root: shutil.rmtree(root / "labeled" / "semseg"), (), "semseg is no folder: photos belong in DIR/rgb/"),
    "damaged photo": (lambda root: (root / "labeled/rgb/all/b.png").write_bytes(b"\x89PNG"), (), "b.png: not a readable picture"),
    "classes": (lambda root: (root / "classes.txt").write_text("\n"), (), "classes.txt names no class"),
    "no truth": (lambda root: (root / "truth" / "1.png").unlink(), ("--truth",), "1.png has no label map"),
    "truth's ids": (lambda root: save(root / "truth" / "1.png", np.full((30, 20), 3, np.uint8)), ("--truth",), "names the classes 0 ... 2"),
    "patches": (lambda root: None, ("--size", "60"), "--size is 60, but patches of this checkpoint have 8 x 8 pixels"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(name, checkpoint, photos, tmp_path, capsys):
    change, flags, words = MISTAKES[name]
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    change(root)
    more = (*flags, str(root / "truth")) if flags == ("--truth",) else flags
    assert run(checkpoint, root, tmp_path / "out", "--classes", str(root / "classes.txt"), *more) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and said.startswith("error: ") and "\n" not in said and not (tmp_path / "out").exists()


def test_a_class_of_one_photo_is_told(photos, checkpoint, tmp_path, capsys):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    for name in "ab":
        path = root / "labeled" / "semseg" / "all" / f"{name}.png"
        ids = pixels(path).copy()
        ids[ids == 2] = 255
        save(path, ids)
    assert run(checkpoint, root, tmp_path / "out", "--classes", str(root / "classes.txt")) == 0
    assert "the class 'cow' is labeled in one photo only" in capsys.readouterr().err
