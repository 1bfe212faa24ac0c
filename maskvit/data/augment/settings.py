"""`config.data.augment`: what training does to a record, as checked settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from maskvit.core.configuration import check_arguments
from maskvit.data.augment.photometric import ColorJitter, PhotometricDistortion
from maskvit.data.augment.randaugment import RandAugment, parse_randaugment
from maskvit.data.augment.resizing import check_resize
from maskvit.data.views import MultiCrop

WHERE = "config.data.augment"
SHARE_CROPS = ("random_resized", "random_resized_once")  # crops of a share of the picture's area
# Crops of dense tasks, by OpenCV's rules, and the options that they have beside the image size.
DENSE_CROPS: dict[str, dict[str, Any]] = {
    "large_scale_jitter": dict(factor=(0.1, 2.0)),
    "shortest": {},
    "ratio_range": dict(factor=(0.5, 2.0), base_size=(2048, 512), cat_max_ratio=0.75),
}
CROPS = ("random_resized", "center", "none", "random_resized_once", *DENSE_CROPS)
# Each is a whole recipe for colors: one of them at most.
RECIPES = ("color_jitter", "photometric_distortion", "three_augment", "randaugment")


@dataclasses.dataclass(frozen=True)
class Augment:
    """What training does to a record before it is resized, and to its colors (`config.data.augment`).

    Attributes:
      crop: "random_resized", "center" (short side to the image size, middle cut out), "none" (the whole picture),
        "random_resized_once" (one draw, clamped to the picture: MAE's linear probe), or one of dense tasks (`maskvit.data.augment.dense`).
      scale: range of the crop's share of the picture's area.
      ratio: range of the crop's width over its height, drawn log-uniformly.
      flip: probability of a left-right flip.
      resize: "pil" (exact, the reference's) or "cv2" (faster on uint8, needs OpenCV; other modalities stay with "pil"). Crops of dense
        tasks follow OpenCV's rules either way, with "cv2" by OpenCV itself.
      views: two large and several small views of a record in place of one (self-distillation); None for one.
      factor: range of the scale of "large_scale_jitter" (of the picture that fits the image size) and "ratio_range" (of `base_size`).
      base_size: (long, short) of "ratio_range": the picture is made to fit them before the crop.
      cat_max_ratio: of "ratio_range": another crop is drawn, ten times at most, while one class covers this share of its labeled pixels.
      color_jitter, photometric_distortion: blocks of `maskvit.data.augment.photometric`, None for none.
      gray: probability of a gray picture, after `color_jitter`.
      three_augment: DeiT III's: one of gray, solarize and blur, then a color jitter of 0.3.
      randaugment: timm's text, such as "rand-m9-mstd0.5-inc1"; None for none.
    """

    crop: str = "random_resized"
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float | int = 0.5
    resize: str = "pil"
    views: MultiCrop | None = None
    factor: tuple[float, float] | None = None
    base_size: tuple[int, int] | None = None
    cat_max_ratio: float | int | None = None
    color_jitter: ColorJitter | None = None
    gray: float | int = 0.0
    photometric_distortion: PhotometricDistortion | None = None
    three_augment: bool = False
    randaugment: RandAugment | None = None

    def __post_init__(self) -> None:
        if self.views is not None and self.crop != "random_resized":
            raise ValueError(f"{WHERE}.crop is {self.crop!r}, but views are random crops: set it to 'random_resized'")
        if self.crop not in CROPS:
            raise ValueError(f"{WHERE}.crop is {self.crop!r}; known: {', '.join(CROPS)}")
        check_resize(self.resize, f"{WHERE}.resize")
        for name in ("scale", "ratio"):
            value = getattr(self, name)
            if len(value) != 2 or not 0 < value[0] <= value[1]:
                raise ValueError(f"{WHERE}.{name} is {tuple(value)}; it must be (low, high) with 0 < low <= high")
        for name in ("flip", "gray"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{WHERE}.{name} is {getattr(self, name)}; it is a probability between 0 and 1")
        self._check_dense()
        self._check_colors()

    @property
    def recipes(self) -> tuple[str, ...]:
        """The keys of `RECIPES` that are set."""
        return tuple(name for name in RECIPES if getattr(self, name))

    @property
    def pads(self) -> bool:
        """Whether a sample may be larger than its picture."""
        return self.crop in ("large_scale_jitter", "ratio_range")

    def _check_dense(self) -> None:
        """Fill in the options of a dense crop, and raise where one is set that the crop has not, or makes no sense."""
        options = DENSE_CROPS.get(self.crop, {})
        for name in ("factor", "base_size", "cat_max_ratio"):
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, options.get(name))
            elif name not in options:
                having = ", ".join(repr(crop) for crop, has in DENSE_CROPS.items() if name in has)
                raise ValueError(
                    f"{WHERE}.{name} is {value}, but the crop {self.crop!r} has no such option: remove it, or set crop to {having}"
                )
        if self.factor is not None and not 0 < self.factor[0] <= self.factor[1] <= 16:
            raise ValueError(f"{WHERE}.factor is {self.factor}; it must be (low, high) with 0 < low <= high <= 16")
        if self.base_size is not None and not 1 <= self.base_size[1] <= self.base_size[0]:
            raise ValueError(f"{WHERE}.base_size is {self.base_size}; it must be (long, short) in pixels with long >= short >= 1")
        if self.cat_max_ratio is not None and not 0 < self.cat_max_ratio <= 1:
            raise ValueError(f"{WHERE}.cat_max_ratio is {self.cat_max_ratio}; it must be above 0 and at most 1, which allows every crop")

    def _check_colors(self) -> None:
        changes = (*self.recipes, *(("gray",) if self.gray else ()))
        if changes and self.views is not None:
            raise ValueError(f"{WHERE}.{changes[0]} is set, but several views have colors of their own: set those of {WHERE}.views instead")
        if len(self.recipes) > 1:
            raise ValueError(f"{WHERE} sets {' and '.join(self.recipes)}; each is a recipe of its own: keep one of them")
        if self.gray and self.recipes not in ((), ("color_jitter",)):
            raise ValueError(f"{WHERE}.gray is {self.gray}, which goes with color_jitter or alone: remove it or {self.recipes[0]}")


# Keys that are blocks of their own.
BLOCKS: dict[str, Any] = {"views": MultiCrop, "color_jitter": ColorJitter, "photometric_distortion": PhotometricDistortion}


def parse_augment(settings: Mapping[str, Any] | None) -> Augment:
    """Turn `config.data.augment` into `Augment`. Raises ValueError on an unknown key, listing the known ones."""
    settings = dict(settings or {})
    # What is given as plain data for these keys is checked below.
    check_arguments(WHERE, Augment, {key: value for key, value in settings.items() if key != "randaugment"})
    plain = lambda block: {key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in block.items()}  # noqa: E731
    values: dict[str, Any] = plain(settings)
    for key, kind in BLOCKS.items():
        given = values.pop(key, None)
        # An empty block of views is none, as `--config.data.augment.views={}` takes them away; other blocks have defaults.
        if given is None or (key == "views" and not given):
            continue
        check_arguments(f"{WHERE}.{key}", kind, given)
        values[key] = kind(**plain(given))
    text = values.pop("randaugment", None)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{WHERE}.randaugment is {text!r}; it must be text such as 'rand-m9-mstd0.5-inc1', or None")
    augment = Augment(**values, randaugment=parse_randaugment(text) if text else None)
    for name in ("scale", "ratio"):
        if name in settings and augment.crop in DENSE_CROPS:
            raise ValueError(f"{WHERE}.{name} is {settings[name]}, but the crop {augment.crop!r} has no such option: remove it")
    return augment
