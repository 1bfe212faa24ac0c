"""The TFDS builder of `scenes` (`maskvit.data.scenes`): rgb as PNG, depth and classes as packed arrays, all exact."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from maskvit.data import scenes
from maskvit.data.builders.records import RecordBuilder, in_processes, progress
from maskvit.data.codec import encode_array

FIRST_VAL = 2**31  # index of the first validation scene: the same scenes whatever num_train is


def record(index: int, seed: int, size: tuple[int, int]) -> dict[str, Any]:
    """Render scene `index` and encode it as a record (without its id)."""
    sample = scenes.render(seed, index, size)
    png = io.BytesIO()
    Image.fromarray(sample["rgb"]).save(png, "PNG", compress_level=4)
    counts = np.nan_to_num(sample["depth"] / scenes.METRES_PER_COUNT, nan=scenes.MISSING)
    return {
        "label": sample["label"],
        "rgb": png.getvalue(),
        "depth": encode_array(np.clip(np.rint(counts), 0, 65535).astype(np.uint16)),
        "semseg": encode_array(sample["semseg"]),
    }


class Scenes(RecordBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Ray-cast solids on textured ground: rgb, depth (uint16, 1/512 m per count, 0 = sky), semseg, label = kind of the nearest.

    Args:
      data_dir: TFDS's root.
      name: folder under it.
      num_train, num_val: scenes per split. Their first ones do not depend on these numbers.
      size: (height, width) or one number for both.
      seed: which scenes.
      workers: processes that render; 0 renders in this one.
    """

    def __init__(
        self,
        *,
        data_dir: str,
        name: str = "scenes",
        num_train: int = 3000,
        num_val: int = 500,
        size: int | tuple[int, int] = 64,
        seed: int = 0,
        workers: int = 0,
    ):
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        if min(self.size) < 8 or min(num_train, num_val) < 1:
            raise ValueError(f"scenes of size {self.size}, {num_train} + {num_val} of them: need at least 8 x 8 pixels and 1 + 1 scenes")
        if num_train > FIRST_VAL:
            raise ValueError(f"num_train is {num_train}; at most {FIRST_VAL}")
        self.seed, self.workers = seed, workers
        self.counts = {"train": num_train, "val": num_val}
        super().__init__(
            name=name,
            data_dir=data_dir,
            modalities=scenes.MODALITIES,
            label_names=scenes.KIND_NAMES,
            pixel_classes={"semseg": scenes.CLASS_NAMES},
            recipe=dict(builder="scenes", renderer=scenes.VERSION, num_train=num_train, num_val=num_val, size=self.size, seed=seed),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(split) for split in self.counts}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        count = self.counts[split]
        first = FIRST_VAL if split == "val" else 0
        render = functools.partial(record, seed=self.seed, size=self.size)
        rendered = in_processes(render, range(first, first + count), self.workers)
        for number, fields in enumerate(progress(rendered, count, f"{self.name} {split}")):
            yield number, {"id": f"{split}/{number:06d}", **fields}
