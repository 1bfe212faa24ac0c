"""The demo's page: first what happened and what became better or worse, then the figures and pictures behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from maskvit.plots import curves, page


class Change(NamedTuple):
    """A figure before and after; `higher`: whether more of it is better."""

    name: str
    before: float
    after: float
    higher: bool

    @property
    def verdict(self) -> str:
        """"better", "worse", or "same" where the page shows the same digits."""
        if f"{self.before:.4g}" == f"{self.after:.4g}":
            return "same"
        return "better" if (self.after > self.before) == self.higher else "worse"


class Story(NamedTuple):
    """What the page tells.

    `losses`: held-out loss of each output before and after; `without_eyes`: that of a mean patch, by output; `frozen`: figures of frozen
    features before and after; `references`: figures of raw pixels and mean color, which no training changes; `tasks`: figures of the
    fine-tuned models, before: from random initialization, after: from the continued checkpoint; `pictures`: PNGs by name; `rows`: of
    the continuation's metrics.jsonl; `settings`: (what, value); `times`: (part, seconds).
    """

    losses: Sequence[Change]
    without_eyes: Mapping[str, float]
    frozen: Sequence[Change]
    references: Mapping[str, float]
    tasks: Sequence[Change]
    pictures: Mapping[str, bytes]
    rows: Sequence[Mapping[str, Any]]
    settings: Sequence[tuple[str, str]]
    times: Sequence[tuple[str, float]]


def counted(changes: Sequence[Change], noun: str) -> str:
    """"3 of 4 losses became better, 1 worse (semseg 1.118 to 1.12)": those that did not become better are named with their values."""
    better = [change for change in changes if change.verdict == "better"]
    words = f"{len(better)} of {len(changes)} {noun} became better"
    for verdict in ("worse", "same"):
        if named := [f"{c.name} {c.before:.4g} to {c.after:.4g}" for c in changes if c.verdict == verdict]:
            words += f", {len(named)} {'worse' if verdict == 'worse' else 'stayed the same'} ({', '.join(named)})"
    return words


def summary(story: Story) -> str:
    """Two sentences: what happened to the continued model, and to the models fine-tuned from it."""
    steps = max(row["step"] for row in story.rows)
    first = (
        f"A small MultiMAE was imported from a PyTorch checkpoint and trained for {steps} more steps with attention-guided masks: "
        f"{counted(story.losses, 'held-out reconstruction losses')}; {counted(story.frozen, 'figures of frozen features')}."
    )
    first_task = story.tasks[0]
    return (
        f"{first} Fine-tuned with few labels and compared with the same training from random initialization, "
        f"{counted(story.tasks, 'figures')}: {first_task.name} {first_task.after:.4g} against {first_task.before:.4g}."
    )


def lines(story: Story) -> list[str]:
    """A line for every figure, for a terminal."""
    return [f"{c.verdict:6s}  {c.name}: {c.before:.4g} -> {c.after:.4g}" for c in (*story.losses, *story.frozen, *story.tasks)]


def _rows(changes: Sequence[Change]) -> list[tuple[Any, ...]]:
    return [(c.name, "higher" if c.higher else "lower", c.before, c.after, c.verdict) for c in changes]


def build(story: Story) -> str:
    """The page."""
    P, T, F, C, S = page.Prose, page.Table, page.Figure, page.Commands, page.Section
    training = [row for row in story.rows if "loss" in row]
    names = [name for name in training[0] if name.startswith("loss")] + ["learning_rate", "grad_norm", "images_per_second"]
    steps = [row["step"] for row in training]
    series = {name: (steps, [row.get(name, float("nan")) for row in training]) for name in names}
    speed = np.median([row["images_per_second"] for row in training if "images_per_second" in row])
    blind = []
    for change in story.losses:
        least = story.without_eyes[change.name.removeprefix("loss of ")]
        blind.append((change.name.removeprefix("loss of "), change.after, least, "better" if change.after < least else "worse"))
    head = ("figure", "better is", "imported", "continued", "it became")
    return page.html_page(
        "maskvit: attention-guided masking, from a PyTorch checkpoint",
        [
            S("What became better, what worse", [
                P("Losses are on hidden tokens of held-out scenes, at fixed masks: those that the imported checkpoint's attention asks "
                  "for. Frozen features are read from the photo alone; they tell which of 12 kinds the nearest object is."),
                T(head, [*_rows(story.losses), *_rows(story.frozen)]),
                P("Raw pixels, which no training changes: " + ", ".join(f"{k} {v:.4g}" for k, v in story.references.items()) + "."),
                P("Fine-tuned from the photo alone, with few labels:"),
                T(("figure", "better is", "from random initialization", "from the continued checkpoint", "pretraining made it"),
                  _rows(story.tasks)),
            ]),
            S("What the model hides and rebuilds", [
                F(story.pictures["continued"], "The continued model: input, attention, what stays visible, reconstruction."),
                F(story.pictures["imported"], "The same scenes and masks, the imported checkpoint."),
                P("The least that a reconstruction must beat is a mean patch: the training set's mean at every place, for the semantic "
                  "map the frequency of each class there, for normalized patches each patch's own mean."),
                T(("output", "continued", "mean patch", "the model is"), blind),
            ]),
            S("What fine-tuned models answer", [
                F(story.pictures["answers"], "Held-out scenes, each answered from the photo alone: classes of pixels, below them the kind "
                  "of the nearest object, and depth."),
            ]),
            S("Training", [
                F(curves.curves(series), "Losses on hidden tokens, learning rate, gradient norm and speed over steps of the continuation."),
                P("Losses of training are at the masks of the moment, which change with the model: compare the held-out ones above."),
            ]),
            S("How it was made", [
                P("Before each step one forward pass over all tokens, without gradients, says which tokens the model attends to most; "
                  "those are hidden, and the model rebuilds them from what is left."),
                C("python -m maskvit demo"),
                T(("setting", "value"), story.settings),
                T(("part", "seconds"), [(name, round(seconds, 1)) for name, seconds in story.times]),
                P(f"The continuation ran at {speed:.0f} images per second (median of its log intervals), guidance pass included."),
            ]),
        ],
        summary=summary(story),
    )  # fmt: skip
