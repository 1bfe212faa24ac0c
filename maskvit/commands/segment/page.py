"""The page of `python -m maskvit segment`: class maps of new photos, and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped, UInt8

from maskvit.commands.segment.photos import NOT_LABELED, Labeled, enlarged, photos_by_class
from maskvit.commands.segment.probe import CHECKPOINT, Probe, ious, mean_iou
from maskvit.core.modalities import Modality
from maskvit.plots import page, panels
from maskvit.plots.answers import class_overlay, legend
from maskvit.plots.pictures import Picture, palette, to_picture

SIDE = 200  # height of a picture on the page, pixels


class Shown(NamedTuple):
    """A new photo on the page: stored values at its own size, the class of every pixel, and its true classes where they are known."""

    name: str
    picture: Shaped[np.ndarray, "h w c"]
    ids: Int[np.ndarray, "h w"]
    truth: UInt8[np.ndarray, "h w"] | None


class Findings(NamedTuple):
    """All that was found: probes by encoder, the confusion matrix of each on new photos ({} without their true classes), and warnings."""

    probes: Mapping[str, Probe]
    tested: Mapping[str, Int[np.ndarray, "k k"]]
    new_photos: int
    warnings: Sequence[str]


def summary(found: Findings, labeled: Sequence[Labeled], names: Sequence[str]) -> str:
    """The result in two sentences."""
    probe = found.probes[CHECKPOINT]
    classes = int((probe.patches > 0).sum())
    text = f"A linear probe learned {classes} classes from {int(probe.patches.sum())} labeled patches of {len(labeled)} photos. "
    figures = {name: mean_iou(matrix) for name, matrix in found.tested.items()}
    where = f"On {found.new_photos} new photos"
    if not figures:
        figures = {name: mean_iou(one.matrix) for name, one in found.probes.items()}
        where = "On labeled photos that it did not learn from"
    others = " and ".join(f"{figures[name]:.1f} with {_article(name)}" for name in figures if name != CHECKPOINT)
    return f"{text}{where} its mean IoU is {figures[CHECKPOINT]:.1f}; the same probe reaches {others}."


def _article(name: str) -> str:
    return f"a {name}" if name.endswith("encoder") else name


def labels_over(picture: Picture, ids: UInt8[np.ndarray, "h w"], num_classes: int) -> Picture:
    """The labels in their colors over the photo; pixels without a label stay as they are."""
    known = ids != NOT_LABELED
    return np.where(known[..., None], class_overlay(picture, np.where(known, ids, 0), num_classes), picture)


def new_sections(shown: Sequence[Shown], names: Sequence[str], classes: Modality, spec: Modality) -> list[page.Section]:
    """The first new photos beside their class maps, under one legend."""
    colors = palette(len(names))
    blocks: list[Any] = [page.Figure(legend([*zip(names, colors, strict=True)]), "The color of each class.")]
    for one in shown:
        picture = to_picture(spec, one.picture)
        tiles = {"photo": picture, "classes over it": class_overlay(picture, one.ids, len(names)), "classes": to_picture(classes, one.ids)}
        if one.truth is not None:
            tiles["labels"] = to_picture(classes, one.truth)
        found, counts = np.unique(one.ids, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:8]
        caption = f"{one.name}: " + ", ".join(f"{names[found[i]]} {counts[i] / one.ids.size:.0%}" for i in order)
        figure = panels.labeled_grid(tuple(tiles), [("", [(tile, "") for tile in tiles.values()])], side=SIDE)
        blocks.append(page.Figure(figure, caption))
    return [page.Section("New photos", blocks)]


def comparison(found: Findings) -> page.Section:
    """The three encoders side by side."""
    header = ["features", "C", "mean IoU, photos left out", *(["mean IoU, new photos"] if found.tested else [])]
    rows = []
    for name, probe in found.probes.items():
        row = [name, f"{probe.best:g}", f"{mean_iou(probe.matrix):.1f}"]
        rows.append([*row, *([f"{mean_iou(found.tested[name]):.1f}"] if found.tested else [])])
    words = (
        "The same probe on three kinds of features. What the checkpoint adds is its distance from the other two: a randomly initialized "
        "encoder has seen no picture, and raw pixels know color and texture of a patch alone. Photos left out: each labeled photo is "
        "predicted by a probe of all others, and all labeled pixels are counted together. C is chosen by that figure, which is "
        "therefore a little too good. Where strokes alone are labeled, borders between classes are not counted: whole photos score less."
    )
    return page.Section("What the checkpoint adds", [page.Table(header, rows), page.Prose(words)])


def class_section(found: Findings, labeled: Sequence[Labeled], names: Sequence[str]) -> page.Section:
    """IoU by class."""
    probe = found.probes[CHECKPOINT]
    columns: list[Sequence[Any]] = [names, photos_by_class(labeled, len(names)).tolist(), probe.patches.tolist()]
    columns.append([_percent(value) for value in ious(probe.matrix)])
    header = ["class", "labeled photos", "labeled patches", "IoU, photos left out"]
    if found.tested:
        columns.append([_percent(value) for value in ious(found.tested[CHECKPOINT])])
        header.append("IoU, new photos")
    blocks: list[Any] = [page.Table(header, list(zip(*columns, strict=True)))]
    if found.warnings:
        blocks.append(page.Prose(". ".join(text[0].upper() + text[1:] for text in found.warnings) + "."))
    return page.Section("By class", blocks)


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.1f}"


def strength_section(found: Findings) -> page.Section:
    """The score of every strength of regularization."""
    strengths = found.probes[CHECKPOINT].tried
    rows = [[f"{strength:g}", *(f"{probe.tried[strength]:.1f}" for probe in found.probes.values())] for strength in strengths]
    words = "Mean IoU on photos left out, for every C: the weight of the labels against small weights. The best C of a column is used."
    return page.Section("Regularization", [page.Table(("C", *found.probes), rows), page.Prose(words)])


def labeled_section(
    pictures: Sequence[Shaped[np.ndarray, "_ _ c"]], labeled: Sequence[Labeled], probe: Probe, num_classes: int, spec: Modality
) -> page.Section:
    """The first labeled photos with their labels, and what a probe of the others makes of them."""
    blocks = []
    for stored, one, ids in zip(pictures, labeled, probe.maps, strict=False):
        picture = to_picture(spec, stored)
        tiles = {
            "your labels": labels_over(picture, one.ids, num_classes),
            "by the other photos": class_overlay(picture, enlarged(ids, one.size), num_classes),
        }
        figure = panels.labeled_grid(tuple(tiles), [("", [(tile, "") for tile in tiles.values()])], side=SIDE)
        caption = f"{one.name}: your labels, and the classes by a probe that did not learn from this photo."
        blocks.append(page.Figure(figure, caption))
    return page.Section("Labeled photos", blocks)


def segment_page(
    found: Findings, shown: Sequence[Shown], pictures: Sequence[Shaped[np.ndarray, "_ _ c"]], labeled: Sequence[Labeled],
    names: Sequence[str], classes: Modality, spec: Modality, about: Mapping[str, Any],
) -> str:  # fmt: skip
    """The page. `pictures`: the first labeled photos, stored values at their own size."""
    sections = [
        *new_sections(shown, names, classes, spec),
        comparison(found),
        class_section(found, labeled, names),
        labeled_section(pictures, labeled, found.probes[CHECKPOINT], len(names), spec),
        strength_section(found),
        page.Section("How", [page.Table(("", "value"), [(key, str(value)) for key, value in about.items()])]),
    ]
    return page.html_page("Photos segmented", sections, summary(found, labeled, names))
