"""What is found in a folder before it is packed, and which of its files count at all."""

from __future__ import annotations

import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from maskvit.data.builders.look import look
from maskvit.data.files import list_files, tell
from maskvit.data.pictures import SUFFIXES

HIDDEN = (".DS_Store", "._0.jpg", "Thumbs.db", ".ipynb_checkpoints/0.jpg", "__MACOSX/0.jpg", "@eaDir/0.jpg", "desktop.ini")


def save(path, array, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array) if path.suffix == ".npy" else Image.fromarray(array).save(path, **settings)


def test_what_counts_and_what_is_passed_over(tmp_path):
    for name in ("a.JPG", "b.jfif", "c.avif", "deep/d.gif", "e.heic", "f.jp2", "g.exr", "noname", "notes.txt", *HIDDEN):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    files, passed_over = list_files(tmp_path, SUFFIXES)
    assert [os.path.relpath(path, tmp_path) for path in files] == ["a.JPG", "b.jfif", "c.avif", "deep/d.gif", "gone.png"]
    reasons = {os.path.relpath(path, tmp_path): reason for path, reason in passed_over.items()}
    assert {name for name, reason in reasons.items() if reason == "hidden"} == {name.split("/")[0] for name in HIDDEN}
    assert reasons["e.heic"] == ".heic is not read: convert it to PNG or JPEG"
    assert reasons["g.exr"] == ".exr is not read: save it as .npy or as a float .tif"
    assert "no suffix" in reasons["noname"] and reasons["notes.txt"] == ".txt is not read"
    assert reasons["loop"] == "links back to a folder above it" and reasons["pipe.png"] == "is no regular file"
    told = "\n".join(tell(passed_over, tmp_path))
    assert "passed over 1: e.heic (.heic is not read" in told and "passed over 7: .DS_Store, ._0.jpg" in told


def test_the_facts_of_every_modality(tmp_path):
    rng = np.random.default_rng(0)
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        for i in numbers:
            top, kind = tmp_path / split, "ab"[i % 2]
            exif = Image.Exif()
            exif[0x0112] = 6 if i == 0 else 1
            save(top / "rgb" / kind / f"{i}.jpg", rng.integers(0, 256, (20, 30, 3), np.uint8), exif=exif)
            meters = rng.uniform(1, 9, (20, 30)).astype(np.float32)
            meters[:2] = np.nan
            save(top / "depth" / kind / f"{i}.npy", meters)
            save(top / "parts" / kind / f"{i}.png", (np.arange(600).reshape(20, 30) % 7).astype(np.uint8))
            save(top / "range" / kind / f"{i}.png", np.full((20, 30), 400 + i, np.uint16))
    (tmp_path / "val" / "depth" / "a" / "4.npy").unlink()
    (tmp_path / "train" / "rgb" / "a" / "x.heic").write_bytes(b"x")
    (tmp_path / "train" / "rgb" / "a" / "2.jpg").write_bytes(b"<!doctype html>")
    found = look(str(tmp_path))
    assert found.splits == {"train": 4, "val": 2} and found.classes == ("a", "b")
    rgb, depth, parts, distance = (found.modalities[name] for name in ("rgb", "depth", "parts", "range"))
    assert rgb.files == 6 and rgb.looked_at == 5 and rgb.sizes == {(20, 30): 4, (30, 20): 1} and rgb.turned == 1
    assert rgb.modes == {"JPEG RGB": 5} and rgb.bits == {8: 5} and rgb.channels == {3: 5} and rgb.lossy == 5 and rgb.values is None
    assert "a web page" in "".join(rgb.problems.values()) and any(path.endswith("x.heic") for path in rgb.passed_over)
    assert depth.fractions == 5 and depth.lacking == 1 and depth.no_value == pytest.approx(0.1) and 1 <= depth.low < depth.high <= 9
    assert parts.values == set(range(7)) and parts.modes == {"PNG L": 6} and not parts.lossy
    assert distance.bits == {16: 6} and (distance.low, distance.high) == (400, 405) and distance.channels == {1: 6}
    only = look(str(tmp_path), ("parts",), samples=2)
    assert only.modalities["parts"].looked_at == 2 and only.modalities["parts"].files == 6


def test_no_such_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        look(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no folder with pictures"):
        look(str(tmp_path))
    save(tmp_path / "a.png", np.zeros((9, 9), np.uint8))
    with pytest.raises(FileNotFoundError, match=r"1 files lie beside the folders \(such as a.png\): move them into .*/rgb/"):
        look(str(tmp_path))


def test_unicode_forms_of_one_name_are_one(tmp_path):
    for form, name, array in (("NFC", "rgb", np.zeros((9, 9, 3), np.uint8)), ("NFD", "depth", np.zeros((9, 9), np.uint16))):
        save(tmp_path / name / unicodedata.normalize(form, "café") / unicodedata.normalize(form, "señal.png"), array)
    found = look(str(tmp_path))
    assert found.splits == {"train": 1} and found.classes == (unicodedata.normalize("NFC", "café"),)
    assert [facts.lacking for facts in found.modalities.values()] == [0, 0]
