"""Several views of one record, as self-distillation wants them: two large crops, many small ones, colors changed.

Crop, then flip, then colors in the order of DINO: jitter, grey, blur, solarisation; all on 8-bit values, as Pillow computes them
and torchvision uses it. Modalities that are no 8-bit color picture follow the crop and the flip alone.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

GLOBAL_VIEWS = 2
KINDS = ("first large", "second large", "small")
WHERE = "config.data.augment.views"


@dataclasses.dataclass(frozen=True)
class MultiCrop:
    """Two large views of the model's size and small ones (`config.data.augment.views`); large ones take `augment.scale`.

    Attributes:
      local_crops: number of small views.
      local_size: their (height, width).
      local_scale: range of their share of the picture's area.
      jitter: probability of changed colors.
      brightness, contrast, saturation, hue: how far; factors are uniform in 1 -+ it, the hue's shift in -+ it (0.5: the circle).
      grey: probability of a grey picture.
      blur: probability of a Gaussian blur of the first large, the second large and the small views.
      radius: range of its deviation in pixels.
      solarize: probability of inverted values from 128 on, for the same three.
    """

    local_crops: int = 8
    local_size: tuple[int, ...] = (96, 96)
    local_scale: tuple[float, float] = (0.05, 0.4)
    jitter: float | int = 0.8
    brightness: float | int = 0.4
    contrast: float | int = 0.4
    saturation: float | int = 0.2
    hue: float | int = 0.1
    grey: float | int = 0.2
    blur: tuple[float, ...] = (1.0, 0.1, 0.5)
    radius: tuple[float, float] = (0.1, 2.0)
    solarize: tuple[float, ...] = (0.0, 0.2, 0.0)

    def __post_init__(self) -> None:
        if self.local_crops < 0:
            raise ValueError(f"{WHERE}.local_crops is {self.local_crops}; it must be at least 0")
        if len(self.local_size) != 2 or min(self.local_size) < 1:
            raise ValueError(f"{WHERE}.local_size is {self.local_size}; give (height, width)")
        for name in ("local_scale", "radius"):
            low, high = _pair(name, getattr(self, name))
            if not 0 < low <= high:
                raise ValueError(f"{WHERE}.{name} is {(low, high)}; it must be (low, high) with 0 < low <= high")
        for name in ("jitter", "grey", "blur", "solarize"):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if len(values) != (3 if name in ("blur", "solarize") else 1) or not all(0 <= p <= 1 for p in values):
                kinds = f", one for each of {', '.join(KINDS)} views" if name in ("blur", "solarize") else ""
                raise ValueError(f"{WHERE}.{name} is {value}; probabilities lie between 0 and 1{kinds}")
        for name, most in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{WHERE}.{name} is {getattr(self, name)}; it must be between 0 and {most}")

    @property
    def local_image_size(self) -> tuple[int, int]:
        """`local_size`, of which `__post_init__` has made sure that it is a pair."""
        return self.local_size[0], self.local_size[1]


def _pair(name: str, value: tuple[float, ...]) -> tuple[float, float]:
    if len(value) != 2:
        raise ValueError(f"{WHERE}.{name} is {value}; give (low, high)")
    return value[0], value[1]


class Colors(NamedTuple):
    """What is done to the colors of one view; drawn once, the same for all its color modalities.

    `jitter`: (operation, amount) in the order in which they are applied; `blur`: the radius, 0 for none.
    """

    jitter: tuple[tuple[str, float], ...]
    grey: bool
    blur: float
    solarize: bool


def draw_colors(rng: np.random.Generator, kind: int, settings: MultiCrop) -> Colors:
    """The draws of a view of kind 0 (first large), 1 (second large) or 2 (small)."""
    jittered = rng.random() < settings.jitter
    order = rng.permutation(4)
    factors = {name: 1 + getattr(settings, name) * rng.uniform(-1, 1) for name in ("brightness", "contrast", "saturation")}
    factors["hue"] = settings.hue * rng.uniform(-1, 1)
    names = list(factors)
    jitter = tuple((names[i], float(factors[names[i]])) for i in order) if jittered else ()
    grey = bool(rng.random() < settings.grey)
    blurred, radius = rng.random() < settings.blur[kind], rng.uniform(*settings.radius)
    return Colors(jitter, grey, float(radius) if blurred else 0.0, bool(rng.random() < settings.solarize[kind]))


def apply_colors(picture: UInt8[np.ndarray, "h w 3"], colors: Colors) -> UInt8[np.ndarray, "h w 3"]:
    """Change the colors of a picture."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    for name, amount in colors.jitter:
        image = JITTER[name](image, amount)
    if colors.grey:
        image = image.convert("L").convert("RGB")
    if colors.blur:
        image = image.filter(ImageFilter.GaussianBlur(colors.blur))
    if colors.solarize:
        image = ImageOps.solarize(image)
    return np.asarray(image)


def _shift_hue(image: Image.Image, amount: float) -> Image.Image:
    """Turn the hue by `amount` of the circle, in Pillow's 256 steps."""
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int32) + int(amount * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")


JITTER = {
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "saturation": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "hue": _shift_hue,
}
