"""A confusion matrix as a picture: rows are what pictures are, columns what they were taken for."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8

MOST_CLASSES = 60  # beyond that nobody can read the names


def confusion_picture(counts: Int[np.ndarray, "k k"], names: Sequence[str]) -> UInt8[np.ndarray, "h w 3"]:
    """Percent of each row as shade, with numbers where there are few classes. Rows without pictures stay empty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    classes = len(counts)
    samples = counts.sum(axis=1, keepdims=True)
    share = 100.0 * counts / np.maximum(samples, 1)
    side = min(14.0, 3.0 + 0.42 * classes)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="cividis", vmin=0, vmax=100)
    axes.set_xticks(range(classes), names, rotation=90, fontsize=8)
    axes.set_yticks(range(classes), [f"{name} ({n})" for name, n in zip(names, samples[:, 0], strict=True)], fontsize=8)
    axes.set_xlabel("taken for")
    axes.set_ylabel("is (number of pictures)")
    right = int(np.trace(counts))
    axes.set_title(f"{right} of {int(samples.sum())} right", loc="left", fontsize=11)
    figure.colorbar(image, ax=axes, label="percent of the row", shrink=0.7)
    if classes <= 20:
        for row in range(classes):
            for column in range(classes):
                if counts[row, column]:
                    color = "black" if share[row, column] > 55 else "white"
                    axes.text(column, row, f"{share[row, column]:.0f}", ha="center", va="center", fontsize=7, color=color)
    FigureCanvasAgg(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return np.asarray(Image.open(stream).convert("RGB"))
