"""Tensors of the MAE and CrossMAE references under our names: a small mapping for tests of the models themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

PREFIXES = (
    (r"^blocks\.(\d+)\.", lambda m: f"encoder/block_{int(m[1]):02d}/"),
    (r"^decoder_blocks\.(\d+)\.", lambda m: f"OUT/block_{int(m[1]):02d}/"),
    (r"^dec_norms\.(\d+)\.", lambda m: f"OUT/context_norm_{int(m[1]):02d}/"),
    (r"^decoder_embed\.", "OUT/context_proj/"),
    (r"^decoder_norm\.", "OUT/norm/"),
    (r"^decoder_pred\.", "OUT/head/"),
    (r"^patch_embed\.", "inputs/rgb/"),
)


def to_tree(tensors: Mapping[str, np.ndarray], output: str = "norm_rgb") -> dict[str, Any]:
    """Every tensor in its place of the parameter tree; position tables without the class token's row of zeros."""
    tree: dict[str, Any] = {}
    for key, value in tensors.items():
        path, value = renamed(key, np.asarray(value))
        node = tree
        *parents, last = path.replace("OUT", f"outputs/{output}").split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        assert last not in node, key
        node[last] = value
    return tree


def renamed(key: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """(our path, our layout) of one tensor."""
    if key in ("cls_token", "mask_token"):
        return ("global_tokens", value[0]) if key == "cls_token" else ("OUT/mask_token", value[0, 0])
    if key.endswith("pos_embed"):
        assert not value[0, 0].any()
        side = int((value.shape[1] - 1) ** 0.5)
        return ("inputs/rgb/" if key == "pos_embed" else "OUT/") + "pos_embed", value[0, 1:].reshape(side, side, -1)
    if key == "wfm.linear.weight":
        return "OUT/feature_weights", value
    path = key
    for pattern, ours in PREFIXES:
        path = re.sub(pattern, ours, path)
    path = path.replace(".", "/")
    if not path.endswith("/weight"):
        return path, value
    if value.ndim == 1:
        return path.removesuffix("weight") + "scale", value
    kernel = value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0]) if value.ndim == 4 else value.T
    return path.removesuffix("weight") + "kernel", np.ascontiguousarray(kernel)
