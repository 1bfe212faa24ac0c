"""RandAugment as timm has it, given by timm's text such as "rand-m9-mstd0.5-inc1": a few of 15 operations on 8-bit RGB pictures.

Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space" (2020); timm's increasing set, where
a larger magnitude always changes more. Geometric operations are bicubic and fill with the mean color of ImageNet.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

WHERE = "config.data.augment.randaugment"
FILL = (124, 116, 104)
MOST = 10  # the magnitude at which an operation changes the most
EXAMPLE = "rand-m9-mstd0.5-inc1"


class RandAugment(NamedTuple):
    """`layers` operations, drawn with replacement, each applied with `probability`, of magnitude N(`magnitude`, `deviation`^2)."""

    magnitude: int = MOST
    deviation: float = 0.0
    layers: int = 2
    probability: float = 0.5


class Layer(NamedTuple):
    """One operation to apply: a key of `OPERATIONS`, its magnitude as a share of the largest, and its direction (1 or -1)."""

    name: str
    level: float
    sign: int


def parse_randaugment(text: str) -> RandAugment:
    """timm's text: "rand", then, each after a dash, m (magnitude 0 ... 10), mstd, n (layers), p (probability), inc1.

    Raises ValueError naming the part that is wrong.
    """
    first, *parts = text.split("-")
    if first != "rand":
        raise ValueError(f"{WHERE} is {text!r}; it must begin with 'rand', as {EXAMPLE!r} does")
    keys = {"m": "magnitude", "mstd": "deviation", "n": "layers", "p": "probability", "inc": "inc"}
    values: dict[str, Any] = {}
    for part in parts:
        match = re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", part)
        if not match:
            raise ValueError(f"{WHERE} is {text!r}, whose part {part!r} is unknown; known: m9, mstd0.5, n2, p0.5 and inc1")
        key = keys[match[1]]
        if key in values:
            raise ValueError(f"{WHERE} is {text!r}, which gives {match[1]!r} twice")
        if key in ("magnitude", "layers", "inc") and "." in match[2]:
            raise ValueError(f"{WHERE} is {text!r}, whose part {part!r} must be a whole number")
        values[key] = float(match[2]) if key in ("deviation", "probability") else int(match[2])
    if values.pop("inc", None) != 1:
        # timm takes inc0 for inc1, too.
        raise ValueError(f"{WHERE} is {text!r}; only the increasing set of operations is known: it must hold 'inc1', as {EXAMPLE!r} does")
    made = RandAugment(**values)
    for key, least, most in (("magnitude", 0, MOST), ("layers", 1, 15), ("probability", 0, 1)):
        if not least <= getattr(made, key) <= most:
            raise ValueError(f"{WHERE} is {text!r}, whose {key} is {getattr(made, key):g}; it must be at least {least} and at most {most}")
    return made


def draw_layers(rng: np.random.Generator, settings: RandAugment) -> tuple[Layer, ...]:
    """The operations of one record, in order; maybe none."""
    names = list(OPERATIONS)
    layers = []
    for number in rng.integers(0, len(names), settings.layers):
        applied = rng.random() < settings.probability
        magnitude = min(max(rng.normal(settings.magnitude, settings.deviation), 0.0), MOST)
        sign = -1 if rng.random() < 0.5 else 1
        if applied:
            layers.append(Layer(names[int(number)], float(magnitude) / MOST, sign))
    return tuple(layers)


def apply_layers(picture: UInt8[np.ndarray, "h w 3"], layers: tuple[Layer, ...]) -> UInt8[np.ndarray, "h w 3"]:
    """The picture after those operations."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    for layer in layers:
        image = OPERATIONS[layer.name](image, layer.level, layer.sign)
    return np.asarray(image)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """What is at (x, y) came from (a x + b y + c, d x + e y + f), counted from the top left corner."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=FILL)


def _enhance(kind: Any) -> Callable[[Image.Image, float, int], Image.Image]:
    """A blend with the picture without color, contrast and so on: factor 1 changes nothing, 0.1 and 1.9 the most."""
    return lambda image, level, sign: kind(image).enhance(max(0.1, 1.0 + sign * 0.9 * level))


def _solarize_add(image: Image.Image, level: float, sign: int) -> Image.Image:
    added = min(128, int(110 * level))
    return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


def _posterize(image: Image.Image, level: float, sign: int) -> Image.Image:
    """Keep 4 bits, or fewer; at the largest magnitude none, which is black as in the reference. Newer versions of Pillow refuse that."""
    mask = 0xFF & ~(2 ** (8 - (4 - int(4 * level))) - 1)
    return image.point([value & mask for value in range(256)] * 3)


# The increasing set, in timm's order. An operation takes (picture, level in 0 ... 1, sign).
OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "auto_contrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
    "rotate": lambda image, level, sign: image.rotate(sign * 30 * level, resample=Image.Resampling.BICUBIC, fillcolor=FILL),
    "posterize": _posterize,
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - int(256 * level)),
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, level, sign: _affine(image, 1, sign * 0.3 * level, 0, 0, 1, 0),
    "shear_y": lambda image, level, sign: _affine(image, 1, 0, 0, sign * 0.3 * level, 1, 0),
    "translate_x": lambda image, level, sign: _affine(image, 1, 0, sign * 0.45 * level * image.width, 0, 1, 0),
    "translate_y": lambda image, level, sign: _affine(image, 1, 0, 0, 0, 1, sign * 0.45 * level * image.height),
}
