"""Rendered scenes as picture files for `python -m maskvit segment`: a few labeled by rough strokes, others with all of their labels.

    OUT/labeled/rgb/, OUT/labeled/semseg/    photos, and label maps in which strokes alone are labeled (255 elsewhere)
    OUT/new/, OUT/truth/                     other photos, and their whole label maps
    OUT/classes.txt                          the names of the classes: background, ground, solid
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from maskvit.core.arguments import make_folder, whole
from maskvit.data import scenes

NAMES = ("background", "ground", "solid")
NOT_LABELED = 255
STROKES, STEPS = 2, 24  # per class; steps of a stroke
REACH = 0.02  # length of a step and radius of the brush, over the side of the picture


def stroke(region: Bool[np.ndarray, "h w"], rng: np.random.Generator) -> Bool[np.ndarray, "h w"]:
    """Pixels of one stroke of a brush that wanders about inside `region`; none where it is too small for the brush."""
    from PIL import Image, ImageFilter

    reach = max(1.0, REACH * region.shape[0])
    margin = 2 * round(reach) + 1
    inside = np.asarray(Image.fromarray(region).convert("L").filter(ImageFilter.MinFilter(margin))) > 0
    drawn = np.zeros(region.shape, bool)
    starts = np.argwhere(inside)
    if not len(starts):
        return drawn
    place, heading = starts[rng.integers(len(starts))].astype(float), rng.uniform(0, 2 * np.pi)
    rows, columns = np.indices(region.shape)
    for _ in range(STEPS):
        drawn |= (rows - place[0]) ** 2 + (columns - place[1]) ** 2 <= reach**2
        heading += rng.normal(0, 0.5)
        there = place + reach * np.array([np.sin(heading), np.cos(heading)])
        row, column = np.round(there).astype(int)
        if 0 <= row < region.shape[0] and 0 <= column < region.shape[1] and inside[row, column]:
            place = there
        else:
            heading += np.pi / 2
    return drawn & region


def strokes(ids: UInt8[np.ndarray, "h w"], seed: int) -> UInt8[np.ndarray, "h w"]:
    """`STROKES` strokes in each class of a label map; all other pixels are not labeled."""
    labels = np.full(ids.shape, NOT_LABELED, np.uint8)
    rng = np.random.default_rng(seed)
    for number in [*range(len(NAMES))] * STROKES:
        labels[stroke(ids == number, rng)] = number
    return labels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--out", required=True, type=Path, help="folder to write to: a new one, or an empty one")
    parser.add_argument("--labeled", type=whole(), default=9, help="scenes that are labeled by strokes (9)")
    parser.add_argument("--new", type=whole(), default=24, help="other scenes (24)")
    parser.add_argument("--size", type=whole(8), default=128, help="pixels per side (128)")
    parser.add_argument("--seed", type=whole(0), default=1, help="which scenes (1; the shipped checkpoint learned from scenes of 0)")


def run(out: Path, labeled: int, new: int, size: int, seed: int) -> int:
    """The command."""
    from PIL import Image

    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"--out is {str(out)!r}, which is there already: give a new folder")
    make_folder(out)
    for number in range(labeled + new):
        sample = scenes.render(seed, number, (size, size))
        ids = np.minimum(sample["semseg"], len(NAMES) - 1)
        folders = ("labeled/rgb", "labeled/semseg") if number < labeled else ("new", "truth")
        for folder, array in zip(folders, (sample["rgb"], strokes(ids, number) if number < labeled else ids), strict=True):
            (out / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(out / folder / f"{number:03d}.png")
    (out / "classes.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    print(f"{labeled} labeled scenes and {new} others in {out}")
    return 0
