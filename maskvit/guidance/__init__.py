"""Guidance sources: importance per token. A row of `GUIDANCE` is a frozen dataclass whose fields are config keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from maskvit.configuration import hashable, look_up
from maskvit.guidance.attention import SelfAttention, TeacherAttention
from maskvit.guidance.bipartition import Bipartition
from maskvit.guidance.canvas import AverageError, ReusedAttention
from maskvit.guidance.cheap import CoarseAttention, MergedAttention, PredictedAttention, SampledAttention
from maskvit.guidance.errors import PredictedError, ReconstructionError
from maskvit.guidance.source import Request, Source
from maskvit.guidance.stored import BlockMask, RandomMap, Stored

GUIDANCE: dict[str, type[Source]] = {
    "self_attention": SelfAttention,
    "teacher_attention": TeacherAttention,
    "coarse_attention": CoarseAttention,
    "sampled_attention": SampledAttention,
    "merged_attention": MergedAttention,
    "predicted_attention": PredictedAttention,
    "reused_attention": ReusedAttention,
    "average_error": AverageError,
    "reconstruction_error": ReconstructionError,
    "predicted_error": PredictedError,
    "bipartition": Bipartition,
    "stored": Stored,
    "random_map": RandomMap,
    "block_mask": BlockMask,
}

__all__ = ["GUIDANCE", "Request", "Source", "build_source"]


def build_source(block: Mapping[str, Any], where: str = "config.objective.guidance") -> Source:
    """`{"name": ..., **fields}` to a source. A field that is itself such a block (`of`) is built the same way."""
    if "name" not in block:
        raise ValueError(f"{where} lacks the key 'name'; known names: {', '.join(GUIDANCE)}")
    constructor = look_up(f"{where}.name", GUIDANCE, block["name"])
    known = [field.name for field in dataclasses.fields(constructor)]
    fields = {}
    for key, value in block.items():
        if key == "name":
            continue
        if key not in known:
            raise ValueError(f"{where} has unknown key {key!r} for {block['name']!r}; known: {', '.join(known) or 'none'}")
        fields[key] = build_source(value, f"{where}.{key}") if isinstance(value, Mapping) else hashable(value)
    return constructor(**fields)
