"""What one record costs a core of the processor, stage by stage of the loader."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from maskvit.data.augment import change_pictures
from maskvit.data.augment.dense import DENSE
from maskvit.data.augment.geometry import draw_geometry
from maskvit.data.order import record_rng
from maskvit.data.probing import READ_ERRORS

LEAST_SHARE = 0.05  # stages that take less of the whole are summed up as others


def stage_seconds(chunks: Any, count: int = 16) -> dict[str, float]:
    """Seconds of a core per record, of every stage of a training pipeline (`maskvit.data.records._TrainChunks`), in their order.

    "read" (in which a disk may be waited for); "decode NAME" per modality; then "crop NAME" per modality and "colors", or "crop" of dense
    tasks, or "views". Taken of `count` records, spread over the data, one after the other in this thread; records that cannot be read
    are left out. {} where none can.
    """
    found: dict[str, float] = {}
    used = 0
    for index in np.linspace(0, len(chunks.source) - 1, min(count, len(chunks.source))).astype(int).tolist():
        try:
            stages = _stages(chunks, index)
        except READ_ERRORS:
            continue
        used += 1
        for name, seconds in stages.items():
            found[name] = found.get(name, 0.0) + seconds
    return {name: seconds / used for name, seconds in found.items()}


def _stages(chunks: Any, index: int) -> dict[str, float]:
    """The stages of one record, as `_TrainChunks` goes through them."""
    stages: dict[str, float] = {}

    def timed(name: str, function: Any, *arguments: Any, clock: Any = time.thread_time) -> Any:
        start = clock()
        result = function(*arguments)
        stages[name] = clock() - start
        return result

    augment = chunks.augment
    arrays: dict[str, np.ndarray] = {}
    record = timed("read", chunks.source.__getitem__, index, clock=time.perf_counter)
    for name in chunks.modalities:
        if len(record.get(name, b"")):
            arrays |= timed(f"decode {name}", chunks.decode_alone, record, name)
    rng = record_rng(chunks.seed, 0, index)
    if augment.views is not None:
        timed("views", chunks.cut_views, rng, record, arrays, augment.views)
    elif augment.crop in DENSE:
        timed("crop", chunks.augmented, rng, index, record, arrays, 1)
    else:
        height, width = next(iter(arrays.values())).shape[:2]
        geometry = draw_geometry(rng, height, width, chunks.image_size, augment)
        made: dict[str, Any] = {}
        for name in arrays:
            made |= timed(f"crop {name}", chunks.transformed, arrays, (name,), geometry, augment.resize)
        pictures = {name: made[name] for name in sorted(chunks.pictures) if name in made}
        timed("colors", change_pictures, rng, pictures, augment)
    return stages


def describe_stages(stages: Mapping[str, float]) -> str:
    """One line, the slowest stage first: "12.3 ms of a core: decode depth 5.1, crop rgb 3.2, others 4.0"."""
    total = sum(stages.values())
    parts = sorted(((seconds, name) for name, seconds in stages.items() if seconds >= LEAST_SHARE * total), reverse=True)
    rest = total - sum(seconds for seconds, _ in parts)
    shown = [f"{name} {1e3 * seconds:.1f}" for seconds, name in parts] + ([f"others {1e3 * rest:.1f}"] if rest > 0 else [])
    return f"{1e3 * total:.1f} ms of a core: {', '.join(shown)}"
