"""Numbers in rows and columns as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from maskvit.plots.panels import _Sheet
from maskvit.plots.pictures import FAINT, INK

LETTER, LINE, GAP = 8, 26, 18  # pixels


def table_picture(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]]) -> UInt8[np.ndarray, "_ _ 3"]:
    """A name over every column and before every row; four significant digits, nothing where there is no number.

    Raises ValueError for a row of another length than `columns`.
    """
    for name, values in rows:
        if len(values) != len(columns):
            raise ValueError(f"row {name!r} has {len(values)} numbers under {len(columns)} columns")
    left = GAP + LETTER * max([len(name) for name, _ in rows] + [4])
    widths = [LETTER * max(len(name), 8) + GAP for name in columns]
    sheet = _Sheet(left + sum(widths) + GAP, LINE * (len(rows) + 1) + GAP)
    edges = left + np.cumsum(widths)
    for name, edge in zip(columns, edges, strict=True):
        sheet.text((int(edge), LINE - 6), name, 14, FAINT, "rs")
    for line, (row, values) in enumerate(rows):
        y = LINE * (line + 2) - 6
        sheet.draw.line((GAP // 2, y - LINE + 8, sheet.image.width - GAP // 2, y - LINE + 8), fill=(220, 223, 228))
        sheet.text((GAP // 2, y), row, 14, INK, "ls")
        for value, edge in zip(values, edges, strict=True):
            if value is not None:
                sheet.text((int(edge), y), f"{value:.4g}", 14, INK, "rs")
    return np.asarray(sheet.image)
