"""What every evaluator shares: data of its own, each example once, and sums over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from maskvit.core.modalities import Modality, parse_modalities
from maskvit.core.types import Batch
from maskvit.data import open_source
from maskvit.data.batches import eval_batches
from maskvit.data.sources import Source, has_labels
from maskvit.metrics.accumulate import added
from maskvit.sharding import place_batch, sample_devices


def nothing() -> None:
    """What happens between two batches where nobody asks for anything."""


class Reading:
    """The data of an evaluator: some modalities of one source, in batches over all devices.

    Args:
      block: as `config.data.train`; `modalities`: those that are read, the first ones `inputs`.
      limit: only so many examples, evenly spread over the data (which may be stored class by class); None for all.
      batch_size: images at once over all devices, rounded up to a multiple of them; no figure depends on it.
      geometry: how pictures are brought to the model's size, as in `maskvit.data.batches.eval_batches`.
      data: `config.data`, for the number of workers and the timeout.
    """

    def __init__(
        self,
        block: Mapping[str, Any],
        modalities: Mapping[str, Modality],
        image_size: tuple[int, int],
        mesh: Mesh,
        data: Mapping[str, Any],
        *,
        inputs: Sequence[str],
        batch_size: int,
        limit: int | None = None,
        **geometry: Any,
    ):
        arguments = {"source": "tfds", **block}
        if arguments.get("features"):
            arguments["features"] = {key: value for key, value in arguments["features"].items() if key in modalities}
        if arguments.get("may_lack"):
            arguments["may_lack"] = [name for name in arguments["may_lack"] if name in modalities]
        self.source: Source = open_source(arguments.pop("source"), modalities, **arguments)
        self.limit, self.mesh = limit, mesh
        self.batch_size = math.ceil(batch_size / sample_devices(mesh)) * sample_devices(mesh)
        self._settings = dict(
            batch_size=self.batch_size, limit=limit, inputs=tuple(inputs), workers=int(data.get("workers", 0)),
            timeout=float(data.get("timeout", 600.0)), **geometry,
        )  # fmt: skip
        self._inputs, self._geometry = tuple(inputs), geometry
        self.modalities, self._image_size = dict(modalities), (image_size[0], image_size[1])

    def protocol(self) -> dict[str, Any]:
        """How and of what the figures are taken, as plain data."""
        return dict(
            data=self.source.describe().split(" in ")[0], limit=self.limit, image_size=list(self._image_size), inputs=list(self._inputs),
            **self._geometry,
        )  # fmt: skip

    def __len__(self) -> int:
        """How many examples are read."""
        return len(self.source) if self.limit is None else min(self.limit, len(self.source))

    def batches(self, description: str, between: Callable[[], None] = nothing) -> Iterator[Batch]:
        """Global batches in stored order, the last one padded (`valid` False), with a progress bar; `between` after every one."""
        for host in self.host_batches(description, between):
            yield place_batch(host, self.mesh)

    def host_batches(self, description: str, between: Callable[[], None] = nothing) -> Iterator[dict[str, Any]]:
        """The same as the loader gives them: this process's rows, what is not for the device included."""
        from tqdm import tqdm

        batches = eval_batches(
            self.source, self.modalities, self._image_size, process_index=jax.process_index(), process_count=jax.process_count(),
            **self._settings,
        )  # fmt: skip
        hidden = True if jax.process_index() else None  # None: shown on a terminal only
        total = math.ceil(len(self) / self.batch_size)
        with batches, tqdm(total=total, desc=description, unit="batch", leave=False, disable=hidden) as bar:
            for batch in batches:
                yield batch
                bar.update()
                between()


def local(tree: Any) -> Any:
    """Arrays that are the same on every device, on the host."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)


def merged(sums: Callable[[Batch], Any], batches: Iterator[Batch]) -> Any:
    """What `sums` gives of every batch, replicated arrays, added up over all batches (`maskvit.metrics.accumulate.added`)."""
    total = None
    for batch in batches:
        total = added(total, local(sums(batch)))
    return total


def check_shown(objective: Any, shown: Sequence[str]) -> tuple[str, ...]:
    """`shown`, where they are inputs of the model, each once; else ValueError."""
    if not shown or set(shown) - set(objective.model.inputs) or len(set(shown)) < len(shown):
        raise ValueError(f"shown names {tuple(shown)}; the model's inputs are {objective.model.inputs}")
    return tuple(shown)


def labeled_splits(
    what: str,
    modalities: Mapping[str, Modality],
    image_size: tuple[int, int],
    mesh: Mesh,
    data: Mapping[str, Any],
    inputs: Sequence[str],
    train: Mapping[str, Any] | None,
    test: Mapping[str, Any] | None,
    limit_train: int | None,
    limit_test: int | None,
    batch_size: int,
    crop: Any,
) -> dict[str, Reading]:
    """{"train": ..., "test": ...} of the evaluator `what`; by default of `config.data.train` and its split "val".

    Raises ValueError for data without labels.
    """
    default = dict(data["train"])
    blocks = {"train": (train or default, limit_train), "test": (test or {**default, "split": "val"}, limit_test)}
    read = {name: modalities[name] for name in inputs}
    readings = {
        split: Reading(block, read, image_size, mesh, data, inputs=inputs, batch_size=batch_size, limit=limit, crop=crop)
        for split, (block, limit) in blocks.items()
    }
    for split, reading in readings.items():
        if not has_labels(reading.source):
            raise ValueError(
                f"{what} needs labels, but the {split} data have none: {reading.source.describe()}. Drop the {what} from "
                "config.evaluators, give it data with labels as its train and test, or set config.data label"
            )
    return readings


def check_labels(what: str, examples: Any, reading: Reading) -> None:
    """Raise ValueError where examples have no class."""
    if missing := int((examples.labels < 0).sum()):
        raise ValueError(f"{what} needs labels, but {missing} of {len(examples.labels)} records have none: {reading.source.describe()}")


def target_modality(
    what: str, target: str | Mapping[str, Any], modalities: Mapping[str, Modality], kind: str, inputs: Sequence[str]
) -> Modality:
    """What the evaluator `what` compares with: a declared modality by its name, or a declaration of its own with a "name".

    Raises ValueError unless it is of `kind` and none of the inputs.
    """
    if isinstance(target, str):
        if target not in modalities:
            known = ", ".join(modalities)
            raise ValueError(f"{what} target is {target!r}; the model has {known}. Of another write a block with its name and fields")
        spec = modalities[target]
    else:
        fields = dict(target)
        if not isinstance(name := fields.pop("name", None), str):
            raise ValueError(f"{what} target lacks the key 'name', under which the data have it")
        spec = parse_modalities({name: fields})[name]
    if spec.kind != kind:
        raise ValueError(f"{what} target {spec.name!r} is {spec.kind}; it must be {kind}")
    if spec.name in inputs:
        raise ValueError(f"{what} target {spec.name!r} is also shown to the model: leave it out of shown")
    return spec
