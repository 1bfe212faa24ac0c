"""The input pipeline alone."""

from __future__ import annotations

import os
import time
from typing import Any


def stated_modalities(data_dir: str, name: str) -> Any:
    """The modalities that a prepared data set states, else rgb, depth and semantic maps; fields that it does not state are usual ones."""
    from maskvit.core.modalities import DEPTH, RGB, SEMSEG, parse_modalities
    from maskvit.data.sources import STATED, open_builder

    stated = (open_builder(os.path.abspath(os.path.expanduser(data_dir)), name).info.metadata or {}).get("modalities", {})
    usual = dict(rgb=RGB, depth=DEPTH, semseg=SEMSEG)
    declared = {}
    for key in stated or usual:
        fields = {field: value for field, value in stated.get(key, {}).items() if field in STATED}
        loss = {"loss": "cross_entropy"} if fields.get("kind") == "categorical" else {}
        declared[key] = {**usual.get(key, loss), **fields}
    return parse_modalities(declared)


def bench_loader(name: str, data_dir: str, split: str, image: int, batch: int, batches: int, workers: int, resize: str) -> dict[str, Any]:
    """Records per second of the training pipeline: read, decode, crop, flip, batch. The first batch is not timed.

    Beside it what each stage takes of one core (milliseconds per record), and how many records a second one core makes by that.
    """
    from maskvit.data import open_source
    from maskvit.data.batches import train_batches

    modalities = stated_modalities(data_dir, name)
    source = open_source("tfds", modalities, name=name, data_dir=data_dir, split=split)
    augment = dict(crop="random_resized", scale=(0.2, 1.0), ratio=(0.75, 4 / 3), flip=0.5, resize=resize)
    stream = train_batches(source, modalities, (image, image), seed=0, global_batch=batch, augment=augment, workers=workers)
    try:
        next(stream)
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
        seconds = time.perf_counter() - start
        stages = stream.stage_seconds(count=64)
    finally:
        stream.close()
    return dict(
        measurement="loader", source=source.describe(), image=image, batch=batch, batches=batches, workers=workers, resize=resize,
        seconds=seconds, records_per_s=batch * batches / seconds, records_per_s_of_a_core=1 / sum(stages.values()),
        stages_ms={name: round(1e3 * value, 3) for name, value in stages.items()},
    )  # fmt: skip
