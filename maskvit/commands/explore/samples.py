"""The files that the page shows: a folder of pictures, or of one folder per modality, paired by name."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from maskvit.data.batches import eval_batches
from maskvit.data.builders.layout import TWICE, Task, list_modality
from maskvit.data.builders.samples import read_sample
from maskvit.data.files import tell
from maskvit.data.sources import ListSource
from maskvit.features import find_pictures, first_input

_log = logging.getLogger(__name__)


def find_samples(root: Path, model: Any) -> list[Task]:
    """What lies below `root`: <modality>/<file> of the modalities of a model, paired by name; without such folders pictures of its first
    input.

    A sample has at least one input; what else it lacks is absent. Raises FileNotFoundError where there is nothing, ValueError where two
    files have one name or pictures cannot be given as the first input.
    """
    names = [spec.name for spec in model.modalities if (root / spec.name).is_dir()]
    if not any(name in model.inputs for name in names):
        spec = first_input(model)
        paths = find_pictures([root])
        top = root if root.is_dir() else root.parent
        return [Task(path.relative_to(top).as_posix(), {spec.name: str(path)}) for path in paths]
    files: dict[str, dict[str, str]] = {}
    for name in names:
        found = list_modality(os.fspath(root / name))
        for kind, text, _ in found.problems:
            if kind == TWICE:
                raise ValueError(f"two files for one name: {text}")
        for line in tell(found.passed_over, root / name):
            _log.warning("%s: %s", root / name, line)
        files[name] = found.files
    keys = sorted({key for name in names if name in model.inputs for key in files[name]})
    if not keys:
        raise FileNotFoundError(f"no files below {', '.join(str(root / name) for name in names)}")
    return [Task(key.removeprefix("all/"), {name: files[name][key] for name in names if key in files[name]}) for key in keys]


def read_one(task: Task, model: Any, crop: float | int) -> dict[str, Any]:
    """One sample as the model sees it: a batch of one, with "present" (inputs first), its middle cut out.

    Raises ValueError with the reason where a file cannot be used.
    """
    specs = {spec.name: spec for spec in model.modalities}
    record, _, problems = read_sample(task, specs, None)
    if problems:
        raise ValueError("; ".join(text for _, text in problems))
    source = ListSource([record], may_lack=tuple(specs))
    with eval_batches(source, specs, model.image_size, batch_size=1, crop=crop, inputs=model.inputs) as batches:
        batch = next(batches)
    if not batch["valid"][0]:
        raise ValueError(batch["reason"][0])
    return {name: np.asarray(value) for name, value in batch.items() if name in specs or name == "present"}
