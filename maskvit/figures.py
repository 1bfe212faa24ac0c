"""Arrays to pictures: masks, guidance, attention, reconstructions, curves, and one self-contained HTML page.

Everything here takes numpy arrays and gives uint8 pictures "h w 3", PNG bytes or HTML text; nothing is written to disk, no
global state is touched (pictures may be drawn in a thread), and equal input gives equal bytes.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8

from maskvit.modalities import Modality

Picture = UInt8[np.ndarray, "h w 3"]
Tile = tuple[UInt8[np.ndarray, "_ _ 3"], str]  # a picture of any size, and the words below it
Numbers = Sequence[float] | np.ndarray

INK, FAINT, PAPER = (28, 32, 38), (112, 120, 130), (255, 255, 255)
HIDDEN = (205, 208, 213)  # a token that the model does not see
HATCH = ((52, 54, 58), (84, 87, 92))  # a pixel without measurement or label
BLUE, ORANGE = "#2f6fb5", "#d9822b"


def png_bytes(picture: Picture) -> bytes:
    """Encode a picture as PNG."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(stream, format="PNG")
    return stream.getvalue()


# --- one array to one picture ----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def palette(num_classes: int) -> UInt8[np.ndarray, "n 3"]:
    """`num_classes` colours, each as far as can be from all before it (greedy, in OKLab distance), none of them grey.

    The first colours do not depend on `num_classes` as long as that is at most 500.
    """
    side = max(14, math.ceil((6 * num_classes) ** (1 / 3)))
    axis = np.linspace(0, 255, side).round()
    colours = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    unit = colours / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    # sRGB to OKLab (B. Ottosson, 2020): equal distances look about equally different.
    cones = linear @ np.array(
        [[0.41222147, 0.21190350, 0.08830246], [0.53633254, 0.68069955, 0.28171884], [0.05144599, 0.10739696, 0.62997870]]
    )
    lab = np.cbrt(cones) @ np.array(
        [[0.21045426, 1.97799850, 0.02590404], [0.79361779, -2.42859221, 0.78277177], [-0.00407205, 0.45059371, -0.80867577]]
    )
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (lab[:, 0] > 0.38) & (lab[:, 0] < 0.93) & (chroma > 0.05) & (chroma < 0.25)
    colours, lab = colours[usable], lab[usable] * [0.8, 1.0, 1.0]  # hue tells classes apart better than lightness, which is also shading
    chosen = [int(np.argmin(np.abs(colours - [40, 110, 200]).sum(-1)))]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < num_classes:
        distance = np.minimum(distance, ((lab - lab[chosen[-1]]) ** 2).sum(-1))
        chosen.append(int(distance.argmax()))
    return colours[chosen[:num_classes]].astype(np.uint8)


@functools.lru_cache(maxsize=8)
def _colour_map(name: str) -> UInt8[np.ndarray, "256 3"]:
    import matplotlib

    return (matplotlib.colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def value_range(modality: Modality, array: Shaped[np.ndarray, "h w *c"]) -> tuple[float, float]:
    """The stored values that a picture of a continuous `array` shows as its darkest and lightest.

    Three channels: the whole range of the storage (0..255, 0..1/scale, 0..1, or -1..1 where values are negative, as for
    surface normals) if the values keep within it. Else, and for other channel counts: the 1st to the 99th percentile.
    """
    values = np.asarray(array, np.float64)
    values = values[np.isfinite(values) & (values != (math.nan if modality.missing is None else modality.missing))]
    if not values.size:
        return 0.0, 1.0
    if modality.channels == 3:
        full = 255.0 if array.dtype == np.uint8 else 1.0 / modality.scale
        low = -full if values.min() < 0 else 0.0
        if np.abs(values).max() <= 1.05 * full:
            return low, full
    low, high = np.percentile(values, (1, 99))
    return float(low), float(high if high > low else low + 1.0)


def to_picture(modality: Modality, array: Shaped[np.ndarray, "h w *c"], like: Shaped[np.ndarray, "h w *c"] | None = None) -> Picture:
    """Picture of one stored map ("h w" or "h w c"; class ids for a categorical modality).

    One channel: a perceptual colour map; three: as colours; other counts: the three main components of the channels.
    Class ids: `palette`. Pixels without measurement (NaN, the declared missing value, a negative id) are hatched dark.
    `like`: the array whose scale of colours is used; give the input for a reconstruction of it.
    Raises ValueError for a class id out of range or a channel count that the modality does not declare.
    """
    array = array if array.ndim == 3 else array[..., None]
    like = array if like is None else like if like.ndim == 3 else like[..., None]
    if modality.kind == "categorical":
        ids = array[..., 0].astype(np.int64)
        missing = (ids < 0) | (ids == (-1 if modality.missing is None else modality.missing))
        if ids.max(initial=-1, where=~missing) >= modality.num_classes:
            raise ValueError(
                f"class id {ids[~missing].max()} in modality {modality.name!r}: config declares {modality.num_classes} classes"
            )
        picture = palette(modality.num_classes)[np.where(missing, 0, ids)]
    else:
        if array.shape[-1] != modality.channels:
            raise ValueError(f"an array with {array.shape[-1]} channels for modality {modality.name!r}, declared with {modality.channels}")
        values = array.astype(np.float64)
        missing = ~np.isfinite(values).all(-1)
        if modality.missing is not None:
            missing |= (values == modality.missing).all(-1)
        if modality.channels not in (1, 3):
            values, like = _main_components(values, like.astype(np.float64))
        low, high = value_range(modality, like)
        unit = np.clip((np.where(missing[..., None], low, values) - low) / (high - low), 0, 1)
        levels = (unit * 255).round().astype(np.uint8)
        picture = _colour_map("viridis")[levels[..., 0]] if modality.channels == 1 else levels
    if missing.any():
        rows, columns = np.indices(missing.shape)
        period = max(3, missing.shape[0] // 16)
        stripe = ((rows + columns) % period < period // 2).astype(np.uint8)
        picture = np.where(missing[..., None], np.array(HATCH, np.uint8)[stripe], picture)
    return picture


def _main_components(values: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project channels on the three main components of `reference`, each divided by its deviation; "h w c" to "h w 3"."""
    flat = reference[np.isfinite(reference).all(-1)]
    flat = flat if len(flat) else np.zeros((1, reference.shape[-1]))
    _, spread, axes = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    axes = axes[:3] * np.sign(axes[:3][np.arange(len(axes[:3])), np.abs(axes[:3]).argmax(-1)])[:, None]  # SVD leaves the sign open
    scaled = axes / (spread[:3, None] / math.sqrt(len(flat)) + 1e-12)
    scaled = np.pad(scaled, ((0, 3 - len(scaled)), (0, 0)))
    return (values - flat.mean(0)) @ scaled.T, (reference - flat.mean(0)) @ scaled.T


def _to_pixels(tokens: Shaped[np.ndarray, "gh gw"], size: tuple[int, int]) -> Shaped[np.ndarray, "h w"]:
    """Repeat every token over its pixels, (height, width) = `size`."""
    if size[0] % tokens.shape[0] or size[1] % tokens.shape[1]:
        raise ValueError(f"a picture of {size[0]} x {size[1]} pixels does not divide into {tokens.shape[0]} x {tokens.shape[1]} tokens")
    return tokens.repeat(size[0] // tokens.shape[0], 0).repeat(size[1] // tokens.shape[1], 1)


def mask_overlay(picture: Picture, masked: Bool[np.ndarray, "gh gw"]) -> Picture:
    """What the model sees: hidden tokens are flat grey."""
    return np.where(_to_pixels(masked, picture.shape[:2])[..., None], np.array(HIDDEN, np.uint8), picture)


def heat_overlay(picture: Picture, guidance: Float[np.ndarray, "gh gw"], limits: tuple[float, float] | None = None) -> Picture:
    """`guidance` as a heat map (black low, yellow high) over the grey picture; `limits` default to its own least and greatest.

    Tokens whose guidance is not finite (absent ones) stay grey.
    """
    finite = np.isfinite(guidance)
    low, high = limits or ((guidance[finite].min(), guidance[finite].max()) if finite.any() else (0.0, 1.0))
    unit = np.clip((np.where(finite, guidance, low) - low) / max(high - low, 1e-12), 0, 1)
    heat = _colour_map("inferno")[(unit * 255).round().astype(np.uint8)].astype(np.float64)
    heat = np.stack([_to_pixels(heat[..., i], picture.shape[:2]) for i in range(3)], -1)
    grey = np.repeat((picture @ np.array([0.299, 0.587, 0.114]))[..., None], 3, -1)
    # Light and dark of the picture modulate the heat, so both shapes and levels can be read.
    blend = np.clip(heat * (0.5 + 0.5 * grey / 255) + 0.28 * grey, 0, 255)
    return np.where(_to_pixels(finite, picture.shape[:2])[..., None], blend, grey).round().astype(np.uint8)


def heat_map(values: Float[np.ndarray, "gh gw"], size: tuple[int, int], limits: tuple[float, float]) -> Picture:
    """`values` alone as colours (those of `heat_overlay`) on the scale `limits`, for reading them off; (height, width) = `size`."""
    unit = np.clip((np.where(np.isfinite(values), values, limits[0]) - limits[0]) / max(limits[1] - limits[0], 1e-12), 0, 1)
    levels = _to_pixels((unit * 255).round().astype(np.uint8), size)
    return _colour_map("inferno")[levels]


def attention_rollout(attention: Float[np.ndarray, "l a n n"]) -> Float[np.ndarray, "n n"]:
    """Attention of all layers followed to the input: the product over layers of the mean over heads, half of it the residual.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020). Rows sum to 1.
    """
    rollout = np.eye(attention.shape[-1])
    for layer in attention.astype(np.float64).mean(1):
        mixed = 0.5 * layer + 0.5 * np.eye(len(layer))
        rollout = mixed / mixed.sum(-1, keepdims=True) @ rollout
    return rollout


# --- pictures to panels ----------------------------------------------------------------------------------------------------


class _Sheet:
    """A white page to place labelled tiles on."""

    def __init__(self, width: int, height: int) -> None:
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, xy: tuple[float, float], text: str, size: int = 15, colour: tuple[int, int, int] = INK, anchor: str = "la") -> None:
        self.draw.text(xy, text, fill=colour, font=_font(size), anchor=anchor)

    def tile(self, xy: tuple[int, int], picture: Picture, size: tuple[int, int]) -> None:
        """Place `picture` enlarged without smoothing (or averaged down) to `size` = (width, height), with a hairline frame."""
        from PIL import Image

        shrink = size[0] < picture.shape[1]
        tile = Image.fromarray(np.ascontiguousarray(picture)).resize(size, Image.Resampling.BOX if shrink else Image.Resampling.NEAREST)
        self.image.paste(tile, xy)
        self.draw.rectangle((xy[0] - 1, xy[1] - 1, xy[0] + size[0], xy[1] + size[1]), outline=(190, 194, 200))

    def heat_bar(self, xy: tuple[int, int], width: int, low: str, high: str) -> None:
        """A colour bar with words at both ends."""
        bar = _colour_map("inferno")[np.linspace(0, 255, width).astype(int)][None].repeat(10, 0)
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


def tile_grid(tiles: Sequence[tuple[str, Picture]], columns: int, title: str = "", heat_bar: bool = False) -> bytes:
    """Labelled pictures in rows of `columns`, as PNG; with `heat_bar` the legend of `heat_overlay` below them."""
    wide, tall = _tile_size([picture.shape for _, picture in tiles])
    rows, gap, label, top = math.ceil(len(tiles) / columns), 12, 24, 44 if title else 12
    width = max(columns * (wide + gap) + gap, 420)
    sheet = _Sheet(width, top + rows * (tall + label + gap) + (28 if heat_bar else 0))
    sheet.text((gap, 14), title, 18)
    for index, (name, picture) in enumerate(tiles):
        x, y = gap + index % columns * (wide + gap), top + index // columns * (tall + label + gap)
        sheet.text((x, y + label - 7), name, 15, INK, "ls")
        sheet.tile((x, y + label), picture, (wide, tall))
    if heat_bar:
        sheet.heat_bar((gap + 110, sheet.image.height - 24), 160, "least attention", "most (each tile for itself)")
    return sheet.png()


def labelled_grid(
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
      heat: words at both ends of the colour bar of `heat_overlay`; None leaves it out.
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
    sheet = _Sheet(left + len(columns) * (wide + gap) + gap, top + len(rows) * (side + under + gap) + (34 if heat else 6))
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


def attention_panel(
    picture: Picture,
    heads: Float[np.ndarray, "a gh gw"],
    rollout: Float[np.ndarray, "gh gw"] | None = None,
    masked: Bool[np.ndarray, "gh gw"] | None = None,
    title: str = "",
) -> bytes:
    """One input with its mean attention, rollout, the mask that follows, and every head, as PNG."""
    tiles = [("input", picture), ("mean of heads", heat_overlay(picture, heads.mean(0)))]
    tiles += [("rollout", heat_overlay(picture, rollout))] if rollout is not None else []
    tiles += [("what stays visible", mask_overlay(picture, masked))] if masked is not None else []
    tiles += [(f"head {index}", heat_overlay(picture, head)) for index, head in enumerate(heads)]
    return tile_grid(tiles, 4, title, heat_bar=True)


COLUMNS = ("input", "guidance", "visible", "reconstruction", "raw prediction")
MEANING = ("what is there", "", "grey is hidden", "hidden rebuilt, visible kept", "the decoder's output everywhere")


def masking_panel(arrays: Mapping[str, Any], modalities: Mapping[str, Modality], samples: int = 3, title: str = "") -> bytes:
    """The picture of masked training, as PNG: one row per sample and modality, columns as in `COLUMNS`.

    Args:
      arrays: what an objective's `visualize` gives: "inputs" {modality: stored values "b h w c" or ids "b h w"}, "masked"
        {modality: bool "b gh gw", True = hidden}, "guidance" {modality: "b gh gw"} (empty where masks are random), "reconstructions"
        {output: stored values or ids, shaped like the input}. An output "norm_X" is X rebuilt from normalised patches.
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
        for line, (_, normalised, name, base) in enumerate(rows):
            y = top + sample * block + line * (tall + gap)
            if line == 0:
                sheet.draw.line((gap, y - 6, sheet.image.width - gap, y - 6), fill=(220, 223, 228))
                sheet.text((gap + 4, y + 2), f"sample {sample}", 13, FAINT)
            values, masked = inputs[base][sample], np.asarray(masks[base][sample]) if base in masks else None
            words = (
                [_legend(modalities[base], values)] if not normalised else ["shown with the", "target's own patch", "mean and deviation"]
            )
            if masked is not None and not normalised:
                words.append(f"{masked.size - masked.sum()} of {masked.size} visible")
            middle = y + tall // 2
            sheet.text((left - 12, middle - 4), name, 18, INK, "rs")
            for offset, word in enumerate(filter(None, words)):
                sheet.text((left - 12, middle + 14 + 16 * offset), word, 13, FAINT, "rs")
            pictures = _row_pictures(
                modalities[base],
                values,
                masked,
                np.asarray(guidance[base][sample]) if base in guidance and not normalised else None,
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
    """What the colours of a one-channel modality mean."""
    if modality.kind == "categorical" or modality.channels != 1:
        return f"{modality.num_classes} classes" if modality.kind == "categorical" else ""
    low, high = value_range(modality, values)
    if modality.metres_per_count is not None:
        return f"{low * modality.metres_per_count:.3g} to {high * modality.metres_per_count:.3g} m"
    return f"{low:.3g} to {high:.3g}"


# --- numbers to panels -----------------------------------------------------------------------------------------------------


def _save(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return stream.getvalue()


def curves(series: Mapping[str, tuple[Numbers, Numbers]], title: str = "") -> bytes:
    """One small plot per series {name: (steps, values)}, as PNG: the values faint, their running mean strong, its last value named.

    Values that are not finite are left out. Raises ValueError without a series.
    """
    from matplotlib.figure import Figure

    if not series:
        raise ValueError("curves of nothing: no series given")
    columns = min(3, len(series))
    rows = math.ceil(len(series) / columns)
    figure = Figure(figsize=(3.9 * columns, 2.6 * rows + (0.4 if title else 0)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13) if title else None
    for index, (name, (steps, values)) in enumerate(series.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
        steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
        window = max(1, len(values) // 20)
        sums = np.cumsum(np.pad(values, (1, 0)))
        ends = np.arange(1, len(values) + 1)
        starts = np.maximum(ends - window, 0)
        smooth = (sums[ends] - sums[starts]) / (ends - starts)
        if window > 1:
            axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.9)
        axes.plot(steps, smooth, color=BLUE, linewidth=1.8, marker="o" if len(values) <= 12 else None, markersize=4)
        last = f"   {smooth[-1]:.4g}" if len(values) else "   no finite value"
        axes.set_title(name, loc="left", fontsize=11)
        axes.set_title(last, loc="right", fontsize=11, color=BLUE)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        if index >= len(series) - columns:
            axes.set_xlabel("step", fontsize=9)
    return _save(figure)


# Colours that people with any colour vision tell apart (Okabe and Ito, 2008), then the same dashed and dotted.
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
_STYLES = ("-", "--", ":", "-.")


def line_panels(panels: Mapping[str, Mapping[str, Sequence[tuple[Numbers, Numbers]]]], x: str = "epoch") -> bytes:
    """One plot per panel {name: {label: [(x, y) per run]}}, as PNG: the runs faint, their mean strong; a label has one colour throughout.

    The mean is over the runs that have a finite value at an x; runs are logged at the same steps. Raises ValueError without a panel.
    """
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("plots of nothing: no panel given")
    labels = list(dict.fromkeys(label for series in panels.values() for label in series))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    legend = 0.24 * math.ceil(len(labels) / 4) + 0.2
    figure = Figure(figsize=(max(4.2 * columns, 8.4), 2.9 * rows + legend), layout="constrained")  # room for four names
    drawn = {}
    for index, (name, series) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        for label, runs in series.items():
            number = labels.index(label)
            style: dict[str, Any] = dict(color=_LINES[number % len(_LINES)], linestyle=_STYLES[number // len(_LINES) % len(_STYLES)])
            merged: dict[float, list[float]] = {}
            for steps, values in runs:
                if len(runs) > 1:
                    axes.plot(steps, values, alpha=0.22, linewidth=0.8, **style)
                for step, value in zip(steps, values, strict=True):
                    if math.isfinite(value):
                        merged.setdefault(float(step), []).append(float(value))
            places = sorted(merged)
            means = [sum(merged[place]) / len(merged[place]) for place in places]
            marker = "o" if len(places) <= 12 else None
            drawn[label] = axes.plot(places, means, linewidth=1.7, marker=marker, markersize=3.5, **style)[0]
        axes.set_title(name, loc="left", fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        axes.set_xlabel(x, fontsize=9)
    figure.legend(
        drawn.values(), drawn.keys(), loc="outside upper left", ncols=min(4, len(labels)), fontsize=9, frameon=False, handlelength=3
    )
    return _save(figure)


def points(panels: Mapping[str, Mapping[str, Numbers]], baseline: str) -> bytes:
    """One plot per panel {name: {label: values}}, as PNG: every value a point, a bar at their mean, the mean of `baseline` dashed."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for series in panels.values() for label in series))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1.4 + 3.6 * columns, rows * (0.9 + 0.27 * len(labels))), layout="constrained")
    first = None
    for index, (name, series) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1, sharey=first)
        first = first or axes
        for label, values in series.items():
            finite = [float(value) for value in values if math.isfinite(value)]
            if not finite:
                continue
            height, mean = labels.index(label), sum(finite) / len(finite)
            colour = ORANGE if label == baseline else BLUE
            axes.plot(finite, [height] * len(finite), "o", color=colour, alpha=0.55, markersize=5, markeredgewidth=0)
            axes.plot([mean, mean], [height - 0.32, height + 0.32], color=colour, linewidth=2.2)
            if label == baseline:
                axes.axvline(mean, color=ORANGE, linestyle="--", linewidth=1, zorder=0)
        axes.set_title(name, loc="left", fontsize=11)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, labelleft=index % columns == 0)
    return _save(figure)


def bars(
    groups: Mapping[str, Mapping[str, float]], title: str = "", unit: str = "%", references: Mapping[str, float] | None = None
) -> bytes:
    """Bars by {group: {series: value}} (k-NN per feature, before and after), as PNG; `references` are dashed lines by name (chance)."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    colours = ["#9fb6d0", BLUE, ORANGE, "#5a9a6b", "#8a63a8"]
    references = references or {}
    figure = Figure(figsize=(max(4.8, 1.6 + 0.75 * len(names) * len(groups)) + (1.6 if references else 0), 3.4), layout="constrained")
    axes = figure.add_subplot()
    for index, name in enumerate(names):
        places = [place + (index - (len(names) - 1) / 2) * 0.8 / len(names) for place, group in enumerate(groups.values()) if name in group]
        heights = [group[name] for group in groups.values() if name in group]
        drawn = axes.bar(places, heights, width=0.74 / len(names), color=colours[index % len(colours)], label=name)
        axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=9)
    for index, (name, value) in enumerate(references.items()):
        axes.axhline(value, color="#555b63", linestyle=("--", ":", "-.")[index % 3], linewidth=1.2, label=f"{name} {value:.3g}")
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(unit)
    axes.set_title(title, loc="left", fontsize=13)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return _save(figure)


def matrix(values: Float[np.ndarray, "r c"], rows: str, columns: str, title: str = "") -> bytes:
    """A matrix as a heat map around zero (blue below, red above), as PNG; `rows`, `columns`: what their numbers count."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + 0.32 * values.shape[1], 1.4 + 0.28 * values.shape[0]), layout="constrained")
    axes = figure.add_subplot()
    limit = max(float(np.abs(values).max()), 1e-12)
    drawn = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(0, values.shape[1], max(1, values.shape[1] // 16)))
    axes.set_yticks(range(0, values.shape[0], max(1, values.shape[0] // 16)))
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)
    axes.set_title(title, loc="left", fontsize=13)
    figure.colorbar(drawn)
    return _save(figure)


# --- the page --------------------------------------------------------------------------------------------------------------


class Prose(NamedTuple):
    """A paragraph of plain text."""

    text: str


class Table(NamedTuple):
    """Rows of cells under a header; numbers are aligned right."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Figure(NamedTuple):
    """A PNG with its caption, which is also the text for those who cannot see it."""

    png: bytes
    caption: str


class Commands(NamedTuple):
    """Text to copy: commands, a config, a log."""

    text: str


class Section(NamedTuple):
    """A heading and what stands under it."""

    heading: str
    blocks: Sequence[Prose | Table | Figure | Commands]


_STYLE = """
:root { color-scheme: light dark; }
:root { --paper: #ffffff; --ink: #1c2026; --faint: #5c6570; --line: #dfe3e8; --panel: #f5f7f9; --accent: #2f6fb5; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e4e7eb; --faint: #9aa4af; --line: #2d333b; --panel: #1e2329; --accent: #7fb2e8; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main, header { max-width: 76rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 2.5rem; padding-bottom: 1rem; border-bottom: 1px solid var(--line); }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
header p { margin: 0; color: var(--faint); max-width: 50rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin-top: 1rem; font-size: .92rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .7rem; }
p { max-width: 50rem; margin: .6rem 0; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto;
  font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .94rem; }
th, td { padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--faint); font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; padding-left: .9rem; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; background: #fff; }
figcaption { color: var(--faint); font-size: .92rem; margin-top: .4rem; max-width: 56rem; }
footer { height: 3rem; }
"""


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def _block(block: Prose | Table | Figure | Commands) -> str:
    match block:
        case Prose(text):
            return f"<p>{html.escape(text)}</p>"
        case Commands(text):
            return f"<pre>{html.escape(text.strip())}</pre>"
        case Figure(png, caption):
            data, words = base64.b64encode(png).decode("ascii"), html.escape(caption)
            return f'<figure><img src="data:image/png;base64,{data}" alt="{words}"><figcaption>{words}</figcaption></figure>'
        case Table(header, rows):
            if ragged := [row for row in rows if len(row) != len(header)]:
                raise ValueError(f"a table row has {len(ragged[0])} cells under a header of {len(header)}: {ragged[0]}")
            numeric = [all(isinstance(row[i], (int, float, np.number)) for row in rows) and bool(rows) for i in range(len(header))]
            mark = [' class="number"' if number else "" for number in numeric]
            head = "".join(f"<th{m}>{html.escape(name)}</th>" for m, name in zip(mark, header, strict=True))
            body = "".join(
                "<tr>" + "".join(f"<td{m}>{html.escape(_cell(cell))}</td>" for m, cell in zip(mark, row, strict=True)) + "</tr>\n"
                for row in rows
            )
            return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
    raise TypeError(f"a page has Prose, Table, Figure and Commands, not {type(block).__name__}")


def html_page(title: str, sections: Sequence[Section], summary: str = "") -> str:
    """One HTML page that needs nothing beside itself: styles inline, pictures as data, no script; light and dark.

    All text is escaped. Raises TypeError for a block of another kind, ValueError for a table row of another length than its header.
    """
    links = "".join(f'<a href="#s{index}">{html.escape(section.heading)}</a>' for index, section in enumerate(sections))
    body = "\n".join(
        f'<section id="s{index}"><h2>{html.escape(section.heading)}</h2>\n'
        + "\n".join(_block(block) for block in section.blocks)
        + "</section>"
        for index, section in enumerate(sections)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{html.escape(title)}</h1><p>{html.escape(summary)}</p><nav>{links}</nav></header>
<main>
{body}
</main>
<footer></footer>
</body>
</html>
"""
