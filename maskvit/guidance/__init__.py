"""Guidance sources: importance per token. A row of `GUIDANCE` is a frozen dataclass whose fields are config keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maskvit.core.configuration import named_function
from maskvit.guidance.attention import SelfAttention, TeacherAttention
from maskvit.guidance.bipartition import Bipartition
from maskvit.guidance.canvas import AverageError, ReusedAttention
from maskvit.guidance.cheap import CoarseAttention, MergedAttention, SampledAttention
from maskvit.guidance.errors import PredictedError, ReconstructionError
from maskvit.guidance.predicted import PredictedAttention
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


def build_source(block: Any, where: str = "config.objective.guidance") -> Source:
    """`{"name": ..., **fields}` to a source. A field that is itself such a block (`of`) is built the same way."""
    constructor, arguments = named_function(where, GUIDANCE, block, given=())
    fields = {key: build_source(value, f"{where}.{key}") if isinstance(value, Mapping) else value for key, value in arguments}
    return constructor(**fields)
