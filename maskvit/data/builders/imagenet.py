"""ImageNet-1K and Imagenette, and the sets that test what was trained on them: V2, A, R, Sketch, C, ImageNet-9."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

from maskvit.data.builders.archives import Contents, class_tasks, csv_rows, modalities, pictures, read_json, require, stem
from maskvit.data.builders.labels import read_names
from maskvit.data.builders.layout import Task, folders_in

WNID, VALIDATION = re.compile(r"n\d{8}"), re.compile(r"ILSVRC2012_val_\d{8}")
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


def imagenet(root: str, val_labels: str | None = None) -> Contents:
    """<root>/train/<wnid>/*.JPEG and <root>/val, in such folders or flat; class i is the i-th wnid in sorted order.

    Args:
      val_labels: for a flat val the folder "data" of the development kit (with `TRUTH` and `META`), or Kaggle's LOC_val_solution.csv.

    Raises:
      FileNotFoundError: what is missing.
      ValueError: folders that are no wnids, classes of val that train lacks, pictures without a label.
    """
    require(root, ("train/", "val/"), "train/<wnid>/*.JPEG and val/")
    names = _wnids(os.path.join(root, "train"))
    val = os.path.join(root, "val")
    if folders := folders_in(val):
        if strange := sorted(set(folders) - set(names)):
            raise ValueError(f"{os.path.join(val, strange[0])} is no class of {os.path.join(root, 'train')}, which has {len(names)}")
        tasks = class_tasks(val)
    else:
        if val_labels is None:
            raise FileNotFoundError(
                f"{val} holds pictures without class folders: give --val_labels the folder ILSVRC2012_devkit_t12/data "
                f"(with {TRUTH} and {META}), or Kaggle's LOC_val_solution.csv"
            )
        labels = _validation(os.path.expanduser(val_labels))
        files = pictures(val)
        if unlabeled := [path for path in files if labels.get(stem(path)) not in set(names)]:
            found = labels.get(stem(unlabeled[0]))
            why = f"its class {found} is not in train" if found else f"{val_labels} does not name it"
            raise ValueError(f"{len(unlabeled)} pictures of {val} have no class; {os.path.basename(unlabeled[0])}: {why}")
        tasks = [Task(stem(path), {"rgb": path}, labels[stem(path)]) for path in files]
    return Contents(modalities(), {"train": class_tasks(os.path.join(root, "train")), "val": tasks}, names)


def _wnids(top: str) -> tuple[str, ...]:
    """The class folders of `top`, sorted."""
    names = tuple(folders_in(top))
    if not names or (strange := [name for name in names if not WNID.fullmatch(name)]):
        what = f"{os.path.join(top, strange[0])} is no folder of a class" if names else f"{top} holds no folders"
        raise ValueError(f"{what}; expected names such as n01440764 (extract each tar file of the archive into a folder of its name)")
    return names


def _validation(path: str) -> dict[str, str]:
    """Picture's name without suffix -> wnid."""
    if not os.path.isdir(path):
        return {row["ImageId"]: row["PredictionString"].split()[0] for _, row in csv_rows(path, ("ImageId", "PredictionString"))}
    require(path, (TRUTH, META), "the folder data of ILSVRC2012_devkit_t12")
    from scipy.io import loadmat

    synsets = loadmat(os.path.join(path, META), squeeze_me=True)["synsets"]
    wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    with open(os.path.join(path, TRUTH), encoding="ascii") as file:
        numbers = [int(line) for line in file if line.strip()]
    if unknown := sorted(set(numbers) - set(wnids)):
        raise ValueError(f"{os.path.join(path, TRUTH)} has the number {unknown[0]}, which {META} does not name")
    return {f"ILSVRC2012_val_{number:08d}": wnids[value] for number, value in enumerate(numbers, 1)}


def _classes(given: str | None, folders: Sequence[str], top: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """(names of all classes, folder -> class) of folders that are wnids or numbers of classes; `given` as in `imagenet_test`."""
    names: tuple[str, ...] = ()
    if given:
        path = os.path.expanduser(given)
        names = _wnids(path) if os.path.isdir(path) else read_names(path)
    if folders and all(folder.isdecimal() for folder in folders):
        names = names or tuple(str(number) for number in range(len(folders)))
        if beyond := [folder for folder in folders if int(folder) >= len(names)]:
            raise ValueError(f"{os.path.join(top, beyond[0])}: there are {len(names)} classes, 0 ... {len(names) - 1}")
        return names, {folder: names[int(folder)] for folder in folders}
    wnids = _wnids(top) if folders else ()
    if not names and len(wnids) != 1000:
        raise ValueError(
            f"{top} has folders of {len(wnids)} classes, and labels must be those of ImageNet's 1000: give --classes the folder train of "
            "ImageNet, or a file with its 1000 wnids in sorted order, one a line"
        )
    if strange := sorted(set(wnids) - set(names or wnids)):
        raise ValueError(f"{os.path.join(top, strange[0])} is none of the {len(names)} classes of {given}")
    return names or wnids, {wnid: wnid for wnid in wnids}


def imagenet_test(root: str, classes: str | None = None) -> Contents:
    """ImageNet-V2, -A, -R and -Sketch: class folders by wnid or by number, as the split "test", labeled as ImageNet's classes.

    Args:
      classes: the folder train of ImageNet, or a file with the wnids of all classes in sorted order; where `root` has 1,000 class
        folders it is not needed.
    """
    names, folders = _classes(classes, folders_in(root), root)
    return Contents(modalities(), {"test": class_tasks(root, folders)}, names)


def imagenet_real(root: str, real: str, classes: str | None = None) -> Contents:
    """ImageNet's validation pictures, flat or in folders of their wnids, with ReaL's sets of labels; the split "val".

    A picture's label is that of its folder; pictures without folders have none. Sets: `maskvit.data.sources.TfdsSource.label_sets`.

    Args:
      real: real.json of google-research/reassessed-imagenet: a list of class numbers per picture, in the order of their file names.
      classes: as in `imagenet_test`.

    Raises FileNotFoundError where files are missing, ValueError for a file of another form or pictures that it does not know.
    """
    path = os.path.expanduser(real)
    sets = read_json(path)
    if not isinstance(sets, list) or any(not isinstance(one, list) or any(type(label) is not int for label in one) for one in sets):
        raise ValueError(f"{path} is no list of lists of class numbers")
    if folders_in(root):
        names, folders = _classes(classes, folders_in(root), root)
        tasks = class_tasks(root, folders)
    else:
        names = _classes(classes, (), root)[0] if classes else tuple(str(number) for number in range(1000))
        tasks = [Task(stem(file), {"rgb": file}) for file in pictures(root)]
    if beyond := [label for one in sets for label in one if not 0 <= label < len(names)]:
        raise ValueError(f"{path} has the class {beyond[0]}; there are {len(names)}, 0 ... {len(names) - 1}")
    labeled = []
    for task in tasks:
        name = task.key.split("/")[-1]
        number = int(name.rsplit("_", 1)[-1]) if VALIDATION.fullmatch(name) else 0
        if not 1 <= number <= len(sets):
            raise ValueError(f"{task.files['rgb']}: {path} has the pictures ILSVRC2012_val_00000001 ... {len(sets):08d}")
        labeled.append(dataclasses.replace(task, label_set=tuple(sets[number - 1])))
    return Contents(modalities(), {"val": labeled}, names)


def imagenet_c(
    root: str, classes: str | None = None, corruptions: Sequence[str] = (), severities: Sequence[int] = (1, 2, 3, 4, 5)
) -> Contents:
    """ImageNet-C, <root>/<corruption>/<severity>/<wnid>/*.JPEG: a split "<corruption>_<severity>" each.

    Args:
      corruptions: those to pack; all that are there by default.
      classes: as in `imagenet_test`.
    """
    chosen = tuple(corruptions) or tuple(folders_in(root))
    parts = [(corruption, severity) for corruption in chosen for severity in severities]
    if not parts:
        raise FileNotFoundError(f"{root} holds no folders: expected <corruption>/<severity>/<wnid>/*.JPEG")
    require(root, [f"{corruption}/{severity}/" for corruption, severity in parts], "<corruption>/<severity>/<wnid>/*.JPEG")
    tasks: dict[str, list[Task]] = {}
    names: tuple[str, ...] = ()
    for corruption, severity in parts:
        top = os.path.join(root, corruption, str(severity))
        names, folders = _classes(classes, folders_in(top), top)
        tasks[f"{corruption}_{severity}"] = class_tasks(top, folders)
    return Contents(modalities(), tasks, names)


def imagenet_9(root: str, variants: Sequence[str] = ()) -> Contents:
    """ImageNet-9 of the backgrounds challenge, <root>/<variant>/val/<number_class>/*.JPEG: a split per variant, nine classes.

    Args:
      variants: those to pack (original, mixed_same, mixed_rand, ...); all that are there by default.
    """
    there = [name for name in folders_in(root) if name != "fg_mask" and os.path.isdir(os.path.join(root, name, "val"))]
    chosen = tuple(variants) or tuple(there)  # fg_mask holds masks, no pictures
    require(root, [f"{variant}/val/" for variant in chosen] or ["original/val/"], "<variant>/val/<number_class>/*.JPEG")
    folders: Mapping[str, tuple[str, ...]] = {variant: tuple(folders_in(os.path.join(root, variant, "val"))) for variant in chosen}
    names = folders[chosen[0]]
    for variant, found in folders.items():
        if found != names or not names:
            listed = [", ".join(classes) or "none" for classes in (found, names)]
            raise ValueError(f"{root}/{variant}/val has the classes {listed[0]}; {chosen[0]} has {listed[1]}")
    tasks = {variant: class_tasks(os.path.join(root, variant, "val")) for variant in chosen}
    return Contents(modalities(), tasks, names)
