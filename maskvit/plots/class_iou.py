"""The intersection over union of every class as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

MOST_CLASSES = 200  # beyond that nobody reads them
ROWS = 50  # classes below each other


def class_iou_picture(iou: Float[np.ndarray, " k"], labeled: Int[np.ndarray, " k"], names: Sequence[str]) -> UInt8[np.ndarray, "h w 3"]:
    """A bar per class, the best first, with its share of the labeled pixels.

    `iou` in percent, NaN for a class that is neither there nor predicted: these are left out and counted in the title. `labeled`: pixels
    of each class.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    there = np.flatnonzero(~np.isnan(iou))
    order = there[np.argsort(-iou[there], kind="stable")]
    columns = max(-(-len(order) // ROWS), 1)
    tall = min(len(order), ROWS)
    share = 100.0 * labeled / max(int(labeled.sum()), 1)
    figure = Figure(figsize=(5.2 * columns, 1.2 + 0.2 * max(tall, 2)), layout="constrained")
    for axes, part in zip(figure.subplots(1, columns, squeeze=False)[0], np.array_split(order, columns), strict=True):
        places = np.arange(len(part))
        axes.barh(places, iou[part], color="#3b6fb6", height=0.7)
        for place, number in zip(places, part, strict=True):
            axes.text(iou[number] + 1, place, f"{iou[number]:.1f}", va="center", fontsize=7)
        axes.set_yticks(places, [f"{names[number][:24]} ({share[number]:.2g} %)" for number in part], fontsize=7)
        axes.set_ylim(max(tall, 2) - 0.5, -0.5)
        axes.set_xlim(0, 108)
        axes.set_xlabel("IoU in percent; in brackets the share of the pixels", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    mean = f"mean {iou[there].mean():.1f}" if len(there) else "no labeled pixels"
    absent = f"; {len(iou) - len(there)} of {len(iou)} classes nowhere" if len(there) < len(iou) else ""
    figure.suptitle(f"IoU by class: {mean}{absent}", fontsize=9, x=0.01, ha="left")
    FigureCanvasAgg(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return np.asarray(Image.open(stream).convert("RGB"))
