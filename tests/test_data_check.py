"""`python -m maskvit data check`: what it says of data that are as the config has them, and of data that are not."""

from __future__ import annotations

import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from maskvit.__main__ import main
from maskvit.core.modalities import DEPTH, RGB, SEMSEG, parse_modalities
from maskvit.data.builders import prepare
from tests.runs import small_run, write_config

DECLARED = {"rgb": {**RGB, "patch": 8}, "depth": {**DEPTH, "patch": 8, "missing": 0}, "semseg": {**SEMSEG, "patch": 8, "num_classes": 4}}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Ten samples of two classes: depth from 1 to 3 m with holes, classes 0 ... 2 of 4, two sizes; a split val of two."""
    top = tmp_path_factory.mktemp("check")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 2)):
        for number in range(count):
            size = (24, 32) if number else (32, 24)
            kind = ("cat", "dog")[number % 2]
            for name, suffix, array in (
                ("rgb", "png", rng.integers(0, 256, (*size, 3), np.uint8)),
                ("depth", "npy", np.where(rng.uniform(size=size) < 0.25, np.nan, rng.uniform(1, 3, size)).astype(np.float32)),
                ("semseg", "png", rng.integers(0, 3, size).astype(np.uint8)),
            ):
                path = top / "in" / split / name / kind / f"n{number}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, array) if suffix == "npy" else Image.fromarray(array).save(path)
    prepare("folder", str(top / "tfds"), root=str(top / "in"), name="mine", modalities=parse_modalities(DECLARED))
    return str(top / "tfds")


def checked(tmp_path, data_dir, capsys, modalities=None, *more, **changes):
    """(exit status, what the command said, the sheet)."""
    config = small_run(data_dir)
    config["modalities"] = modalities or DECLARED
    config["data"]["train"] = dict(source="tfds", data_dir=data_dir, name="mine")
    config["evaluators"] = {"knn": dict(type="knn", every="1 epochs", ks=(1,))}
    config.update(changes)
    write_config(tmp_path / "run.py", config)
    status = main(["data", "check", "--config", str(tmp_path / "run.py"), "--out", str(tmp_path / "sheet.png"), *more])
    said = capsys.readouterr()
    return status, said.out + said.err, tmp_path / "sheet.png"


def test_sound_data_are_described(tmp_path, data_dir, capsys):
    status, said, sheet = checked(tmp_path, data_dir, capsys)
    rows = {tuple(line.split()[:2]): line for line in said.splitlines() if line.startswith(("train ", "val "))}
    assert status == 0 and "look at this" not in said and said.endswith("\n12 samples of 2 data sets are as the config says.\n"), said
    assert "24-32 x 24-32" in rows["train", "rgb"] and rows["train", "rgb"].split()[2] == "10"
    low, high = (float(text) for text in rows["train", "depth"].split(" m")[0].split("  ")[-1].split(" to "))
    assert 0.99 < low < 1.05 and 2.95 < high < 3.01 and 20 < float(rows["train", "depth"].split()[-1][:-1]) < 30
    assert "3 of 4 classes, 0 to 2" in rows["train", "semseg"] and rows["train", "semseg"].endswith("0.0%")
    assert "2 of 2 classes" in rows["train", "label"] and rows["val", "rgb"].split()[2] == "2"
    width, height = Image.open(sheet).size
    assert width > 4 * 160 and height > 6 * 160 and (tmp_path / "sheet_val.png").is_file()
    _, said, sheet = checked(tmp_path, data_dir, capsys, None, "--rows", "1", "--samples", "3")
    assert {line.split()[2] for line in said.splitlines() if line.startswith("train ")} == {"3"}
    assert Image.open(sheet).size[1] < 2 * 200


def test_the_sheet_shows_the_classes_over_the_picture(data_dir):
    from maskvit.commands.data.check import contact_sheet

    specs = parse_modalities(DECLARED)
    arrays = {
        "rgb": np.full((160, 160, 3), 200, np.uint8),
        "depth": np.ones((160, 160, 1), np.uint16),
        "semseg": np.repeat([[0, 1]], 160, 0).repeat(80, 1).astype(np.uint8),
    }
    page = np.asarray(Image.open(io.BytesIO(contact_sheet([("a", arrays)], specs)))).astype(int)
    left = 20 + max(8 * len("a"), 30)
    tile = page[60:200, left + 3 * 170 : left + 3 * 170 + 160]  # the fourth column
    halves = tile[:, 10:70].reshape(-1, 3).mean(0), tile[:, 90:150].reshape(-1, 3).mean(0)
    assert np.abs(halves[0] - halves[1]).max() > 30
    assert np.ptp(page[60:200, left + 10 : left + 150], axis=(0, 1)).max() == 0  # the picture itself is flat


def test_what_is_wrong_is_named(tmp_path, data_dir, capsys):
    metadata = pathlib.Path(data_dir, "mine", "1.0.0", "metadata.json")
    before = metadata.read_text()
    stated = json.loads(before)
    stated["modalities"] = {}  # so that the config may contradict the data
    metadata.write_text(json.dumps(stated))
    try:
        wrong = {**DECLARED, "semseg": {**DECLARED["semseg"], "num_classes": 2}}
        status, said, _ = checked(tmp_path, data_dir, capsys, wrong)
        assert status == 1 and "train: records that cannot be used (10)" in said and "class id 2 is out of range" in said
        assert "look at this: train: rgb no sample has it" in said
        assert said.splitlines()[-1].startswith("12 samples of 2 data sets: 12 things are wrong, ")
        wrong = {**DECLARED, "rgb": {**DECLARED["rgb"], "scale": 1.0}}
        status, said, _ = checked(tmp_path, data_dir, capsys, wrong)
        assert status == 0 and "look at this: train: rgb reaches 1136 in the model's units" in said and "is scale = 1 right?" in said, said
    finally:
        metadata.write_text(before)
    objective = dict(small_run(data_dir)["objective"])
    status, said, _ = checked(tmp_path, data_dir, capsys, None, objective={**objective, "nam": 1})
    assert status == 2 and "nam" in said and said.count("error:") == 1
