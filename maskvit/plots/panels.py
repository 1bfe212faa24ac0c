"""Pictures to panels: sheets of labeled tiles."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from maskvit.core.modalities import Modality
from maskvit.plots.pictures import (
    FAINT,
    INK,
    PAPER,
    Picture,
    _color_map,
    _to_pixels,
    heat_overlay,
    mask_overlay,
    png_bytes,
    to_picture,
    value_range,
)

Tile = tuple[UInt8[np.ndarray, "_ _ 3"], str]  # a picture of any size, and the words below it


class _Sheet:
    """A white page to place labeled tiles on."""

    def __init__(self, width: int, height: int) -> None:
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, xy: tuple[float, float], text: str, size: int = 15, color: tuple[int, int, int] = INK, anchor: str = "la") -> None:
        self.draw.text(xy, text, fill=color, font=_font(size), anchor=anchor)

    def tile(self, xy: tuple[int, int], picture: Picture, size: tuple[int, int]) -> None:
        """Place `picture` enlarged without smoothing (or averaged down) to `size` = (width, height), with a hairline frame."""
        from PIL import Image

        shrink = size[0] < picture.shape[1]
        tile = Image.fromarray(np.ascontiguousarray(picture)).resize(size, Image.Resampling.BOX if shrink else Image.Resampling.NEAREST)
        self.image.paste(tile, xy)
        self.draw.rectangle((xy[0] - 1, xy[1] - 1, xy[0] + size[0], xy[1] + size[1]), outline=(190, 194, 200))

    def heat_bar(self, xy: tuple[int, int], width: int, low: str, high: str) -> None:
        """A color bar with words at both ends."""
        bar = _color_map("inferno")[np.linspace(0, 255, width).astype(int)][None].repeat(10, 0)
        self.text((xy[0] - 6, xy[1] + 5), low, 13, FAINT, "rm")
        self.tile(xy, bar, (width, 10))
        self.text((xy[0] + width + 6, xy[1] + 5), high, 13, FAINT, "lm")

    def png(self) -> bytes:
        return png_bytes(np.asarray(self.image))


@functools.lru_cache(maxsize=16)
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _tile_size(shapes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """(width, height) of a tile for pictures of these shapes: the largest, in whole multiples, at least 160 and at most 256 high."""
    height, width = max(shapes)[:2]
    tall = height * math.ceil(160 / height) if height < 160 else min(height, 256)
    return round(width * tall / height), tall


def tile_grid(
    tiles: Sequence[tuple[str, UInt8[np.ndarray, "_ _ 3"]]],
    columns: int,
    title: str = "",
    heat_bar: bool = False,
    bar: tuple[str, str] | None = None,
) -> bytes:
    """Labeled pictures in rows of `columns`, as PNG; with `heat_bar` the legend of `heat_overlay` below them.

    `bar`: words at both ends of that legend, where they are not about attention and a scale of each tile's own.
    """
    if heat_bar and bar is None:
        bar = "least attention", "most (each tile for itself)"
    wide, tall = _tile_size([picture.shape for _, picture in tiles])
    rows, gap, label, top = math.ceil(len(tiles) / columns), 12, 24, 44 if title else 12
    width = max(columns * (wide + gap) + gap, 420)
    sheet = _Sheet(width, top + rows * (tall + label + gap) + (28 if bar else 0))
    sheet.text((gap, 14), title, 18)
    for index, (name, picture) in enumerate(tiles):
        x, y = gap + index % columns * (wide + gap), top + index // columns * (tall + label + gap)
        sheet.text((x, y + label - 7), name, 15, INK, "ls")
        sheet.tile((x, y + label), picture, (wide, tall))
    if bar:
        sheet.heat_bar((gap + 20 + 6 * len(bar[0]), sheet.image.height - 24), 160, *bar)
    return sheet.png()


def labeled_grid(
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Tile | None]]],
    title: str = "",
    heat: tuple[str, str] | None = None,
    side: int = 132,
) -> bytes:
    """A table of pictures as PNG: a name over every column, a name before every row, and words under every tile.

    Args:
      columns: the names above.
      rows: (name, one (picture, words below it) per column, or None where there is nothing).
      heat: words at both ends of the color bar of `heat_overlay`; None leaves it out.
      side: height of a tile in pixels.

    Raises ValueError for a row of another length than `columns`.
    """
    for name, tiles in rows:
        if len(tiles) != len(columns):
            raise ValueError(f"row {name!r} has {len(tiles)} tiles under {len(columns)} columns")
    shapes = [tile[0].shape for _, tiles in rows for tile in tiles if tile is not None]
    wide = round(side * max((shape[1] / shape[0] for shape in shapes), default=1.0))
    worded = any(tile is not None and tile[1] for _, tiles in rows for tile in tiles)
    gap, under = 10, 17 if worded else 0
    left = 20 + max([8 * len(line) for name, _ in rows for line in name.split("\n")] + [30])
    heads = [name.split("\n") for name in columns]
    top = (44 if title else 12) + 17 * max((len(head) for head in heads), default=1) + 6
    width = left + len(columns) * (wide + gap) + gap
    if heat:  # the words at both ends of the bar are to be read whole
        width = max(width, left + 8 * len(heat[0]) + 186 + 8 * len(heat[1]))
    sheet = _Sheet(width, top + len(rows) * (side + under + gap) + (34 if heat else 6))
    sheet.text((gap, 12), title, 18)
    for place, head in enumerate(heads):
        for line, words in enumerate(reversed(head)):
            sheet.text((left + place * (wide + gap), top - 8 - 17 * line), words, 14, INK, "ls")
    for line, (name, tiles) in enumerate(rows):
        y = top + line * (side + under + gap)
        for offset, words in enumerate(name.split("\n")):
            sheet.text((left - 12, y + side // 2 + 17 * offset), words, 14, INK if offset == 0 else FAINT, "rs")
        for place, tile in enumerate(tiles):
            if tile is not None:
                x = left + place * (wide + gap)
                sheet.tile((x, y), tile[0], (wide, side))
                sheet.text((x, y + side + 15), tile[1], 12, FAINT, "ls")
    if heat:
        sheet.heat_bar((left + 8 * len(heat[0]), sheet.image.height - 22), 180, *heat)
    return sheet.png()


def stacked(above: bytes, below: bytes) -> bytes:
    """Two PNGs below each other on white paper, as PNG."""
    from PIL import Image

    images = [Image.open(io.BytesIO(one)) for one in (above, below)]
    sheet = _Sheet(max(image.width for image in images), sum(image.height for image in images))
    sheet.image.paste(images[0], (0, 0))
    sheet.image.paste(images[1], (0, images[0].height))
    return sheet.png()


COLUMNS = ("input", "guidance", "visible", "reconstruction", "raw prediction")


MEANING = ("what is there", "", "grey is hidden", "hidden rebuilt, visible kept", "the decoder's output everywhere")


def masking_panel(arrays: Mapping[str, Any], modalities: Mapping[str, Modality], samples: int = 3, title: str = "") -> bytes:
    """The picture of masked training, as PNG: one row per sample and modality, columns as in `COLUMNS`.

    Args:
      arrays: what an objective's `visualize` gives: "inputs" {modality: stored values "b h w c" or ids "b h w"}, "masked"
        {modality: bool "b gh gw", True = hidden}, "guidance" {modality: "b gh gw"} (empty where masks are random), "reconstructions"
        {output: stored values or ids, shaped like the input}. An output "norm_X" is X rebuilt from normalized patches.
      modalities: the specs by name.
      samples: at most so many of the batch are shown.

    Guidance is scaled inside each tile. Raises ValueError for an output of an unknown modality.
    """
    inputs, masks, guidance, rebuilt = (dict(arrays[key]) for key in ("inputs", "masked", "guidance", "reconstructions"))
    rows = []
    declared = [name for name in modalities if name in inputs]  # in this order: jit returns dicts sorted by key
    for name in (*declared, *(name for name in rebuilt if name not in inputs)):
        base = name if name in inputs else name.removeprefix("norm_")
        if base not in inputs or base not in modalities:
            raise ValueError(f"reconstruction {name!r} belongs to no modality of the input; known: {', '.join(inputs)}")
        rows.append((declared.index(base), name != base, name, base))
    rows.sort(key=lambda row: row[:2])  # norm_rgb stands right below rgb
    inputs = {name: np.asarray(values) for name, values in inputs.items()}
    samples = min(samples, min(len(values) for values in inputs.values()))

    shown = [index for index in range(len(COLUMNS)) if index != 1 or guidance]
    wide, tall = _tile_size([values.shape[1:] for values in inputs.values()])
    left, top, gap, between = 150, 92 if title else 58, 10, 26
    block = len(rows) * (tall + gap) + between
    sheet = _Sheet(left + len(shown) * (wide + gap) + gap, top + samples * block + 8)
    sheet.text((gap + 4, 14), title, 20)
    for place, index in enumerate(shown):
        x = left + place * (wide + gap)
        sheet.text((x, top - 30), COLUMNS[index], 17, INK, "ls")
        sheet.text((x, top - 11), MEANING[index], 13, FAINT, "ls")
    if guidance:
        sheet.heat_bar((left + wide + gap + 30, top - 20), wide - 120, "low", "high, each tile")
    for sample in range(samples):
        for line, (_, normalized, name, base) in enumerate(rows):
            y = top + sample * block + line * (tall + gap)
            if line == 0:
                sheet.draw.line((gap, y - 6, sheet.image.width - gap, y - 6), fill=(220, 223, 228))
                sheet.text((gap + 4, y + 2), f"sample {sample}", 13, FAINT)
            values, masked = inputs[base][sample], np.asarray(masks[base][sample]) if base in masks else None
            words = (
                [_legend(modalities[base], values)] if not normalized else ["shown with the", "target's own patch", "mean and deviation"]
            )
            if masked is not None and not normalized:
                words.append(f"{masked.size - masked.sum()} of {masked.size} visible")
            middle = y + tall // 2
            sheet.text((left - 12, middle - 4), name, 18, INK, "rs")
            for offset, word in enumerate(filter(None, words)):
                sheet.text((left - 12, middle + 14 + 16 * offset), word, 13, FAINT, "rs")
            pictures = _row_pictures(
                modalities[base],
                values,
                masked,
                np.asarray(guidance[base][sample]) if base in guidance and not normalized else None,
                np.asarray(rebuilt[name][sample]) if name in rebuilt else None,
            )
            for place, index in enumerate(shown):
                if (picture := pictures[index]) is not None:
                    sheet.tile((left + place * (wide + gap), y), picture, (wide, tall))
    return sheet.png()


def _row_pictures(
    modality: Modality, values: np.ndarray, masked: np.ndarray | None, guidance: np.ndarray | None, rebuilt: np.ndarray | None
) -> list[Picture | None]:
    """The pictures of one row of `masking_panel` in the order of `COLUMNS`, None where there is nothing to show."""
    source = to_picture(modality, values)
    heat = None if guidance is None else heat_overlay(source, guidance)
    visible = None if masked is None else mask_overlay(source, masked)
    if rebuilt is None:
        return [source, heat, visible, None, None]
    raw = to_picture(modality, rebuilt, like=values)
    hidden = np.ones(source.shape[:2], bool) if masked is None else _to_pixels(masked, source.shape[:2])
    return [source, heat, visible, np.where(hidden[..., None], raw, source), raw]


def _legend(modality: Modality, values: np.ndarray) -> str:
    """What the colors of a one-channel modality mean."""
    if modality.kind == "categorical" or modality.channels != 1:
        return f"{modality.num_classes} classes" if modality.kind == "categorical" else ""
    low, high = value_range(modality, values)
    if modality.metres_per_count is not None:
        return f"{low * modality.metres_per_count:.3g} to {high * modality.metres_per_count:.3g} m"
    return f"{low:.3g} to {high:.3g}"
