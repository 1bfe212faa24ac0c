"""Modality specs as plain data: what one kind of input or target looks like on disk and how its loss is taken.

A modality is declared in the config (`config.modalities.<name> = {...}`) with the fields of `Modality`; rgb, depth and
semseg are three such declarations (`RGB`, `DEPTH`, `SEMSEG`), and nothing else in the package knows their names.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from maskvit.core.configuration import check_arguments, hashable
from maskvit.core.errors import all_mistakes

KINDS = ("continuous", "categorical")
LOSSES = {"continuous": ("mse", "l1"), "categorical": ("cross_entropy",)}


@dataclasses.dataclass(frozen=True)
class Modality:
    """One kind of input or target.

    Attributes:
      name: key in batches, records and parameters.
      kind: "continuous" (pixels are numbers) or "categorical" (pixels are class ids).
      channels: values per pixel, continuous only.
      num_classes: class ids are 0 ... num_classes - 1, categorical only.
      patch: side of a token in *image* pixels (16: a 224 image has a 14 x 14 grid).
      stride: image pixels per pixel of this modality (semseg of MultiMAE is kept at a quarter: 4).
      loss: "mse", "l1" or "cross_entropy".
      scale, mean, std: model value = (stored value * scale - mean) / std, per channel; continuous only.
      standardize: subtract the mean and divide by the deviation of the middle 80 % of a sample's valid pixels
        (MultiMAE's depth), after `scale`.
      missing: the stored value that means "no measurement" (NaN always does), None where every value counts; for
        categorical the id that means "no label".
      metres_per_count: what one stored unit is in meters where the modality is a distance; for pictures and metrics.
      embed_dim: width of the class embedding, categorical only.
      mirrored_channels: channels that point to the left or right (of surface normals the x channel): where a picture is mirrored
        their model value changes its sign, so `mean` must be the value (after `scale`) of no direction. Continuous only.
    """

    name: str
    kind: str = "continuous"
    channels: int = 3
    num_classes: int = 0
    patch: int = 16
    stride: int = 1
    loss: str = "mse"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    standardize: bool = False
    missing: float | int | None = None
    metres_per_count: float | None = None
    embed_dim: int = 64
    mirrored_channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        where = f"config.modalities.{self.name}"
        if self.kind not in KINDS:
            raise ValueError(f"{where}.kind is {self.kind!r}; known: {', '.join(KINDS)}")
        if self.loss not in LOSSES[self.kind]:
            raise ValueError(f"{where}.loss is {self.loss!r}; for a {self.kind} modality: {', '.join(LOSSES[self.kind])}")
        if self.kind == "categorical" and self.num_classes < 1:
            raise ValueError(f"{where}.num_classes is {self.num_classes}; a categorical modality needs at least 1")
        for field in ("channels", "patch", "stride", "embed_dim"):
            if not 1 <= getattr(self, field) <= 2**16:
                raise ValueError(f"{where}.{field} is {getattr(self, field)}; it must be at least 1 and at most {2**16}")
        if self.stride < 1 or self.patch % self.stride:
            raise ValueError(f"{where}.patch ({self.patch}) must be a multiple of its stride ({self.stride})")
        for field in ("mean", "std"):
            if len(getattr(self, field)) not in (1, self.channels):
                raise ValueError(f"{where}.{field} has {len(getattr(self, field))} values for {self.channels} channels")
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"{where}.mean is {self.mean}; it must be finite")
        for field, values in (("scale", (self.scale,)), ("std", self.std), ("metres_per_count", (self.metres_per_count or 1,))):
            if not all(math.isfinite(value) and value > 0 for value in values):
                raise ValueError(f"{where}.{field} is {getattr(self, field)}; it must be finite and above 0")
        if self.kind == "categorical" and self.missing is not None and not float(self.missing).is_integer():
            raise ValueError(f"{where}.missing is {self.missing}; class ids are whole numbers")
        if self.mirrored_channels and (self.kind != "continuous" or self.standardize):
            raise ValueError(f"{where}.mirrored_channels needs a continuous modality without standardize")
        if len(set(self.mirrored_channels)) < len(self.mirrored_channels) or not set(self.mirrored_channels) <= set(range(self.channels)):
            raise ValueError(f"{where}.mirrored_channels is {self.mirrored_channels}; channels are 0 ... {self.channels - 1}, each once")

    @property
    def patch_pixels(self) -> int:
        """Side of a token in this modality's own pixels."""
        return self.patch // self.stride

    @property
    def values_per_token(self) -> int:
        """Width of a prediction for one token: pixels x (channels or classes)."""
        return self.patch_pixels**2 * (self.num_classes if self.kind == "categorical" else self.channels)

    def size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of this modality for an image of `image_size`. Raises if the grid does not divide."""
        for side, axis in zip(image_size, ("height", "width"), strict=True):
            if side % self.patch:
                raise ValueError(
                    f"image {axis} {side} is not a multiple of modality {self.name!r}'s patch {self.patch}: "
                    f"set config.image_size to a multiple of {self.patch} or config.modalities.{self.name}.patch to a divisor"
                )
        return image_size[0] // self.stride, image_size[1] // self.stride

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tokens for an image of `image_size`."""
        self.size(image_size)
        return image_size[0] // self.patch, image_size[1] // self.patch


RGB = dict(kind="continuous", channels=3, patch=16, loss="mse", scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# 1/512 m per count and a full scale of 128 m are Omnidata's (MultiMAE's pseudo-labels); the model sees count / 2**16.
DEPTH = dict(kind="continuous", channels=1, patch=16, loss="l1", scale=1 / 65536, standardize=True, metres_per_count=1 / 512)
SEMSEG = dict(kind="categorical", num_classes=133, patch=16, stride=4, loss="cross_entropy", embed_dim=64)


# What a batch of the loader holds besides modalities: a modality of such a name would be taken for it. The latter stay on the host.
BATCH_FIELDS = ("present", "label", "valid", "guidance", "index", "box", "flip")
HOST_FIELDS = ("id", "reason", "bad", "size")


def parse_modalities(declared: Mapping[str, Any]) -> dict[str, Modality]:
    """Turn `config.modalities` into specs, in name order. Raises on unknown fields, listing the known ones."""
    specs = {}
    with all_mistakes() as checks:
        for name, fields in declared.items():
            with checks.check():
                if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name):
                    raise ValueError(f"config.modalities names {name!r}; a name is made of letters, digits and underscores")
                if name in (*BATCH_FIELDS, *HOST_FIELDS):
                    raise ValueError(f"config.modalities names {name!r}, which a batch holds already; give the modality another name")
                check_arguments(f"config.modalities.{name}", Modality, fields, given=("name",))
                specs[name] = Modality(name=name, **{key: hashable(value) for key, value in fields.items()})
    return specs
