"""One array to one picture."""

from __future__ import annotations

import functools
import io
import math

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8

from maskvit.core.modalities import Modality

Picture = UInt8[np.ndarray, "h w 3"]


INK, FAINT, PAPER = (28, 32, 38), (112, 120, 130), (255, 255, 255)


HIDDEN = (205, 208, 213)  # a token that the model does not see
THROWN = (105, 110, 118)  # and does not rebuild


HATCH = ((52, 54, 58), (84, 87, 92))  # a pixel without measurement or label


def png_bytes(picture: Picture) -> bytes:
    """Encode a picture as PNG."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(stream, format="PNG")
    return stream.getvalue()


@functools.lru_cache(maxsize=16)
def palette(num_classes: int) -> UInt8[np.ndarray, "n 3"]:
    """`num_classes` colors, each as far as can be from all before it (greedy, in OKLab distance), none of them grey.

    The first colors do not depend on `num_classes` as long as that is at most 500.
    """
    side = max(14, math.ceil((6 * num_classes) ** (1 / 3)))
    axis = np.linspace(0, 255, side).round()
    colors = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    unit = colors / 255
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
    colors, lab = colors[usable], lab[usable] * [0.8, 1.0, 1.0]  # hue tells classes apart better than lightness, which is also shading
    chosen = [int(np.argmin(np.abs(colors - [40, 110, 200]).sum(-1)))]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < num_classes:
        distance = np.minimum(distance, ((lab - lab[chosen[-1]]) ** 2).sum(-1))
        chosen.append(int(distance.argmax()))
    return colors[chosen[:num_classes]].astype(np.uint8)


@functools.lru_cache(maxsize=8)
def _color_map(name: str) -> UInt8[np.ndarray, "256 3"]:
    import matplotlib

    return (matplotlib.colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def color_table(name: str) -> list[str]:
    """The 256 colors of a map of matplotlib's as "#rrggbb", for pages that color by themselves."""
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in _color_map(name)]


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

    One channel: a perceptual color map; three: as colors; other counts: the three main components of the channels.
    Class ids: `palette`. Pixels without measurement (NaN, the declared missing value, a negative id) are hatched dark.
    `like`: the array whose scale of colors is used; give the input for a reconstruction of it.
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
        picture = _color_map("viridis")[levels[..., 0]] if modality.channels == 1 else levels
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


def mask_overlay(picture: Picture, masked: Bool[np.ndarray, "gh gw"], thrown: Bool[np.ndarray, "gh gw"] | None = None) -> Picture:
    """What the model sees: hidden tokens are flat grey, those of them that are not rebuilt either (`thrown`) a dark one."""
    shown = np.where(_to_pixels(masked, picture.shape[:2])[..., None], np.array(HIDDEN, np.uint8), picture)
    return shown if thrown is None else np.where(_to_pixels(thrown, picture.shape[:2])[..., None], np.array(THROWN, np.uint8), shown)


def heat_overlay(picture: Picture, guidance: Float[np.ndarray, "gh gw"], limits: tuple[float, float] | None = None) -> Picture:
    """`guidance` as a heat map (black low, yellow high) over the grey picture; `limits` default to its own least and greatest.

    Tokens whose guidance is not finite (absent ones) stay grey.
    """
    finite = np.isfinite(guidance)
    low, high = limits or ((guidance[finite].min(), guidance[finite].max()) if finite.any() else (0.0, 1.0))
    unit = np.clip((np.where(finite, guidance, low) - low) / max(high - low, 1e-12), 0, 1)
    heat = _color_map("inferno")[(unit * 255).round().astype(np.uint8)].astype(np.float64)
    heat = np.stack([_to_pixels(heat[..., i], picture.shape[:2]) for i in range(3)], -1)
    grey = np.repeat((picture @ np.array([0.299, 0.587, 0.114]))[..., None], 3, -1)
    # Light and dark of the picture modulate the heat, so both shapes and levels can be read.
    blend = np.clip(heat * (0.5 + 0.5 * grey / 255) + 0.28 * grey, 0, 255)
    return np.where(_to_pixels(finite, picture.shape[:2])[..., None], blend, grey).round().astype(np.uint8)


def heat_map(values: Float[np.ndarray, "gh gw"], size: tuple[int, int], limits: tuple[float, float]) -> Picture:
    """`values` alone as colors (those of `heat_overlay`) on the scale `limits`, for reading them off; (height, width) = `size`."""
    unit = np.clip((np.where(np.isfinite(values), values, limits[0]) - limits[0]) / max(limits[1] - limits[0], 1e-12), 0, 1)
    levels = _to_pixels((unit * 255).round().astype(np.uint8), size)
    return _color_map("inferno")[levels]


def attention_rollout(attention: Float[np.ndarray, "l a n n"]) -> Float[np.ndarray, "n n"]:
    """Attention of all layers followed to the input: the product over layers of the mean over heads, half of it the residual.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020). Rows sum to 1.
    """
    rollout = np.eye(attention.shape[-1])
    for layer in attention.astype(np.float64).mean(1):
        mixed = 0.5 * layer + 0.5 * np.eye(len(layer))
        rollout = mixed / mixed.sum(-1, keepdims=True) @ rollout
    return rollout
