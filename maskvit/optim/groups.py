"""Which parameters a setting of the optimizer is about: by regular expressions on their paths, and by their depth in the network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax

from maskvit.core.types import Params, path_name, tree_paths

BLOCK = re.compile(r"encoder/block_(\d+)/.*")
BEFORE_THE_BLOCKS = re.compile(r"inputs/.*|global_tokens|global_pos_embed")


def check_patterns(params: Params, key: str, patterns: Sequence[str]) -> None:
    """Raise where a pattern of config.optimizer.`key` names no parameter: a slip that would change the training in silence."""
    names = tree_paths(params)
    for pattern in patterns:
        try:
            matched = any(re.fullmatch(pattern, name) for name in names)
        except re.error as error:
            raise ValueError(f"config.optimizer.{key} {pattern!r} is no regular expression: {error}") from error
        if not matched:
            raise ValueError(f"config.optimizer.{key} {pattern!r} matches no parameter; they are called {', '.join(list(names)[:4])}, ...")


def matching(params: Params, patterns: Sequence[str]) -> Any:
    """A tree of bools, True for parameters whose whole path ("norm/scale") matches one of the regular expressions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: any(re.fullmatch(p, path_name(path)) for p in patterns), params)


def decay_mask(params: Params, frozen: Any, no_decay: Sequence[str] = ()) -> Any:
    """Which parameters decay: all trainable ones but those whose path ("norm/scale") matches one of the regular expressions."""
    return jax.tree.map(lambda is_frozen, is_exempt: not is_frozen and not is_exempt, frozen, matching(params, no_decay))


def layer_id(name: str, depth: int) -> int:
    """Of a parameter's path in an encoder of `depth` blocks: 0 before the blocks, i + 1 in block i, depth + 1 behind them."""
    if block := BLOCK.fullmatch(name):
        return int(block[1]) + 1
    return 0 if BEFORE_THE_BLOCKS.fullmatch(name) else depth + 1


def layer_scales(params: Params, depth: int, decay: float) -> Any:
    """A tree of factors on the learning rate, decay^(depth + 1 - layer id): 1 behind the blocks, the least before them.

    `depth`: blocks of the encoder. Input adapters, global tokens and their position come before the blocks; the final norm, heads
    and decoders behind. Source: BEiT, 2021, as MAE and MultiMAE fine-tune.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: decay ** (depth + 1 - layer_id(path_name(path), depth)), params)


def rate_scales(params: Params, layer_decay: float | None, lr_scales: Sequence[tuple[str, float]]) -> Any:
    """A tree of each parameter's factor on the learning rate, those of `layer_decay` and of all its patterns multiplied; None: all are 1.

    `lr_scales`: (regular expression, factor). The depth is counted in `params`.
    """
    if layer_decay is None and not lr_scales:
        return None
    check_patterns(params, "lr_scales", [pattern for pattern, _ in lr_scales])
    scales = jax.tree.map(lambda _: 1.0, params)
    if layer_decay is not None:
        depth = len({block[1] for name in tree_paths(params) if (block := BLOCK.fullmatch(name))})
        if not depth:
            raise ValueError(f"config.optimizer.layer_decay is {layer_decay}, but no parameter is called encoder/block_00/...: remove it")
        scales = layer_scales(params, depth, layer_decay)
    for pattern, factor in lr_scales:
        if not factor > 0:
            raise ValueError(f"config.optimizer.lr_scales {pattern!r}: {factor} must be above 0; to train nothing use frozen")
        scales = jax.tree.map(lambda scale, hit, factor=factor: scale * factor if hit else scale, scales, matching(params, (pattern,)))
    return scales


def frozen_with(params: Params, fixed: Any, frozen: Sequence[str]) -> Any:
    """What is not trained: the model's `fixed` parameters, and those that match one of the regular expressions `frozen`."""
    check_patterns(params, "frozen", frozen)
    tree = jax.tree.map(lambda one, other: one or other, fixed, matching(params, frozen))
    if all(jax.tree.leaves(tree)):
        raise ValueError(f"config.optimizer.frozen {tuple(frozen)} leaves no parameter to train")
    return tree
