"""Heads: what reads a backbone's features. `DECODERS` rebuild one modality's patches from the encoded visible tokens; `HEADS` read
encoded tokens one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from maskvit.core.configuration import check_arguments, hashable, look_up
from maskvit.heads.crossmae import CrossMaeDecoder, crossmae_options
from maskvit.heads.mae import MaeDecoder
from maskvit.heads.prototypes import Projection
from maskvit.heads.spatial import SpatialDecoder
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


class Head(NamedTuple):
    """A row of `HEADS`: parameters stand under the row's name.

    `module(dtype, **options)`; `stream`: which random stream its initial values are drawn from; `everything`: the method that touches
    every parameter; `fixed(**options)`: patterns of parameters that are never trained.
    """

    module: Callable[..., Any]
    stream: int
    everything: str = "__call__"
    fixed: Callable[..., tuple[str, ...]] = lambda **options: ()


DECODERS = {
    "spatial": Decoder(SpatialDecoder, least_depth=0),
    "mae": Decoder(MaeDecoder),
    "crossmae": Decoder(CrossMaeDecoder, crossmae_options, decodes_part=True),
}
HEADS = {
    # A classifier is float32 whatever the compute type.
    "head": Head(lambda dtype, num_classes: Dense(num_classes, jnp.float32), 1),
    "projection": Head(Projection, 2, "all", lambda fixed_scale=False, **sizes: (r"projection/.*scale",) if fixed_scale else ()),
}


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
