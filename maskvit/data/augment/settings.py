"""`config.data.augment`: what training does to a record, as checked settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from maskvit.core.configuration import check_arguments
from maskvit.data.augment.resizing import check_resize
from maskvit.data.views import MultiCrop

CROPS = ("random_resized", "center", "none")


@dataclasses.dataclass(frozen=True)
class Augment:
    """What training does to a record before it is resized (`config.data.augment`).

    Attributes:
      crop: "random_resized", "center" (short side to the image size, middle cut out) or "none" (the whole picture).
      scale: range of the crop's share of the picture's area.
      ratio: range of the crop's width over its height, drawn log-uniformly.
      flip: probability of a left-right flip.
      resize: "pil" (exact, the reference's) or "cv2" (faster on uint8, needs OpenCV; other modalities stay with "pil").
      views: two large and several small views of a record in place of one (self-distillation); None for one.
    """

    crop: str = "random_resized"
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float | int = 0.5
    resize: str = "pil"
    views: MultiCrop | None = None

    def __post_init__(self) -> None:
        where = "config.data.augment"
        if self.views is not None and self.crop != "random_resized":
            raise ValueError(f"{where}.crop is {self.crop!r}, but views are random crops: set it to 'random_resized'")
        if self.crop not in CROPS:
            raise ValueError(f"{where}.crop is {self.crop!r}; known: {', '.join(CROPS)}")
        check_resize(self.resize, f"{where}.resize")
        for name in ("scale", "ratio"):
            value = getattr(self, name)
            if len(value) != 2 or not 0 < value[0] <= value[1]:
                raise ValueError(f"{where}.{name} is {tuple(value)}; it must be (low, high) with 0 < low <= high")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"{where}.flip is {self.flip}; it is a probability between 0 and 1")


def parse_augment(settings: Mapping[str, Any] | None) -> Augment:
    """Turn `config.data.augment` into `Augment`. Raises ValueError on an unknown key, listing the known ones."""
    settings = dict(settings or {})
    check_arguments("config.data.augment", Augment, settings)
    plain = lambda block: {key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in block.items()}  # noqa: E731
    values: dict[str, Any] = plain(settings)
    given = values.pop("views", None) or {}
    check_arguments("config.data.augment.views", MultiCrop, given)
    views: dict[str, Any] = plain(given)
    return Augment(**values, views=MultiCrop(**views) if views else None)
