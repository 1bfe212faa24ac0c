"""A file's tensors under the names that the rules of its family use, and what the file does not say of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from maskvit.convert.reader import ConversionError

TARGETS = ("normalized", "raw")
HEADS_OF_WIDTH = {1280: 16}  # ViT-H; all other common sizes have heads of width 64


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
    """What shapes do not tell: flags first, then what stands beside the tensors.

    Attributes:
      num_heads, decoder_num_heads, target: flags; None where not given.
      args: the training arguments in the file, or Hugging Face's config.json beside it.
    """

    num_heads: int | None = None
    decoder_num_heads: int | None = None
    target: str | None = None
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def number(self, *names: str) -> Any:
        """The first of these arguments that is a positive whole number, else None."""
        return next((self.args[name] for name in names if type(self.args.get(name)) is int and self.args[name] > 0), None)

    def _heads(self, width: int, given: int | None, said: int | None, head_width: int, which: str, flag: str, where: str) -> int:
        """Heads leave no trace in the shapes: the flag, else what the file says, else the usual width per head."""
        if given is None and said is None and width % head_width:
            raise ConversionError(f"{where}: the {which}'s width {width} is no multiple of {head_width}: give {flag}")
        heads = next(number for number in (given, said, width // head_width) if number is not None)
        if heads < 1 or width % heads:
            raise ConversionError(
                f"{where}: the {which}'s width {width} does not divide into {heads} heads; {flag} says how many there are"
            )
        return heads

    def heads(self, width: int, where: str, known: int | None = None) -> int:
        """Heads of the encoder; `known`: what the model's name in the file means."""
        said = self.number("num_heads", "num_attention_heads") or known or HEADS_OF_WIDTH.get(width)
        return self._heads(width, self.num_heads, said, 64, "encoder", "--num-heads", where)

    def decoder_heads(self, width: int, where: str) -> int:
        """Heads of the decoder or decoders."""
        said = self.number("decoder_num_heads", "decoder_num_attention_heads")
        return self._heads(width, self.decoder_num_heads, said, 32, "decoder", "--decoder-num-heads", where)

    def normalized(self, where: str) -> bool:
        """Whether a masked autoencoder predicts per-patch normalised pixels, which nothing in its tensors shows."""
        if self.target is not None:
            return self.target == "normalized"
        if type(self.args.get("norm_pix_loss")) is bool:
            return self.args["norm_pix_loss"]
        raise ConversionError(
            f"{where}: does not say whether its decoder predicts raw pixels (MAE's mae_visualize_* files) or pixels normalised per "
            "patch (its *_full files): give --target raw or --target normalized"
        )
