"""A segmenter from a few labeled photos: a linear probe on the frozen patch features of a checkpoint.

    python -m maskvit segment --checkpoint C --labeled DIR --images NEW --out OUT [--classes FILE] [--truth DIR] [--size 448]

DIR/rgb/ holds photos, DIR/semseg/ a label map of the same name for each: a PNG of class ids in one channel, of the photo's size, 255 where
a pixel is not labeled. Rough strokes are enough. OUT then holds `index.html`, a page of the results, and
    ids/FILE.png       the class of every pixel of each photo in NEW, at its own size
    overlays/FILE.png  the same in colors over the photo
    classes.csv        id, name and color of every class
    probe.npz          `kernel` "d k" and `bias` "k": scores of classes are features @ kernel + bias; `classes`, their names
    about.json         how all this was made, and the figures

The regularization is chosen by leaving out one labeled photo at a time. The same probe on a randomly initialized encoder and on raw
pixels shows what the checkpoint adds; with --truth, label maps of the photos in NEW, on these photos too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from maskvit.commands.predict import Answer, write_class_list, write_map
from maskvit.commands.segment.page import Findings, Shown, segment_page, summary
from maskvit.commands.segment.photos import (
    Labeled,
    check_enough,
    class_map,
    class_names,
    confusion,
    enlarged,
    find_pairs,
    label_counts,
    read_labeled,
)
from maskvit.commands.segment.probe import CHECKPOINT, STRENGTHS, Encoder, Probe, encoders, fit_probe, mean_iou, see
from maskvit.core.arguments import make_folder, whole
from maskvit.core.errors import add_debug, run_command
from maskvit.core.modalities import Modality
from maskvit.features import LoadedModel, first_input, load, readable, tell_left_out

ON_PAGE = 12  # photos of each kind on the page


def segment(
    checkpoint: str, labeled: Path, images: Path, out: Path, classes: Path | None = None, truth: Path | None = None, size: int | None = None
) -> int:
    """Do what the flags say; the exit status."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"--out is {str(out)!r}, which is there already: give a new folder")
    known = class_names([], classes) if classes else ()
    photos = read_labeled(find_pairs(labeled / "rgb", labeled / "semseg"), known, str(classes))
    names = class_names(photos, classes)
    warnings = check_enough(photos, names, labeled)
    paths, left_out = readable(images)
    true = {one.photo: one for one in read_labeled(find_pairs(images, truth), names, str(classes or labeled))} if truth else {}
    loaded = load(checkpoint)
    sides = _sides(loaded, size)
    make_folder(out)
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr)
    functions = encoders(loaded)
    probes, pictures = _learn(loaded, functions, photos, sides, len(names))
    _tell(probes)

    spec = Modality("class", kind="categorical", num_classes=len(names), patch=1, loss="cross_entropy", missing=255)
    chosen = functions if truth else {CHECKPOINT: functions[CHECKPOINT]}
    tested, shown, count = _answer(loaded, chosen, probes, paths, images, true, sides, spec, out, left_out)
    if not count:
        raise ValueError(f"none of the photos below {images} can be read; the first: {next(iter(left_out.values()))}")
    found = Findings(probes, tested, count, warnings)
    about: dict[str, Any] = dict(
        checkpoint=str(checkpoint), labeled=str(labeled), images=str(images), photo_size=list(sides),
        patches=list(first_input(loaded.model).grid(sides)), c=probes[CHECKPOINT].best,
        mean_iou_left_out={name: mean_iou(probe.matrix) for name, probe in probes.items()},
        mean_iou_new={name: mean_iou(matrix) for name, matrix in tested.items()},
    )  # fmt: skip
    _write(out, names, probes[CHECKPOINT], about)
    text = segment_page(found, shown, pictures, photos, names, spec, first_input(loaded.model), about)
    (out / "index.html").write_text(text, encoding="utf-8")
    print(summary(found, photos, names))
    print(f"{count} photo(s) segmented: open {out / 'index.html'}")
    return tell_left_out(left_out)


def _sides(loaded: LoadedModel, size: int | None) -> tuple[int, int]:
    """The (height, width) that photos are squeezed to. Raises ValueError where it does not divide into patches."""
    patch = first_input(loaded.model).patch_pixels
    if size is not None and size % patch:
        raise ValueError(f"--size is {size}, but patches of this checkpoint have {patch} x {patch} pixels: give a multiple of {patch}")
    return loaded.model.image_size if size is None else (size, size)


def _learn(
    loaded: LoadedModel, functions: dict[str, Encoder], photos: Sequence[Labeled], sides: tuple[int, int], num_classes: int
) -> tuple[dict[str, Probe], list[np.ndarray]]:
    """The probes by encoder, and the first labeled photos, stored values at their own size."""
    from tqdm import tqdm

    left_out: dict[Path, str] = {}
    features: dict[str, list[np.ndarray]] = {name: [] for name in functions}
    pictures: list[np.ndarray] = []
    for one in see(loaded, functions, [photo.photo for photo in photos], sides, left_out):
        for name, values in one.features.items():
            features[name].append(values)
        if len(pictures) < ON_PAGE:
            pictures.append(one.picture)
    for path, reason in left_out.items():
        raise ValueError(f"{path}: {reason}")
    counts = [label_counts(photo.ids, sides, num_classes) for photo in photos]
    patch = first_input(loaded.model).patch_pixels
    with tqdm(total=len(features) * len(STRENGTHS) * len(photos), desc="fit", unit="probe", disable=None) as bar:
        return {name: fit_probe(values, counts, patch, bar.update) for name, values in features.items()}, pictures


def _tell(probes: dict[str, Probe]) -> None:
    """Print the score of every strength."""
    print("mean IoU on labeled photos left out, by C (the best is used):")
    print("  " + "C".rjust(8) + "".join(f"  {name:>{max(len(name), 10)}}" for name in probes))
    for strength in probes[CHECKPOINT].tried:
        cells = (f"{probe.tried[strength]:.1f}{'*' if strength == probe.best else ' '}" for probe in probes.values())
        print(f"  {strength:>8g}" + "".join(f"  {cell:>{max(len(name), 10)}}" for name, cell in zip(probes, cells, strict=True)))


def _answer(
    loaded: LoadedModel, functions: dict[str, Encoder], probes: dict[str, Probe], paths: Sequence[Path], root: Path,
    true: dict[Path, Labeled], sides: tuple[int, int], spec: Modality, out: Path, left_out: dict[Path, str],
) -> tuple[dict[str, Int[np.ndarray, "k k"]], list[Shown], int]:  # fmt: skip
    """Write the maps of new photos. Returns the confusion matrices by encoder, the first photos for the page, and how many there are."""
    from tqdm import tqdm

    shown_spec = first_input(loaded.model)
    grid = shown_spec.grid(sides)
    tested = {name: np.zeros((spec.num_classes,) * 2, np.int64) for name in functions} if true else {}
    shown: list[Shown] = []
    count = 0
    with tqdm(total=len(paths), desc="segment", unit="photo", disable=None) as bar:
        for one in see(loaded, functions, paths, sides, left_out):
            path, size = paths[one.place], one.picture.shape[:2]
            maps = {name: class_map(probes[name].weights.scores(values), grid, sides) for name, values in one.features.items()}
            ids, labels = enlarged(maps[CHECKPOINT], size), true[path].ids if true else None
            if labels is not None:
                counts = label_counts(labels, sides, spec.num_classes)
                for name, predicted in maps.items():
                    tested[name] += confusion(predicted, counts)
            name = path.relative_to(root).as_posix()
            write_map(out, name, Answer(one.place, one.picture, ids), spec, shown_spec)
            if len(shown) < ON_PAGE:
                shown.append(Shown(name, one.picture, ids, labels))
            count += 1
            bar.update()
    return tested, shown, count


def _write(out: Path, names: Sequence[str], probe: Probe, about: dict[str, Any]) -> None:
    """classes.csv, about.json and probe.npz."""
    write_class_list(out, names)
    text = json.dumps(about, indent=2)
    (out / "about.json").write_text(text + "\n", encoding="utf-8")
    with open(out / "probe.npz.partial", "wb") as file:
        np.savez(file, kernel=probe.weights.kernel, bias=probe.weights.bias, classes=np.array(names, dtype=str), about=np.array(text))
    os.replace(out / "probe.npz.partial", out / "probe.npz")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 1 where a photo was left out, 2 where nothing could be done."""
    parser = argparse.ArgumentParser(
        prog="python -m maskvit segment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a run's workdir, its checkpoints directory, or one step's directory")
    parser.add_argument("--labeled", required=True, type=Path, help="folder with rgb/ (photos) and semseg/ (their label maps)")
    parser.add_argument("--images", required=True, type=Path, help="folder of photos to segment; those in folders below it count too")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to: a new one, or an empty one")
    parser.add_argument("--classes", type=Path, default=None, help="file with the names of the classes 0, 1, ..., one a line")
    parser.add_argument("--truth", type=Path, default=None, help="folder of label maps of the photos in --images, to measure with")
    parser.add_argument("--size", type=whole(), default=None, help="side that photos are squeezed to; more sees finer (the checkpoint's)")
    add_debug(parser)
    arguments = vars(parser.parse_args(argv))
    debug = arguments.pop("debug")
    return run_command(lambda: segment(**arguments), debug)


if __name__ == "__main__":
    sys.exit(main())
