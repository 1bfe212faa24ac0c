"""Heads: what reads a backbone's features. `DECODERS` rebuild one modality's patches from the encoded visible tokens; `HEADS` read
encoded tokens one by one, or all of a picture's: a class or a value per picture or pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from maskvit.core.configuration import check_arguments, hashable, look_up, named_function
from maskvit.heads.attentive import AttentiveProbe, Probe
from maskvit.heads.convnext import ConvNextHead
from maskvit.heads.crossmae import CrossMaeDecoder, crossmae_options
from maskvit.heads.dense import LinearHead
from maskvit.heads.dpt import DptHead
from maskvit.heads.mae import MaeDecoder
from maskvit.heads.prototypes import Projection
from maskvit.heads.segmenter import SegmenterHead
from maskvit.heads.spatial import SpatialDecoder
from maskvit.heads.upernet import UperNetHead
from maskvit.nn.encoder import check_sizes
from maskvit.nn.layers import Dense


def _sizes(encoder_depth: int, *, width: int = 0, depth: int = 0, heads: int = 0, mlp_ratio: float | int = 4.0) -> dict[str, Any]:
    """What every decoder's block may hold; the signature is the reference."""
    return {}


class Decoder(NamedTuple):
    """A row of `DECODERS`.

    `module(modality, inputs, grid, **sizes and options)`; `options(encoder_depth, **block)`: its signature is what the decoder's block
    of a config may hold, its result the arguments that are worked out of the block; `least_depth` in blocks; `decodes_part`: whether
    some tokens can be decoded at the cost of those alone.
    """

    module: Any
    options: Callable[..., dict[str, Any]] = _sizes
    least_depth: int = 1
    decodes_part: bool = False


def _last(depth: int) -> tuple[int, ...]:
    """The end of the last block."""
    return (depth,)


def _spread(*shares: float) -> Callable[[int], tuple[int, ...]]:
    """The features at these shares of the depth, each of another block."""

    def layers(depth: int) -> tuple[int, ...]:
        if depth < len(shares):
            raise ValueError(f"the head reads {len(shares)} blocks, but the encoder has {depth}: take another head or a deeper encoder")
        found: tuple[int, ...] = ()
        for share in shares:
            found += (max(round(share * depth), found[-1] + 1 if found else 1),)
        return found

    return layers


class Head(NamedTuple):
    """A row of `HEADS`: parameters stand under the row's name.

    Attributes:
      module: `module(dtype, **options)`. Where it reads "maps" or "pooled" its fields are what the head's block of a config may hold
        (`head_options`), but for what the caller knows: `channels` or `num_classes`, and `dtype`.
      stream: which random stream its initial values are drawn from.
      everything: the method that touches every parameter.
      fixed: `fixed(**options)`: patterns of parameters that are never trained.
      reads: "tokens": encoded tokens one by one. "maps": `(maps, size, train)`, the token maps of chosen blocks, ascending, and
        (height, width) in pixels. "pooled": `(patches, global tokens, train)`.
      layers: `layers(depth)`: the blocks read where the config names none, counted as `Backbone.features` does.
      statistics: whether it may keep running statistics (`maskvit.nn.layers.apply_with_statistics`).
    """

    module: Callable[..., Any]
    stream: int
    everything: str = "__call__"
    fixed: Callable[..., tuple[str, ...]] = lambda **options: ()
    reads: Literal["tokens", "maps", "pooled"] = "tokens"
    layers: Callable[[int], tuple[int, ...]] = _last
    statistics: bool = False

    def example(self, width: int, grid: tuple[int, int], num_global_tokens: int, num_maps: int | None = None) -> tuple[Any, ...]:
        """Inputs of zeros to initialize with: tokens of `width` on `grid`. `num_maps`: how many blocks are read, by default the usual."""
        if self.reads == "tokens":
            return (jnp.zeros((1, width)),)
        if self.reads == "pooled":
            return jnp.zeros((1, grid[0] * grid[1], width)), jnp.zeros((1, num_global_tokens, width * (num_maps or 1)))
        # How many blocks it reads does not depend on the depth.
        return (jnp.zeros((1, *grid, width)),) * (num_maps or len(self.layers(12))), grid


DECODERS = {
    "spatial": Decoder(SpatialDecoder, least_depth=0),
    "mae": Decoder(MaeDecoder),
    "crossmae": Decoder(CrossMaeDecoder, crossmae_options, decodes_part=True),
}
HEADS = {
    # A classifier is float32 whatever the compute type.
    "head": Head(lambda dtype, num_classes: Dense(num_classes, jnp.float32), 1),
    "projection": Head(Projection, 2, "all", lambda fixed_scale=False, **sizes: (r"projection/.*scale",) if fixed_scale else ()),
    "probe": Head(Probe, 3, reads="pooled", statistics=True),
    "attentive": Head(AttentiveProbe, 4, reads="pooled", statistics=True),
    "linear": Head(LinearHead, 5, reads="maps", statistics=True),
    "convnext": Head(ConvNextHead, 6, reads="maps"),
    "segmenter": Head(SegmenterHead, 7, reads="maps"),
    # Of 12 blocks 2, 5, 8 and 11, counted from 0; and 3, 5, 7 and 11.
    "dpt": Head(DptHead, 8, reads="maps", layers=_spread(1 / 4, 1 / 2, 3 / 4, 1)),
    "upernet": Head(UperNetHead, 9, reads="maps", layers=_spread(1 / 3, 1 / 2, 2 / 3, 1), statistics=True),
}
# Fields of a head's module that are not the config's.
GIVEN = ("channels", "num_classes", "dtype", "parent", "name")


def decoder_arguments(block: Mapping[str, Any], encoder_depth: int) -> tuple[str, dict[str, Any]]:
    """`config.objective.decoder` to (name, arguments of that decoder), defaults filled in. Raises on unknown names and keys."""
    given = {key: hashable(value) for key, value in block.items()}
    name = given.pop("name", "spatial")
    row = look_up("config.objective.decoder.name", DECODERS, name)
    check_arguments("config.objective.decoder", row.options, given, ("encoder_depth",))
    arguments = {key: getattr(row.module, key) for key in ("width", "depth", "heads")} | given | row.options(encoder_depth, **given)
    arguments.pop("use_input", None)  # by now a part of `features`
    check_sizes("config.objective.decoder", arguments, least_depth=row.least_depth)
    return name, arguments


def check_layers(where: str, layers: Sequence[int], depth: int) -> None:
    """Raise ValueError, naming `where`, unless `layers` are blocks of an encoder, counted from 1, in ascending order."""
    if list(layers) != sorted(set(layers)) or not 1 <= layers[0] <= layers[-1] <= depth:
        raise ValueError(f"{where} is {tuple(layers)}; give blocks in ascending order, from 1 to the encoder's depth {depth}")


def check_pooled_layers(where: str, name: str, options: Mapping[str, Any], layers: Sequence[int]) -> None:
    """Raise ValueError unless a head of pooled tokens can read these blocks: several are for the global tokens of "probe" alone."""
    if len(layers) > 1 and (name != "probe" or options.get("source", Probe.source) == "mean"):
        raise ValueError(
            f"{where} names {len(layers)} blocks; of several blocks only the head 'probe' with source 'global' or 'both' reads the global "
            "tokens"
        )


def head_options(where: str, block: Mapping[str, Any], width: int, num_global_tokens: int) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """A head's block of a config, `{"name": ..., **options}`, to (name, options as pairs), of the rows that read maps or pooled tokens.

    `width` of what the head reads. Raises ValueError, naming keys as `where`.key, for what is unknown or cannot be.
    """
    modules = {name: row.module for name, row in HEADS.items() if row.reads != "tokens"}
    module, options = named_function(where, modules, block, GIVEN)
    if hasattr(module, "check"):
        outputs = "num_classes" if HEADS[block["name"]].reads == "pooled" else "channels"
        module(**{outputs: 1}, **dict(options)).check(where, width, num_global_tokens)
    return block["name"], options
