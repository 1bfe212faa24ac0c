"""ImageNet and the sets that test it, and Fashion-MNIST, from tiny archives in the layout of the official ones."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from maskvit.data import codec
from maskvit.data.builders import ARCHIVES
from maskvit.data.builders.fashion_mnist import CLASSES
from tests.data.archives import labels, packed, picture, told

WNIDS = ("n01440764", "n02102040", "n03888257")


def train_folder(root, wnids=WNIDS):
    for number, wnid in enumerate(wnids):
        for index in range(2):
            picture(root / "train" / wnid / f"{wnid}_{index}.JPEG", 40 * number + index)


def development_kit(folder, numbers):
    """The official kit: a number per validation picture, and the wnids of the numbers, which are not in their order."""
    from scipy.io import savemat

    folder.mkdir(parents=True)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(map(str, numbers)) + "\n")
    synsets = np.zeros((4, 1), [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    for place, (number, wnid) in enumerate(((1, WNIDS[2]), (2, WNIDS[0]), (3, WNIDS[1]), (1001, "n00001740"))):
        synsets[place, 0] = (np.array([[number]]), wnid, "words")
    savemat(folder / "meta.mat", {"synsets": synsets})


def test_imagenet_with_folders_in_val(tmp_path, capsys):
    train_folder(tmp_path / "in")
    for wnid in WNIDS[:2]:
        picture(tmp_path / "in" / "val" / wnid / f"ILSVRC2012_val_{wnid[-4:]}.JPEG")
    train = packed("imagenette", tmp_path / "in")
    assert train.label_names == WNIDS and len(train) == 6
    assert train[2]["rgb"] == (tmp_path / "in" / "train" / WNIDS[1] / f"{WNIDS[1]}_0.JPEG").read_bytes()
    assert labels(train)[f"train/{WNIDS[2]}/{WNIDS[2]}_1"] == WNIDS[2]
    assert set(labels(packed("imagenette", tmp_path / "in", split="val")).values()) == set(WNIDS[:2])
    assert "imagenette: val: 2 records of 2 classes" in capsys.readouterr().out


@pytest.mark.parametrize("kit", [True, False])
def test_imagenet_with_a_flat_val(tmp_path, kit, capsys):
    root, numbers = tmp_path / "in", (3, 1, 2)  # by the kit: the second, third and first class
    train_folder(root)
    for number in (3, 1, 2):
        picture(root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", number)
    command = ["imagenet", "--root", str(root), "--data_dir", str(tmp_path / "tfds")]
    assert "give --val_labels the folder ILSVRC2012_devkit_t12/data" in told(capsys, *command)
    wnids = [WNIDS[1], WNIDS[2], WNIDS[0]]
    if kit:
        given = tmp_path / "kit" / "data"
        development_kit(given, numbers)
    else:
        given = tmp_path / "LOC_val_solution.csv"
        rows = [f"ILSVRC2012_val_{number:08d},{wnid} 1 2 3 4 {wnid} 5 6 7 8" for number, wnid in enumerate(wnids, 1)]
        given.write_text("ImageId,PredictionString\n" + "\n".join(rows) + "\n")
    val = packed("imagenet", root, split="val", val_labels=str(given))
    assert labels(val) == {f"val/ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(wnids, 1)}
    picture(root / "val" / "ILSVRC2012_val_00000009.JPEG")
    assert "1 pictures of" in (said := told(capsys, *command, "--val_labels", str(given))) and "00000009.JPEG" in said


def test_what_imagenet_lacks_is_listed(tmp_path, capsys):
    command = ["imagenet", "--root", str(tmp_path / "in"), "--data_dir", str(tmp_path / "tfds")]
    assert "no folder" in told(capsys, *command)
    (tmp_path / "in").mkdir()
    said = told(capsys, *command)
    assert "lacks 2 of what the archive holds" in said and "\n  train/\n  val/" in said
    (tmp_path / "in" / "train" / "cats").mkdir(parents=True)
    (tmp_path / "in" / "val").mkdir()
    assert "train/cats is no folder of a class; expected names such as n01440764" in told(capsys, *command)
    (tmp_path / "in" / "train" / "cats").rename(tmp_path / "in" / "train" / WNIDS[0])
    picture(tmp_path / "in" / "val" / WNIDS[1] / "x.JPEG")
    assert f"val/{WNIDS[1]} is no class of" in told(capsys, *command)


def test_test_sets_by_number_and_by_wnid_carry_the_labels_of_all_classes(tmp_path, capsys):
    root, wnids = tmp_path / "v2", tmp_path / "wnids.txt"
    wnids.write_text("\n".join(WNIDS) + "\n")
    for number in ("0", "2", "10"):
        picture(root / number / "a.jpeg")
    command = ["imagenet_test", "--data_dir", str(tmp_path / "tfds")]
    assert "v2/10: there are 3 classes, 0 ... 2" in told(capsys, *command, "--root", str(root), "--classes", str(wnids))
    (root / "10").rename(root / "1")
    source = packed("imagenet_test", root, split="test", classes=str(wnids), name="imagenet_v2")
    assert labels(source) == {"test/0/a": WNIDS[0], "test/1/a": WNIDS[1], "test/2/a": WNIDS[2]} and source.label_names == WNIDS
    picture(tmp_path / "a" / WNIDS[1] / "x.jpg")
    assert "give --classes the folder train of ImageNet" in told(capsys, *command, "--root", str(tmp_path / "a"))
    train_folder(tmp_path / "in")
    source = packed("imagenet_test", tmp_path / "a", split="test", classes=str(tmp_path / "in" / "train"))
    assert source.label_names == WNIDS and source[0]["label"] == 1
    wnids.write_text(WNIDS[0] + "\n")
    assert f"a/{WNIDS[1]} is none of the 1 classes" in told(capsys, *command, "--root", str(tmp_path / "a"), "--classes", str(wnids))


@pytest.mark.parametrize("flat", [True, False])
def test_sets_of_labels(tmp_path, flat, capsys):
    root, real, wnids = tmp_path / "in", tmp_path / "real.json", tmp_path / "wnids.txt"
    wnids.write_text("\n".join(WNIDS) + "\n")
    for number, wnid in ((1, WNIDS[2]), (2, WNIDS[0]), (4, WNIDS[0])):
        picture(root / ("" if flat else wnid) / f"ILSVRC2012_val_{number:08d}.JPEG", number)
    real.write_text("[[2], [0, 1], [1], []]")
    source = packed("imagenet_real", root, split="val", real=str(real), classes=str(wnids))
    found = {source[i]["id"].split("/")[-1][-1]: np.flatnonzero(source.label_sets()[i]).tolist() for i in range(3)}
    assert found == {"1": [2], "2": [0, 1], "4": []} and source.label_sets().shape == (3, 3)
    assert sorted(source[i]["label"] for i in range(3)) == ([-1, -1, -1] if flat else [0, 0, 2])
    command = ["imagenet_real", "--root", str(root), "--data_dir", str(tmp_path / "tfds"), "--classes", str(wnids), "--real", str(real)]
    for text, match in (("3", "has the class 3; there are 3, 0 ... 2"), ("0.5", "no list of lists"), ("0", "00000001 ... 00000001")):
        real.write_text(f"[[{text}]]")
        assert match in told(capsys, *command)


def test_imagenet_c_is_a_split_per_corruption_and_severity(tmp_path, capsys):
    wnids = tmp_path / "wnids.txt"
    wnids.write_text("\n".join(WNIDS) + "\n")
    for corruption in ("fog", "snow"):
        for severity in (1, 5):
            picture(tmp_path / "in" / corruption / str(severity) / WNIDS[1] / "x.JPEG", severity)
    command = ["imagenet_c", "--root", str(tmp_path / "in"), "--data_dir", str(tmp_path / "tfds"), "--classes", str(wnids)]
    said = told(capsys, *command)
    assert "lacks 6" in said and "fog/2/" in said and "snow/4/" in said
    source = packed("imagenet_c", tmp_path / "in", split="snow_5", classes=str(wnids), severities=[1, 5])
    assert labels(source) == {f"snow_5/{WNIDS[1]}/x": WNIDS[1]} and codec.decode(source[0]["rgb"]).max() <= 8
    with pytest.raises(ValueError, match=r"known: fog_1 \(1\), fog_5 \(1\), snow_1 \(1\), snow_5 \(1\)"):
        packed("imagenet_c", tmp_path / "in", split="fog_2", classes=str(wnids), severities=[1, 5])


def test_imagenet_9_is_a_split_per_variant(tmp_path, capsys):
    for variant in ("original", "mixed_same", "mixed_rand"):
        for name in ("00_dog", "01_bird"):
            picture(tmp_path / "in" / variant / "val" / name / f"{variant}.JPEG")
    (tmp_path / "in" / "fg_mask" / "val" / "00_dog").mkdir(parents=True)  # the archive has masks as .npy there
    np.save(tmp_path / "in" / "fg_mask" / "val" / "00_dog" / "x.npy", np.zeros((8, 8)))
    source = packed("imagenet_9", tmp_path / "in", split="mixed_same")
    assert labels(source) == {"mixed_same/00_dog/mixed_same": "00_dog", "mixed_same/01_bird/mixed_same": "01_bird"}
    picture(tmp_path / "in" / "mixed_rand" / "val" / "02_wheeled vehicle" / "x.JPEG")
    command = ["imagenet_9", "--root", str(tmp_path / "in"), "--data_dir", str(tmp_path / "other")]
    assert "has the classes" in told(capsys, *command)
    assert "no_fg/val/" in told(capsys, *command, "--variants", "original", "no_fg")


def write_idx(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes()))


def test_fashion_mnist(tmp_path, capsys):
    rng = np.random.default_rng(0)
    root, images = tmp_path / "in", rng.integers(0, 256, (12, 28, 28), np.uint8)
    numbers = np.arange(12, dtype=np.uint8) % 10
    command = ["fashion_mnist", "--root", str(root), "--data_dir", str(tmp_path / "tfds")]
    for part, first in (("train", 0), ("t10k", 8)):
        write_idx(root / f"{part}-images-idx3-ubyte.gz", images[first:])
        if part == "t10k":
            assert "lacks 1" in (said := told(capsys, *command)) and "t10k-labels-idx1-ubyte.gz" in said
        write_idx(root / f"{part}-labels-idx1-ubyte.gz", numbers[first:])
    source = packed("fashion_mnist", root)
    assert len(source) == 12 and source.label_names == CLASSES
    for index in (0, 11):
        record = source[index]
        pixels = codec.decode(record["rgb"])
        assert pixels.shape == (32, 32, 3) and record["rgb"].startswith(b"\x89PNG")
        np.testing.assert_array_equal(pixels[2:-2, 2:-2], np.repeat(images[index, ..., None], 3, axis=2))
        assert pixels.sum() == 3 * images[index].sum(dtype=int) and record["label"] == index % 10
    assert packed("fashion_mnist", root, split="test")[0]["label"] == 8
    assert "fashion_mnist: test: 4 records of 4 classes: t_shirt_top 1, trouser 1, pullover 0" in capsys.readouterr().out
    whole = (root / "train-images-idx3-ubyte.gz").read_bytes()
    short = gzip.compress(b"\0\0\x08\1\0\0")
    for damaged, text in ((whole[: len(whole) // 2], "no gzip file, or a truncated one"), (short, "no idx file")):
        other = tmp_path / f"damaged_{len(damaged)}"
        other.mkdir()
        for file in root.iterdir():
            (other / file.name).write_bytes(damaged if file.name.startswith("train-images") else file.read_bytes())
        assert text in told(capsys, "fashion_mnist", "--root", str(other), "--data_dir", str(tmp_path / "tfds2"))


def test_every_row_is_a_function():
    for archive in ARCHIVES.values():
        assert (archive.load().__doc__ or "").strip() and archive.what and archive.layout
