"""COCO 2017 with one class per pixel: the 133 classes of its panoptic annotations, 80 of things and 53 of stuff."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from maskvit.core.modalities import SEMSEG
from maskvit.data.builders.archives import IGNORED, Contents, modalities, pair, pictures, read_json, require, stem
from maskvit.data.pictures import read_picture

SPLITS = ("train", "val")


def coco(root: str, maps: Literal["panoptic", "semantic"] = "panoptic") -> Contents:
    """<root>/{train2017,val2017}/*.jpg with <root>/annotations/panoptic_{train2017,val2017}.json.

    Class i is the i-th category in the order of their ids, which is Detectron2's and Mask2Former's numbering, and so that of
    MultiMAE's pseudo-labels. Pixels of no segment are ignored.

    Args:
      maps: "panoptic" reads the segments of <root>/annotations/panoptic_<split>2017/*.png (or <root>/panoptic_...); "semantic" reads
        ready maps of ids 0 ... 132 and 255 from <root>/panoptic_semseg_<split>2017/*.png, as Detectron2's converter writes them.

    Raises FileNotFoundError that lists what is missing, and ValueError for annotations that are not of that form.
    """
    if maps not in ("panoptic", "semantic"):
        raise ValueError(f"maps is {maps!r}; known: panoptic, semantic")
    layout = "train2017/, val2017/ and annotations/panoptic_*2017.json"
    require(root, [f"{split}2017/" for split in SPLITS] + [f"annotations/panoptic_{split}2017.json" for split in SPLITS], layout)
    classes = None
    tasks = {}
    for split in SPLITS:
        annotations = read_json(os.path.join(root, "annotations", f"panoptic_{split}2017.json"))
        names, places = _segments(annotations, os.path.join(root, "annotations", f"panoptic_{split}2017.json"))
        if classes not in (None, names):
            raise ValueError(f"{root}: the categories of panoptic_val2017.json are not those of panoptic_train2017.json")
        classes = names
        folder = _map_folder(root, split, maps)
        files = pictures(os.path.join(root, f"{split}2017"))
        partners = {path: os.path.join(folder, stem(path) + ".png") for path in files if maps == "semantic" or stem(path) in places}
        tasks[split] = pair([path for path in files if path in partners], partners, "rgb", "semseg", layout)
        if maps == "panoptic":
            for task in tasks[split]:
                task.files["semseg"] += places[task.key]
        if len(tasks[split]) < len(files):
            print(f"coco: {len(files) - len(tasks[split])} pictures of {split}2017 have no annotation and are left out")
    specs = modalities(semseg={**SEMSEG, "num_classes": len(classes or ()), "missing": IGNORED})
    return Contents(specs, tasks, loaders={"semseg": panoptic_ids} if maps == "panoptic" else {}, pixel_classes={"semseg": classes or ()})


def _map_folder(root: str, split: str, maps: str) -> str:
    name = f"panoptic_{split}2017" if maps == "panoptic" else f"panoptic_semseg_{split}2017"
    found = [folder for folder in (os.path.join(root, "annotations", name), os.path.join(root, name)) if os.path.isdir(folder)]
    if not found:
        remedy = f": extract {name}.zip" if maps == "panoptic" else ""
        raise FileNotFoundError(f"{root} holds neither annotations/{name}/ nor {name}/{remedy}")
    return found[0]


def _segments(annotations: Any, path: str) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """(the classes by name, picture's name -> its segments as "#id=class,...", to be read by `panoptic_ids`)."""
    try:
        categories = sorted(annotations["categories"], key=lambda category: category["id"])
        classes = {category["id"]: place for place, category in enumerate(categories)}
        places = {
            stem(entry["file_name"]): "#" + ",".join(f"{part['id']}={classes[part['category_id']]}" for part in entry["segments_info"])
            for entry in annotations["annotations"]
        }
        return tuple(category["name"] for category in categories), places
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of panoptic annotations: {error!r}") from error


def panoptic_ids(place: str) -> UInt8[np.ndarray, "h w"]:
    """The classes of "FILE#id=class,...": a color of the file is a segment's id, red + 256 green + 65,536 blue; 0 is ignored.

    Raises ValueError for a segment that is not among the ids.
    """
    path, _, text = place.rpartition("#")
    with open(path, "rb") as file:
        colors = read_picture(file.read(), channels=3).array.astype(np.int64)
    if colors.ndim != 3:
        raise ValueError(f"holds no colors but an array of shape {colors.shape}: segments are stored as colors")
    segments, where = np.unique(colors @ np.array([1, 256, 65536]), return_inverse=True)
    classes = {0: IGNORED} | {int(one): int(other) for one, _, other in (part.partition("=") for part in text.split(",") if part)}
    if unknown := [segment for segment in segments.tolist() if segment not in classes]:
        raise ValueError(f"has the segment {unknown[0]}, which the annotations do not name")
    return np.array([classes[segment] for segment in segments.tolist()], np.uint8)[where.reshape(colors.shape[:2])]
