"""ADE20K of the scene parsing challenge (ADEChallengeData2016): pictures and maps of 150 classes at their own sizes."""

from __future__ import annotations

import os

from maskvit.core.modalities import SEMSEG
from maskvit.data.builders.archives import IGNORED, Contents, ids_from_one, modalities, pair, pictures, require, stem

CLASSES = 150
SPLITS = {"train": "training", "val": "validation"}
NAMES = "objectInfo150.txt"
LAYOUT = "images/ and annotations/, each with training/ and validation/"


def ade20k(root: str) -> Contents:
    """<root>/images/{training,validation}/*.jpg and annotations/.../*.png; class k of the files (1 ... 150) is k - 1, 0 is ignored.

    Names of the classes are read from <root>/objectInfo150.txt, which the archive holds; without it they have none.

    Raises FileNotFoundError that lists what is missing, maps of single pictures included; ValueError for a list of other classes.
    """
    require(root, [f"{part}/{split}/" for part in ("images", "annotations") for split in SPLITS.values()], LAYOUT)
    specs = modalities(semseg={**SEMSEG, "num_classes": CLASSES, "missing": IGNORED})
    tasks = {}
    for split, folder in SPLITS.items():
        maps = os.path.join(root, "annotations", folder)
        files = pictures(os.path.join(root, "images", folder))
        tasks[split] = pair(files, {path: os.path.join(maps, stem(path) + ".png") for path in files}, "rgb", "semseg", LAYOUT)
    return Contents(specs, tasks, loaders={"semseg": ids_from_one}, pixel_classes=_names(os.path.join(root, NAMES)))


def _names(path: str) -> dict[str, tuple[str, ...]]:
    """The first name of every class, all its names where others have that one too.

    The file has lines "number, share, pictures, pictures, names" with tabs between, below one of titles.
    """
    if not os.path.isfile(path):
        print(f"ade20k: no {NAMES}, which names the classes: they are numbers")
        return {}
    with open(path, encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file if line[:1].isdecimal()]
    if [row[0].strip() for row in rows] != [str(number) for number in range(1, CLASSES + 1)]:
        raise ValueError(f"{path} does not list the classes 1 ... {CLASSES}: take it from the archive, or remove it")
    first = [row[-1].split(",")[0].strip() for row in rows]
    return {"semseg": tuple(name if first.count(name) == 1 else row[-1].strip() for name, row in zip(first, rows, strict=True))}
