"""Heads: what reads a backbone's features. `DECODERS` rebuild one modality's patches from the encoded visible tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maskvit.core.configuration import check_arguments, hashable, look_up
from maskvit.heads.crossmae import CrossMaeDecoder, _crossmae, crossmae_features
from maskvit.heads.mae import MaeDecoder
from maskvit.heads.spatial import SpatialDecoder
from maskvit.nn.encoder import check_sizes

DECODERS = {"spatial": SpatialDecoder, "mae": MaeDecoder, "crossmae": CrossMaeDecoder}


def _sizes(*, width: int = 0, depth: int = 0, heads: int = 0, mlp_ratio: float | int = 4.0) -> None:
    """What every decoder's block may hold; the signature is the reference."""


BLOCKS = {"spatial": _sizes, "mae": _sizes, "crossmae": _crossmae}


def decoder_arguments(block: Mapping[str, Any], encoder_depth: int) -> tuple[str, dict[str, Any]]:
    """`config.objective.decoder` to (name, arguments of that decoder), defaults filled in. Raises on unknown names and keys."""
    given = {key: hashable(value) for key, value in block.items()}
    name = given.pop("name", "spatial")
    decoder = look_up("config.objective.decoder.name", DECODERS, name)
    check_arguments("config.objective.decoder", BLOCKS[name], given)
    arguments = {key: getattr(decoder, key) for key in ("width", "depth", "heads")} | given
    if name == "crossmae":
        chosen = {key: arguments.pop(key) for key in ("features", "use_input") if key in arguments}
        arguments["features"] = crossmae_features(encoder_depth, arguments.get("weighted", True), **chosen)
    check_sizes("config.objective.decoder", arguments, least_depth=0 if name == "spatial" else 1)
    return name, arguments
