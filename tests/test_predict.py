"""`python -m maskvit predict`: a fine-tuned checkpoint and a folder in, answers per file and a page out."""

from __future__ import annotations

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import maskvit
from maskvit.checkpoints import save_imported
from maskvit.commands.predict import class_result, main, pixel_result, value_result
from maskvit.data.augment.opencv import resize_bilinear
from maskvit.objectives import build_objective
from maskvit.plots.pictures import palette
from tests.test_fine_tuned_models import CLASSES, NAMES, fine_tuned, saved
from tests.tiny import fresh_params, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of three sizes, one of them in a folder of its own, and a file that ends too early."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "deeper").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (32, 32)), ("b.png", (48, 64)), ("deeper/a.png", (100, 40))):
        coarse = Image.fromarray(rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8))
        coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(root / name)
    whole = (root / "b.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    return root


FILES = ["a.png", "b.png", "deeper/a.png"]


def run(checkpoint, folder, out, *more):
    return main(["--checkpoint", str(checkpoint), "--images", str(folder), "--out", str(out), *more])


def pixels(path):
    return np.asarray(Image.open(path))


def test_classes_of_pictures(folder, tmp_path, capsys):
    """The likeliest first; averaged weights where they are asked for; a damaged file is told and left out."""
    saved(tmp_path / "run", fine_tuned(CLASSES, ema_decay=0.9), label_names=NAMES)
    written = {}
    for weights in ("params", "ema"):
        out = tmp_path / weights
        assert run(tmp_path / "run", folder, out, "--weights", weights, "--crop", "1.0", "--top", "3", "--batch_size", "2") == 1
        said = capsys.readouterr()
        assert "3 picture(s) answered" in said.out and "cut.png: modality 'rgb': truncated" in said.err
        with open(out / "predictions.csv", newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["file", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
        assert [row[0] for row in rows] == FILES
        expected = maskvit.load(tmp_path / "run", weights).predict(pixels(folder / "a.png")[None])["probabilities"][0]
        order = np.argsort(-expected)[:3]
        assert rows[0][1::2] == [NAMES[i] for i in order]
        np.testing.assert_allclose([float(share) for share in rows[0][2::2]], expected[order], atol=1e-5)
        text = (out / "index.html").read_text()
        assert all(name in text for name in FILES) and rows[1][1] in text
        assert "<h1>Answers to 3 pictures</h1><p>" in text and "Half of the answers have a probability of" in text
        about = json.loads((out / "about.json").read_text())
        assert (about["task"], about["weights"], about["crop"]) == ("classification", weights, 1.0)
        written[weights] = rows
    assert written["params"] != written["ema"]


def test_what_was_answered_in_words():
    told = [[("cat", 0.9), ("dog", 0.1)], [("dog", 0.4), ("cat", 0.3)], [("cat", 0.6), ("dog", 0.4)]]
    assert class_result(told) == (
        "3 pictures, 2 classes answered: cat (2), dog (1). Half of the answers have a probability of 60% or more; 1 of 3 are below 50%."
    )
    assert class_result([told[0], told[2]]).startswith("The answer is cat for all 2 pictures.")
    assert pixel_result({3: 10, 0: 70, 1: 20}, ["road", "sky", "2", "3"]) == "3 of 4 classes are found: road 70%, sky 20%, class 3 10%."
    assert value_result([2.0, float("nan"), 1.0, 4.0], "depth", "meters") == (
        "The median value of depth in a picture goes from 1 to 4; half of them are above 2 (meters)."
    )


def stored_size(objective, params, state, picture):
    """What the model says of a whole picture, padded below and to the right, at the picture's own size: float64 "h w k"."""
    height, width = picture.shape[:2]
    factor = 32 / max(height, width)
    part = round(height * factor), round(width * factor)
    canvas = np.full((32, 32, 3), 128, np.uint8)
    canvas[: part[0], : part[1]] = resize_bilinear(picture, part)
    answer = next(iter(objective.answers(params, state, {"rgb": jnp.asarray(canvas)[None]}).values()))[0, : part[0], : part[1]]
    return np.asarray(jax.image.resize(answer, (height, width, answer.shape[-1]), "linear", antialias=False))


def test_classes_of_pixels_at_the_size_of_each_picture(folder, tmp_path):
    config = fine_tuned(dict(name="segmentation", target="semseg"), head=dict(name="linear", norm="none"))
    objective, params, state = saved(tmp_path / "run", config)
    assert run(tmp_path / "run", folder, tmp_path / "out") == 1
    for name in FILES:
        picture, ids, overlay = pixels(folder / name), *(pixels(tmp_path / "out" / kind / f"{name}.png") for kind in ("ids", "overlays"))
        logits = stored_size(objective, params, state, picture)
        two = np.sort(logits, axis=-1)[..., -2:]
        clear = two[..., 1] - two[..., 0] > 1e-4
        assert ids.dtype == np.uint8 and ids.shape == picture.shape[:2] and clear.mean() > 0.95
        np.testing.assert_array_equal(ids[clear], logits.argmax(-1)[clear])
        np.testing.assert_array_equal(overlay, (picture.astype(int) + palette(7)[ids]) // 2)
    with open(tmp_path / "out" / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list("0123456")
    assert [int(rows[2][color]) for color in ("red", "green", "blue")] == palette(7)[2].tolist()
    text = (tmp_path / "out" / "index.html").read_text()
    counts = np.bincount(np.concatenate([pixels(tmp_path / "out" / "ids" / f"{name}.png").ravel() for name in FILES]), minlength=7)
    most = int(counts.argmax())
    assert "The classes found" in text and f"class {most} {counts[most] / counts.sum():.0%}" in text
    # A number crops: the middle, at the model's size.
    assert run(tmp_path / "run", folder, tmp_path / "cropped", "--crop", "1.0") == 1
    assert pixels(tmp_path / "cropped" / "ids" / "b.png.png").shape == (32, 32)
    expected = maskvit.load(tmp_path / "run").predict(pixels(folder / "a.png")[None])["ids"][0]
    np.testing.assert_array_equal(pixels(tmp_path / "cropped" / "ids" / "a.png.png"), expected)


def test_depth_in_meters(folder, tmp_path):
    config = fine_tuned(dict(name="regression", target="depth"), head=dict(name="linear", norm="none"))
    objective, params, state = saved(tmp_path / "run", config)
    assert run(tmp_path / "run", folder, tmp_path / "out") == 1
    for name in FILES:
        picture, values = pixels(folder / name), np.load(tmp_path / "out" / "values" / f"{name}.npy")
        expected = stored_size(objective, params, state, picture) * 0.001
        assert values.dtype == np.float32 and values.shape == (*picture.shape[:2], 1)
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
        assert pixels(tmp_path / "out" / "maps" / f"{name}.png").shape == picture.shape
    assert json.loads((tmp_path / "out" / "about.json").read_text())["unit"] == "meters"
    assert "depth in meters: " in (tmp_path / "out" / "index.html").read_text()


def test_mistakes_end_before_anything_is_written(folder, tmp_path, capsys):
    saved(tmp_path / "run", fine_tuned(CLASSES))
    saved(tmp_path / "maps", fine_tuned(dict(name="segmentation", target="semseg"), head=dict(name="linear"), inputs=("rgb", "depth"),
                                        read_from=("depth",)))  # fmt: skip
    config = tiny_config()
    save_imported(tmp_path / "pretrained", fresh_params(build_objective(config)), {"config": config})
    out = tmp_path / "out"
    for checkpoint, more, message in (
        ("run", ("--top", "8"), "--top is 8, but the model knows 7 classes"),
        ("run", ("--weights", "ema"), "weights is 'ema', but the checkpoint"),
        ("maps", ("--top", "2"), "--top is 2, but the answers are maps"),
        ("maps", (), "pictures are read as the first input, 'rgb', but the head also reads 'depth'"),
        ("pretrained", (), "has no task: fine-tune it first"),
    ):
        assert run(tmp_path / checkpoint, folder, out, *more) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not out.exists()
    out.mkdir()
    (out / "x").touch()
    assert run(tmp_path / "run", folder, out) == 2
    assert "which is there already: give a new folder" in capsys.readouterr().err and [path.name for path in out.iterdir()] == ["x"]
