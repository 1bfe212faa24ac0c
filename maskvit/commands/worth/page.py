"""The page of `python -m maskvit worth`: the result in its first sentence, and what it rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from maskvit.commands.report.compare import Run
from maskvit.commands.sweep.table import Difference, paired, spread
from maskvit.commands.worth.judged import Example, Judged
from maskvit.core.modalities import Modality
from maskvit.plots import confusion, curves, page, panels
from maskvit.plots.answers import class_overlay
from maskvit.plots.pictures import png_bytes, to_picture

SCRATCH, IMPORTED, CONTINUED = "scratch", "imported", "continued"
NAMES = {SCRATCH: "from scratch", IMPORTED: "the imported checkpoint", CONTINUED: "the continued checkpoint"}
PAIRS = ((CONTINUED, IMPORTED), (CONTINUED, SCRATCH), (IMPORTED, SCRATCH))
# Figures in percent, by their last part: differences of these are points.
PERCENT = (
    "top1", "top5", "mean_class", "real", "mean_iou", "mean_accuracy", "pixel_accuracy", "macro_jaccard", "delta_1", "delta_2", "delta_3",
)  # fmt: skip


class Figures(NamedTuple):
    """The figure that runs are judged by, {cell: {seed: its last value}}; `rising`: whether more is better; `steps`: of every run."""

    name: str
    rising: bool
    values: Mapping[str, Mapping[int, float]]
    steps: int

    @property
    def unit(self) -> str:
        """Of a difference."""
        return " points" if self.name.rpartition("/")[2] in PERCENT else ""


def sentence(figures: Figures) -> str:
    """Whether continuing was worth it."""
    found = paired(figures.values[CONTINUED], figures.values[IMPORTED])
    seeds = f"{found.pairs} seed{'s' if found.pairs != 1 else ''}"
    if not found.pairs:
        return "There is nothing to compare: no seed has a finished run from the imported and from the continued checkpoint."
    size = f"{_signed(found.difference)}{figures.unit}"
    if not figures.rising:
        text = f"Continuing pretraining changed {figures.name}, of which less is better, by {size} against the imported checkpoint"
    elif size.startswith(("+0.00", "-0.00")):
        text = f"Continuing pretraining changed {figures.name} by 0.00{figures.unit} against the imported checkpoint"
    elif found.difference > 0:
        text = f"Continuing pretraining added {size} of {figures.name} over the imported checkpoint"
    else:
        text = f"Continuing pretraining cost {size[1:]} of {figures.name} against the imported checkpoint"
    if found.told is None:
        return f"{text} ({seeds}, no interval): one pair of runs cannot be told from chance."
    return f"{text} ({seeds}, 95 % interval {_signed(found.low)} ... {_signed(found.high)}): {_told(found)}."


def _told(found: Difference) -> str:
    return {True: "told from zero", False: "not told from zero", None: "-"}[found.told]


def _signed(value: float) -> str:
    return f"{value:+.2f}" if abs(value) < 10 else f"{value:+.1f}"


def result_section(figures: Figures, failed: Sequence[str]) -> page.Section:
    """Both tables: the runs, and their differences."""
    rows = []
    for cell, values in figures.values.items():
        mean, deviation, count = spread(list(values.values()))
        each = ", ".join(f"{value:.2f}" for value in values.values())
        rows.append([NAMES[cell], f"{mean:.2f}", f"{deviation:.2f}" if math.isfinite(deviation) else "-", str(count), each])
    compared = []
    for one, other in PAIRS:
        found = paired(figures.values[one], figures.values[other])
        interval = f"{_signed(found.low)} ... {_signed(found.high)}" if math.isfinite(found.low) else "-"
        least = f"{found.least:.2f}" if math.isfinite(found.least) else "-"
        compared.append([f"{one} minus {other}", _signed(found.difference) if found.pairs else "-", interval, _told(found), least])
    words = (
        f"All runs have {figures.steps:,} steps on the same labels, and the runs of one seed see the same batches and begin with the same "
        "head. The value is that of the last evaluation, not of the best one. Difference: mean over seeds, run by run, with Student's "
        "95 % interval; of twenty comparisons of equal checkpoints, one is told from zero by chance. Detectable: the true difference "
        "that runs as noisy as these would tell from zero four times in five."
    )
    blocks: list[Any] = [
        page.Table(("begins with", figures.name, "spread", "seeds", "each"), rows),
        page.Table(("difference", "mean", "95 % interval", "", "detectable"), compared),
        page.Prose(words),
    ]
    if failed:
        blocks.append(page.Prose(f"Lost their loss (not finite) and stopped: {', '.join(failed)}."))
    return page.Section("Result", blocks)


def curve_section(figures: Figures, runs: Mapping[str, Sequence[Run]]) -> page.Section:
    """The figure and the loss over epochs."""
    drawn: dict[str, dict[str, Any]] = {}
    for name in (figures.name, "loss"):
        series = {cell: [run.curves[name] for run in some if name in run.curves] for cell, some in runs.items()}
        drawn[name] = {cell: some for cell, some in series.items() if some}
    picture = curves.line_panels({name: series for name, series in drawn.items() if series})
    words = f"{figures.name} and the training loss over epochs; single seeds faint, their mean strong."
    return page.Section("Learning curves", [page.Figure(picture, words)])


# Classes


def class_scores(matrix: Int[np.ndarray, "k k"], of_pixels: bool) -> Float[np.ndarray, " k"]:
    """Percent right of each class, or of pixels their intersection over union; NaN for a class that is not there."""
    right, true, given = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    whole = true + given - right if of_pixels else true
    return 100.0 * np.divide(right, whole, out=np.full(len(right), np.nan), where=true > 0)


def class_section(judged: Mapping[str, Sequence[Judged]], names: Sequence[str], of_pixels: bool) -> page.Section:
    """Each class by what runs begin with, those that continuing changed most first; of pictures the confusion matrices."""
    scores = {cell: np.stack([class_scores(one.matrix, of_pixels) for one in some]).mean(axis=0) for cell, some in judged.items()}
    gain = scores[CONTINUED] - scores[IMPORTED]
    counts = next(iter(judged.values()))[0].matrix.sum(axis=1)
    header = ["class", "labeled pixels" if of_pixels else "pictures", *scores, "continued minus imported"]
    order = [int(i) for i in np.argsort(-np.abs(np.nan_to_num(gain)), kind="stable") if counts[i]]
    rows = [[names[i], int(counts[i]), *(f"{score[i]:.1f}" for score in scores.values()), f"{gain[i]:+.1f}"] for i in order[:60]]
    what = "intersection over union" if of_pixels else "share of the pictures of a class that is right"
    words = (
        f"The {what}, percent, mean over seeds. A class has few pictures, and the largest of many differences is large by chance alone: "
        "look here for what to check next, not for a result."
    )
    blocks: list[Any] = [page.Table(header, rows), page.Prose(words)]
    if not of_pixels and len(names) <= confusion.MOST_CLASSES:
        for cell in (IMPORTED, CONTINUED):
            summed = np.sum([one.matrix for one in judged[cell]], axis=0)
            figure = png_bytes(confusion.confusion_picture(summed, names))
            blocks.append(page.Figure(figure, f"Confusion matrix, all seeds together, of the runs that begin with {NAMES[cell]}."))
    return page.Section("By class", blocks)


# Examples


def example_section(
    gained: Sequence[Example], lost: Sequence[Example], counts: tuple[int, int], seed: int, names: Sequence[str], spec: Modality,
    of_pixels: bool,
) -> page.Section:  # fmt: skip
    """Pictures on which the imported and the continued checkpoint lead to other answers. `counts`: of all that are better and worse."""
    what = "have more right pixels" if of_pixels else "are right"
    words = (
        f"Seed {seed} alone. With the continued checkpoint {counts[0]} pictures {what} where they are {'fewer' if of_pixels else 'wrong'} "
        f"with the imported one; the other way round it is {counts[1]}."
    )
    blocks: list[Any] = [page.Prose(words)]
    for some, heading in ((gained, "better"), (lost, "worse")):
        if some and of_pixels:
            blocks += [page.Figure(_maps(one, spec, len(names)), f"Example {one.number}: {heading} when continued.") for one in some]
        elif some:
            tiles = [(_label(one, names), to_picture(spec, one.picture)) for one in some]
            caption = f"{heading.capitalize()} when continued. Above each: its class, then the answers, imported > continued."
            blocks.append(page.Figure(panels.tile_grid(tiles, 4), caption))
    return page.Section("Examples that differ", blocks)


def _label(one: Example, names: Sequence[str]) -> str:
    truth, before, after = (names[int(number)][:9] for number in (one.truth, one.answers[IMPORTED], one.answers[CONTINUED]))
    return f"{truth}: {before} > {after}"


def _maps(one: Example, spec: Modality, num_classes: int) -> bytes:
    picture = to_picture(spec, one.picture)
    ids = {"labels": one.truth, **one.answers}
    tiles = [(picture, "")]
    for values in ids.values():
        shown = class_overlay(picture, np.maximum(_fitted(values, picture.shape[:2]), 0), num_classes)
        tiles.append((np.where(_fitted(values, picture.shape[:2])[..., None] >= 0, shown, picture), ""))
    return panels.labeled_grid((spec.name, *ids), [("", tiles)], side=180)


def _fitted(ids: Int[np.ndarray, "u v"], size: tuple[int, int]) -> Int[np.ndarray, "h w"]:
    rows, columns = (np.arange(new) * old // new for old, new in zip(ids.shape, size, strict=True))
    return ids[np.ix_(rows, columns)]


def worth_page(figures: Figures, sections: Sequence[page.Section], about: Mapping[str, Any], command: str) -> str:
    """The page."""
    facts: list[Any] = [page.Table(("", "value"), [(key, str(value)) for key, value in about.items()]), page.Commands(command)]
    return page.html_page("Was it worth it?", [*sections, page.Section("How", facts)], sentence(figures))
