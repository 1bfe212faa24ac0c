"""ADE20K of the scene parsing challenge (ADEChallengeData2016): pictures and maps of 150 classes at their own sizes."""

from __future__ import annotations

import os

from maskvit.core.modalities import SEMSEG
from maskvit.data.builders.archives import IGNORED, Contents, ids_from_one, modalities, pair, pictures, require, stem

CLASSES = 150
SPLITS = {"train": "training", "val": "validation"}
LAYOUT = "images/ and annotations/, each with training/ and validation/"


def ade20k(root: str) -> Contents:
    """<root>/images/{training,validation}/*.jpg and annotations/.../*.png; class k of the files (1 ... 150) is k - 1, 0 is ignored.

    Raises FileNotFoundError that lists what is missing, maps of single pictures included.
    """
    require(root, [f"{part}/{split}/" for part in ("images", "annotations") for split in SPLITS.values()], LAYOUT)
    specs = modalities(semseg={**SEMSEG, "num_classes": CLASSES, "missing": IGNORED})
    tasks = {}
    for split, folder in SPLITS.items():
        maps = os.path.join(root, "annotations", folder)
        files = pictures(os.path.join(root, "images", folder))
        tasks[split] = pair(files, {path: os.path.join(maps, stem(path) + ".png") for path in files}, "rgb", "semseg", LAYOUT)
    return Contents(specs, tasks, loaders={"semseg": ids_from_one})
