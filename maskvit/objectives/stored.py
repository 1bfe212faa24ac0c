"""The objective of a checkpoint, from the config inside it: a file that anybody may have written."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from maskvit.core.configuration import check_arguments, look_up, shown
from maskvit.core.errors import Mistakes, message
from maskvit.core.modalities import Modality, parse_modalities
from maskvit.core.types import Params, tree_paths
from maskvit.heads import HEADS
from maskvit.nn.attention import KERNELS
from maskvit.nn.backbone import encoder_sizes
from maskvit.objectives import OBJECTIVES, build_objective, check_blocks, parse_image_size

LONGEST = 400  # characters of an error: a config may hold any text


def class_names(metadata: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """The names of so many classes, as the metadata of a checkpoint record them; () where they do not."""
    stored = metadata.get("label_names")
    if not isinstance(stored, (list, tuple)) or len(stored) != count or not all(isinstance(name, str) for name in stored):
        return ()
    return tuple(stored)


def stored_objective(config: Mapping[str, Any], params: Params, finish: Callable[[Any], Any] = lambda objective: objective) -> Any:
    """`finish` of the objective that `config` describes and `params` are the parameters of.

    Sizes are compared with the stored shapes before anything is built, so that the work is bounded by the size of the checkpoint.
    A config of converted files says nothing of masking: a sixth of all tokens is visible, MultiMAE's own share. A fused attention
    kernel that a run asked for is a choice for its devices: here it is "auto".

    Raises ValueError, in one line, for every config that is not that of these parameters.
    """
    found = {name: tuple(leaf.shape) for name, leaf in tree_paths(params).items()}
    try:
        for key in ("modalities", "image_size", "objective"):
            if key not in config:
                raise ValueError(f"lacks {key!r}: it does not say what model it is of")
        chosen = _check_sizes(config, found)
        if config["objective"].get("attention") in KERNELS[1:]:
            chosen["attention"] = "auto"
        objective = finish(build_objective({**config, "objective": {**config["objective"], **chosen}}))
        expected = {name: leaf.shape for name, leaf in tree_paths(jax.eval_shape(objective.init, jax.random.key(0))[0]).items()}
    except Exception as error:  # the builders expect what a person may write, not what a file may hold
        text = f"lacks {error}" if isinstance(error, KeyError) else message(error)
        text = "; ".join(error.mistakes) if isinstance(error, Mistakes) else text
        text = " ".join(text.split())
        raise ValueError(text if len(text) <= LONGEST else text[: LONGEST - 3] + "...") from error
    check_shapes(expected, found)
    return objective


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError where stored tensors are not those of the model that a config describes."""
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"its parameters are not those of the config inside it: {wrong[0]} has shape {found.get(wrong[0])}, expected "
            f"{expected.get(wrong[0])}" + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
        )


def _check_sizes(config: Mapping[str, Any], found: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Raise where what the cost of building the model depends on is not what is stored. Returns what the config leaves to a default."""
    check_blocks(config)
    block = dict(config["objective"])
    constructor = look_up("config.objective.name", OBJECTIVES, block.pop("name", None))
    check_arguments("config.objective", constructor, block, ("modalities", "image_size"))
    arguments = {name: p.default for name, p in inspect.signature(constructor).parameters.items()} | block
    specs, size = parse_modalities(config["modalities"]), parse_image_size(config["image_size"])
    sizes = encoder_sizes(arguments["encoder"])
    _agree("config.objective.encoder.depth", sizes["depth"], _count(found, "encoder/block_"))
    _names("inputs", arguments["inputs"], found)
    _names("outputs", arguments.get("outputs", ()), found)
    for name in arguments["inputs"]:
        _check_table(f"inputs/{name}", _spec(specs, name), size, sizes["width"], found)
    decoder = arguments.get("decoder") or {}
    for name in arguments.get("outputs", ()):
        if "depth" in decoder:
            _agree("config.objective.decoder.depth", decoder["depth"], _count(found, f"outputs/{name}/block_"))
        _check_table(f"outputs/{name}", _spec(specs, name), size, decoder.get("width"), found)
    if "task" in arguments:
        _check_head({"name": "linear", **(arguments["head"] or {})}, found)
    if "num_visible" in arguments and "num_visible" not in block:
        return {"num_visible": max(1, sum(math.prod(specs[name].grid(size)) for name in arguments["inputs"]) // 6)}
    return {}


def _check_head(block: Mapping[str, Any], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise where the head of a fine-tuned model would have other numbers of layers than are stored; their widths cost nothing."""
    name = block["name"]
    module: Any = HEADS[name].module if isinstance(name, str) and name in HEADS else None
    if hasattr(module, "depth"):
        _agree("config.objective.head.depth", block.get("depth", module.depth), _count(found, f"{name}/block_"))
    if hasattr(module, "pools"):
        stored = {int(match[1]) for path in found if (match := re.match(rf"{name}/pool_(\d+)/", path))}
        _agree("config.objective.head.pools", sorted(block.get("pools", module.pools)), sorted(stored))


def _spec(specs: Mapping[str, Modality], name: str) -> Modality:
    spec = specs.get(name) or specs.get(name.removeprefix("norm_"))
    if spec is None:
        raise ValueError(f"config.modalities lacks {shown(name)}, which config.objective names")
    return spec


def _count(found: Mapping[str, Any], prefix: str) -> int:
    """How many different things of `prefix` there are: "encoder/block_" counts blocks."""
    return len({name[len(prefix) :].partition("/")[0] for name in found if name.startswith(prefix)})


def _agree(key: str, stated: Any, stored: Any) -> None:
    if stated != stored:
        raise ValueError(f"{key} is {shown(stated)}, but the parameters stored are those of {shown(stored)}")


def _names(part: str, stated: Sequence[str], found: Mapping[str, Any]) -> None:
    """Raise unless the names that the config gives to a part of the model are those of the stored tensors, each once."""
    stored = {match[1] for name in found if (match := re.match(rf"{part}/([^/]+)/", name))}
    stored = {name for name in stored if name in stated or not name.startswith("error_")}  # those come with a guidance source
    _agree(f"config.objective.{part}", sorted(stated), sorted(stored))


def _check_table(place: str, spec: Modality, size: tuple[int, int], width: Any, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless the position table of an input or output has the grid and the width that the config gives it."""
    shape = found.get(f"{place}/pos_embed") or found.get(f"{place}/learned_pos_embed") or ()
    grid = spec.grid(size)
    if len(shape) != 3 or shape[:2] != grid or (width is not None and shape[2] != width):
        raise ValueError(
            f"its parameters are not those of the config inside it: the positions of {place} have the shape {shape}, expected "
            f"{grid} (rows, columns)" + ("" if width is None else f" of width {shown(width)}")
        )
