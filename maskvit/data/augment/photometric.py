"""Changes of color alone, on 8-bit RGB pictures: drawn once per record, the same for all its pictures.

Color jitter is that of albumentations 1.1 (OpenCV's arithmetic), photometric distortion that of mmsegmentation, three-augment that of
DeiT III (Pillow's arithmetic, as torchvision uses it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from maskvit.data.augment.opencv import from_hsv, to_gray, to_hsv
from maskvit.data.views import Colors, apply_colors

Picture = UInt8[np.ndarray, "h w 3"]

WHERE = "config.data.augment"
THREE_JITTER = 0.3  # of brightness, contrast and saturation
THREE_RADIUS = (0.1, 2.0)  # of the blur, in pixels


class Change(NamedTuple):
    """What is done to a picture: `function(picture, amount)`."""

    function: Callable[[Picture, Any], Picture]
    amount: Any


def _check_ranges(block: Any, where: str, limits: dict[str, tuple[float, float]]) -> None:
    for name, (least, most) in limits.items():
        low, high = getattr(block, name)
        if not least <= low <= high <= most:
            raise ValueError(f"{where}.{name} is {(low, high)}; it must be (low, high) with {least:g} <= low <= high <= {most:g}")


def _check_probability(value: float, where: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{where} is {value}; it is a probability between 0 and 1")


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue in random order (`config.data.augment.color_jitter`), as albumentations 1.1 has it.

    Attributes:
      probability: of any change.
      brightness, contrast, saturation: range of the factor.
      hue: range of the shift; 0.5 is half the circle.
    """

    probability: float | int = 0.5
    brightness: tuple[float, float] = (0.6, 1.4)
    contrast: tuple[float, float] = (0.6, 1.4)
    saturation: tuple[float, float] = (0.8, 1.2)
    hue: tuple[float, float] = (-0.1, 0.1)

    def __post_init__(self) -> None:
        where = f"{WHERE}.color_jitter"
        _check_probability(self.probability, f"{where}.probability")
        factor = (0, 100)
        _check_ranges(self, where, {"brightness": factor, "contrast": factor, "saturation": factor, "hue": (-0.5, 0.5)})

    def draw(self, rng: np.random.Generator) -> list[Change]:
        """The changes of one record, in order."""
        applied = rng.random() < self.probability
        amounts = {name: float(rng.uniform(*getattr(self, name))) for name in ADJUST}
        order = rng.permutation(list(ADJUST))
        return [Change(ADJUST[name], amounts[name]) for name in order] if applied else []


@dataclasses.dataclass(frozen=True)
class PhotometricDistortion:
    """Brightness, contrast (before or after the others), saturation and hue, each with probability 0.5, as mmsegmentation has it.

    `config.data.augment.photometric_distortion`.

    Attributes:
      brightness: most that is added or taken away, in 8-bit levels.
      contrast, saturation: range of the factor.
      hue: most that the hue is turned, in steps of two degrees; as in the reference it is a whole number in -hue ... hue - 1.
    """

    brightness: float | int = 32
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18

    def __post_init__(self) -> None:
        where = f"{WHERE}.photometric_distortion"
        if not 0 <= self.brightness <= 255:
            raise ValueError(f"{where}.brightness is {self.brightness}; it must be at least 0 and at most 255 levels")
        if not 1 <= self.hue <= 90:
            raise ValueError(f"{where}.hue is {self.hue}; it must be at least 1 and at most 90 steps of two degrees")
        _check_ranges(self, where, {"contrast": (0, 100), "saturation": (0, 100)})

    def draw(self, rng: np.random.Generator) -> list[Change]:
        """The changes of one record, in order."""
        wanted = rng.integers(0, 2, 4).astype(bool)  # brightness, contrast, saturation, hue
        contrast_first = bool(rng.integers(0, 2))
        shift = float(rng.uniform(-self.brightness, self.brightness))
        contrast, saturation = (float(rng.uniform(*limits)) for limits in (self.contrast, self.saturation))
        turn = int(rng.integers(-self.hue, self.hue))
        changes = [
            (Change(_add, shift), wanted[0]),
            (Change(_multiply, contrast), wanted[1] and contrast_first),
            (Change(_multiply_saturation, saturation), wanted[2]),
            (Change(_turn_hue, turn), wanted[3]),
            (Change(_multiply, contrast), wanted[1] and not contrast_first),
        ]
        return [change for change, is_wanted in changes if is_wanted]


def draw_gray(rng: np.random.Generator, probability: float) -> list[Change]:
    """A gray picture with some probability."""
    return [Change(adjust_saturation, 0.0)] if rng.random() < probability else []


def draw_three_augment(rng: np.random.Generator) -> list[Change]:
    """One of gray, solarize and Gaussian blur, then brightness, contrast and saturation in random order (DeiT III)."""
    choice = int(rng.integers(0, 3))
    radius = float(rng.uniform(*THREE_RADIUS))
    factors = {name: float(rng.uniform(1 - THREE_JITTER, 1 + THREE_JITTER)) for name in ("brightness", "contrast", "saturation")}
    jitter = tuple((str(name), factors[name]) for name in rng.permutation(list(factors)))
    plain = Colors(jitter=(), grey=choice == 0, blur=radius if choice == 2 else 0.0, solarize=choice == 1)
    return [Change(apply_colors, plain), Change(apply_colors, Colors(jitter, False, 0.0, False))]


# --- OpenCV's and albumentations' arithmetic -----------------------------------------------------------------------------


def _levels(levels: np.ndarray) -> UInt8[np.ndarray, "256"]:
    return np.clip(levels, 0, 255).astype(np.uint8)


def adjust_brightness(picture: Picture, factor: float) -> Picture:
    """x * factor, clipped and truncated."""
    return _levels(np.arange(256) * factor)[picture]


def adjust_contrast(picture: Picture, factor: float) -> Picture:
    """x * factor + m (1 - factor) with m the mean of the gray picture, clipped and truncated."""
    mean = to_gray(picture).mean()
    if factor == 0:
        return np.full_like(picture, int(mean + 0.5))
    return _levels(np.arange(256) * factor + mean * (1 - factor))[picture]


def adjust_saturation(picture: Picture, factor: float) -> Picture:
    """x * factor + gray (1 - factor), rounded; 0 is gray in all three channels."""
    mixed = picture.astype(np.float32) * np.float32(factor) + to_gray(picture)[..., None].astype(np.float32) * np.float32(1 - factor)
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def adjust_hue(picture: Picture, shift: float) -> Picture:
    """The hue (0 ... 179) turned by 180 * shift, truncated."""
    if shift == 0:
        return picture
    hsv = to_hsv(picture)
    hsv[..., 0] = np.mod(np.arange(256) + 180 * shift, 180).astype(np.uint8)[hsv[..., 0]]
    return from_hsv(hsv)


ADJUST = {"brightness": adjust_brightness, "contrast": adjust_contrast, "saturation": adjust_saturation, "hue": adjust_hue}


# --- mmsegmentation's arithmetic --------------------------------------------------------------------------------------------


def _add(picture: Picture, shift: float) -> Picture:
    return _levels(np.arange(256, dtype=np.float32) + np.float32(shift))[picture]


def _multiply(values: UInt8[np.ndarray, "h w *c"], factor: float) -> UInt8[np.ndarray, "h w *c"]:
    return _levels(np.arange(256, dtype=np.float32) * np.float32(factor))[values]


def _multiply_saturation(picture: Picture, factor: float) -> Picture:
    hsv = to_hsv(picture)
    hsv[..., 1] = _multiply(hsv[..., 1], factor)
    return from_hsv(hsv)


def _turn_hue(picture: Picture, steps: int) -> Picture:
    hsv = to_hsv(picture)
    hsv[..., 0] = (hsv[..., 0].astype(np.int32) + steps) % 180
    return from_hsv(hsv)
