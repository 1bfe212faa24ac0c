"""A file's tensors under the names that the rules of its family use, and what the file does not say of itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from maskvit.convert.facts import DECLARED, statistics
from maskvit.convert.formats import ConversionError
from maskvit.core import modalities as known
from maskvit.core.modalities import Modality

TARGETS = ("normalized", "raw")
HEADS_OF_WIDTH = {1280: 16}  # ViT-H; all other common sizes have heads of width 64
HEAD_WIDTHS = {"encoder": 64, "decoder": 32, "Segmenter": 64}
STATISTICS = ("mean", "std", "scale")
NO_STATISTICS = dict(mean=(0.0,), std=(1.0,))


class Source(NamedTuple):
    """The tensors of a file.

    Attributes:
      where, family: the file and what it is taken for, for errors.
      tensors: by the names that the rules use.
      keys: the file's own key of each.
      left_out: the file's own keys of what is not read: their shapes, and why.
    """

    where: str
    tensors: dict[str, np.ndarray]
    keys: dict[str, str]
    left_out: dict[str, tuple[tuple[int, ...], str]]
    family: str = "this family"

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor that must be there with that many axes; ConversionError names what is wrong."""
        if name not in self.tensors:
            raise ConversionError(f"{self.where}: looks like {self.family}, but lacks {name!r}")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != axes or 0 in shape:
            raise ConversionError(
                f"{self.where}: looks like {self.family}, but {name!r} has the shape {shape}; {axes} axes expected, none of them empty"
            )
        return shape


@dataclasses.dataclass(frozen=True)
class Hints:
    """What shapes do not tell: flags first, then what stands in the file or beside it, then what is usual, which is logged.

    Attributes:
      num_heads, decoder_num_heads, target: flags; None where not given.
      args: the training arguments in the file, and what the files beside it say.
      grid: flag, rows and columns of the position table.
      rgb: flags, "mean", "std" and "scale" of the input.
      said: what was assumed, and the flag that changes it; added to as it is asked.
    """

    num_heads: int | None = None
    decoder_num_heads: int | None = None
    target: str | None = None
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grid: tuple[int, int] | None = None
    rgb: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    said: list[str] = dataclasses.field(default_factory=list)

    def declared(self, name: str, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
        """A modality as a file of ours notes it (`own_facts`), with `fields` that the tensors show; {} where nothing is noted.

        Raises ConversionError for a note of another modality than the tensors', or of none.
        """
        noted = self.args.get(DECLARED)
        noted = noted.get(name) if isinstance(noted, Mapping) else None
        if not isinstance(noted, Mapping):
            return {}
        found = {key: tuple(value) if isinstance(value, list) else value for key, value in noted.items()}
        if differing := [key for key in fields if key in found and found[key] != fields[key]]:
            key = differing[0]
            raise ConversionError(f"{where}: its note says {key} = {found[key]!r:.80} of {name!r}, and its tensors {fields[key]!r}")
        try:
            Modality(name=name, **{**found, **fields})
        except (TypeError, ValueError) as error:
            raise ConversionError(f"{where}: its note on {name!r} describes no modality: {error}") from error
        return {**found, **fields}

    def number(self, *names: str) -> Any:
        """The first of these arguments that is a positive whole number, else None."""
        return next((self.args[name] for name in names if type(self.args.get(name)) is int and self.args[name] > 0), None)

    def _heads(self, width: int, given: int | None, stated: int | None, usual: int | None, which: str, flag: str, where: str) -> int:
        """Heads leave no trace in the shapes: the flag, else what the file says, else the usual number, which is logged."""
        heads = next((number for number in (given, stated, usual) if number is not None), None)
        if heads is None:
            raise ConversionError(f"{where}: the {which}'s width {width} is no multiple of {HEAD_WIDTHS[which]}: give {flag}")
        if heads < 1 or width % heads:
            raise ConversionError(
                f"{where}: the {which}'s width {width} does not divide into {heads} heads; {flag} says how many there are"
            )
        if given is None and stated is None:
            self.said.append(f"assumed: {heads} heads in the {which}, as is usual at width {width}; {flag} changes it")
        return heads

    def heads(self, width: int, where: str, known: int | None = None) -> int:
        """Heads of the encoder; `known`: what the model's name in the file means."""
        stated = self.number("num_heads", "num_attention_heads") or known
        usual = HEADS_OF_WIDTH.get(width) or (None if width % HEAD_WIDTHS["encoder"] else width // HEAD_WIDTHS["encoder"])
        return self._heads(width, self.num_heads, stated, usual, "encoder", "--num-heads", where)

    def decoder_heads(self, width: int, where: str) -> int:
        """Heads of the decoder or decoders."""
        stated = self.number("decoder_num_heads", "decoder_num_attention_heads")
        usual = None if width % HEAD_WIDTHS["decoder"] else width // HEAD_WIDTHS["decoder"]
        return self._heads(width, self.decoder_num_heads, stated, usual, "decoder", "--decoder-num-heads", where)

    def segmenter_heads(self, width: int, where: str) -> int:
        """Heads of a Segmenter, a decoder with heads as wide as the encoder's."""
        usual = None if width % HEAD_WIDTHS["Segmenter"] else width // HEAD_WIDTHS["Segmenter"]
        return self._heads(width, self.decoder_num_heads, self.number("segmenter_heads"), usual, "Segmenter", "--decoder-num-heads", where)

    def normalized(self, where: str) -> bool:
        """Whether a masked autoencoder predicts per-patch normalized pixels, which nothing in its tensors shows."""
        if self.target is not None:
            return self.target == "normalized"
        if type(self.args.get("norm_pix_loss")) is bool:
            return self.args["norm_pix_loss"]
        raise ConversionError(
            f"{where}: does not say whether its decoder predicts raw pixels (MAE's mae_visualize_* files) or pixels normalized per "
            "patch (its *_full files): give --target raw or --target normalized"
        )

    def _stated_grid(self, patch: int) -> tuple[int, int] | None:
        """Rows and columns of the image size that the file states."""
        for name in ("image_size", "img_size", "input_size"):
            size = self.args.get(name)
            sides = (size, size) if type(size) is int else tuple(size)[-2:] if isinstance(size, (list, tuple)) else ()
            if len(sides) == 2 and all(type(side) is int and side >= patch and side % patch == 0 for side in sides):
                return sides[0] // patch, sides[1] // patch
        return None

    def grid_of(self, positions: int, patch: int, class_token: bool, where: str) -> tuple[int, int]:
        """Rows and columns of a position table of so many rows, of which one may be the class token's.

        A flag or what the file states decides. Else the grid is taken to be square, which is logged.
        """
        possible = (positions, positions - 1) if class_token else (positions,)
        for grid, flag in ((self.grid, True), (self._stated_grid(patch), False)):
            if grid is not None and math.prod(grid) in possible:
                return grid
            if grid is not None and flag:
                raise ConversionError(f"{where}: --grid {grid[0]}x{grid[1]} has {math.prod(grid)} places, but its table {positions} rows")
        # A square number of rows leaves none for the class token: timm's `no_embed_class`.
        square = next((count for count in possible if count and math.isqrt(count) ** 2 == count), None)
        if square is None:
            raise ConversionError(
                f"{where}: its position table has {positions} rows{' with the class token' * class_token}, which are no square grid: "
                "give --grid ROWSxCOLUMNS"
            )
        side = math.isqrt(square)
        self.said.append(f"assumed: a square grid of {side} x {side} positions; --grid ROWSxCOLUMNS changes it")
        return side, side

    def statistics(self, channels: int, where: str) -> dict[str, Any]:
        """`scale`, `mean` and `std` of the input: model value = (stored value * scale - mean) / std."""
        stated = {name.removeprefix("rgb_"): value for name, value in statistics(*(self.args.get(f"rgb_{n}") for n in STATISTICS)).items()}
        if stated and not all(len(stated[name]) in (1, channels) for name in ("mean", "std")):
            self.said.append(f"the mean and deviation that are stated are not those of {channels} channels, and not used")
            stated = {}
        usual: dict[str, Any] = {name: known.RGB[name] for name in STATISTICS} if channels == 3 else dict(NO_STATISTICS)
        usual["scale"] = 1 / 255 if channels in (1, 3) else 1.0
        found = {**usual, **stated, **{name: value for name, value in self.rgb.items() if value is not None}}
        found |= {name: tuple(float(value) for value in found[name]) for name in ("mean", "std")}
        for name in ("mean", "std"):
            if len(found[name]) not in (1, channels):
                raise ConversionError(f"{where}: --{name} has {len(found[name])} values for {channels} channels")
        assumed = [f"{name} {_short(found[name])}" for name in STATISTICS if name not in stated and self.rgb.get(name) is None]
        if assumed:
            of = "ImageNet's " if channels == 3 else f"for {channels} channel{'s' * (channels != 1)} "
            flags = "--mean, --std and --scale change them"
            self.said.append(f"assumed: {of}{', '.join(assumed)} of stored values; {flags}")
        return found


def _short(value: Any) -> str:
    return "1/255" if value == 1 / 255 else " ".join(f"{x:g}" for x in value) if isinstance(value, tuple) else f"{value:g}"
