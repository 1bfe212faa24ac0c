"""What evaluators of a supervised model's answers share: `maskvit.evaluators.classes` of pictures, `maskvit.evaluators.dense` of pixels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from maskvit.core.configuration import check_arguments
from maskvit.core.modalities import Modality
from maskvit.core.types import Batch
from maskvit.data.sources import Source, has_labels
from maskvit.evaluators.reading import Reading, check_shown, nothing
from maskvit.sharding import replicated

Figures = Iterator[tuple[str, Any]]


class Answers:
    """What the evaluators here share: held-out data, the model's answers to them, and the averaged weights beside the raw ones.

    Args:
      data_from: a source with labels or targets, as `config.data.train`; by default that data set's split "val".
      limit: only so many examples, evenly spread over the data; None for all.
      batch_size: images at once over all devices; no figure depends on it but those that are named per batch.
      crop: how pictures are brought to the model's size, as in `maskvit.data.batches.eval_batches`.
      shown: inputs that the model is shown; by default all of its own.
      options: what the evaluator alone knows; the signature of its `read_options`.

    Raises ValueError where the objective gives no such answers, or the data lack what they are compared with.
    """

    task = ""  # the row of `maskvit.objectives.tasks.TASKS` that gives such answers
    channels = 0  # of the target, where only one number is right
    given: tuple[str, ...] = ()  # names of the figures

    def __init__(
        self,
        *,
        objective: Any,
        modalities: Mapping[str, Modality],
        image_size: tuple[int, int],
        mesh: Mesh,
        data: Mapping[str, Any],
        data_from: Mapping[str, Any] | None = None,
        limit: int | None = None,
        batch_size: int = 256,
        crop: float | int | str | None = 0.875,
        shown: Sequence[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        given = type(getattr(objective, "task", None)).__name__.lower()
        if given != self.task:
            raise ValueError(
                f"the evaluator {type(self).__name__.lower()!r} takes figures of the task {self.task!r}, but config.objective "
                + (f"learns {given!r}" if given != "nonetype" else "is not supervised: use 'knn', or fine-tune the model first")
            )
        self.inputs = check_shown(objective, objective.model.inputs if shown is None else shown)
        self.objective, self.target = objective, objective.task.target
        names = (*self.inputs, self.target) if self.target else self.inputs
        self.spec = modalities[self.target] if self.target else None
        self.num_classes = self.spec.num_classes if self.spec else objective.task.num_classes
        check_arguments("config.evaluators options", self.read_options, options or {})
        self.options = self.read_options(**(options or {}))
        block = dict(data_from or {**dict(data["train"]), "split": "val"})
        read = {name: modalities[name] for name in names}
        geometry: dict[str, Any] = dict(crop=crop)
        if self.options.get("resolution") == "original":
            if crop not in ("pad", None):
                raise ValueError(f"crop is {crop!r}, but answers at the original resolution need whole pictures: set it to 'pad' or None")
            geometry["originals"] = names if self.options["sliding"] else (self.target,)
        self.readings = {
            split: Reading(
                block | ({"split": split} if split else {}), read, image_size, mesh, data, inputs=self.inputs, batch_size=batch_size,
                limit=limit, **geometry,
            )
            for split in self.splits() or ("",)
        }  # fmt: skip
        self.reading = next(iter(self.readings.values()))
        for source in [] if self.target else [reading.source for reading in self.readings.values()]:
            if not self.labeled(source):
                raise ValueError(f"an accuracy needs labels, but the data have none: {source.describe()}")
        if self.channels and self._spec().channels != self.channels:
            raise ValueError(
                f"the evaluator {type(self).__name__.lower()!r} is for {self.channels} channel(s), but {self.target!r} has "
                f"{self._spec().channels}: use 'maps'"
            )
        self.sums = jax.jit(self._sums, out_shardings=replicated(mesh))
        self.prepare(read, image_size, crop)

    def splits(self) -> tuple[str, ...]:
        """The splits that are read, where an evaluator is of several; () for the one that the data's block names."""
        return ()

    def labeled(self, source: Source) -> bool:
        """Whether the data say which class a picture has."""
        return has_labels(source)

    def prepare(self, read: Mapping[str, Modality], image_size: tuple[int, int], crop: Any) -> None:
        """What an evaluator needs beside; nothing here."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all figures that `run` yields."""
        averaged = [f"ema/{name}" for name in self.given] if self.objective.ema_decay is not None else []
        return (*self.given, *averaged)

    def protocol(self) -> dict[str, Any]:
        """How the figures are taken, as plain data."""
        options = {name: value for name, value in self.options.items() if name != "examples"}  # a picture is no figure
        several = dict(splits=self.splits()) if self.splits() else {}
        return dict(self.reading.protocol(), figures=type(self).__name__.lower(), **several, **options)

    @staticmethod
    def read_options() -> dict[str, Any]:
        """What `options` may hold: nothing here."""
        return {}

    def _spec(self) -> Modality:
        """The modality that is predicted."""
        assert self.spec is not None
        return self.spec

    def run(self, params: Any, objective_state: Any, between: Callable[[], None] = nothing) -> Figures:
        """Yield the figures of the parameters, then, called "ema/...", those of their average where one is kept."""
        weights = {"": params}
        if isinstance(objective_state, Mapping) and "ema" in objective_state:
            weights["ema/"] = objective_state["ema"]
        state = {name: value for name, value in (objective_state or {}).items() if name != "ema"}
        for prefix, tree in weights.items():
            for name, value in self.evaluate(tree, state, between):
                yield prefix + name, value

    def evaluate(self, params: Any, state: Any, between: Callable[[], None]) -> Figures:
        """The figures of these parameters."""
        yield from self.figures(functools.partial(self.sums, params, state), self.reading.batches(self.task, between))

    def figures(self, sums: Callable[[Any], Any], batches: Iterator[Any]) -> Figures:
        """The figures out of the sums of all batches."""
        raise NotImplementedError

    def _sums(self, params: Any, state: Any, batch: Any) -> Any:
        """The sums of a batch, padding left out."""
        raise NotImplementedError

    def _answers(self, params: Any, state: Any, batch: Batch) -> Any:
        """The model's one answer, in stored units where it is numbers."""
        return next(iter(self.objective.answers(params, state, batch, self.inputs).values()))
