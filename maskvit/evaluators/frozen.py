"""What evaluators share that fit something to frozen features: the features, what is held out to choose by, shares of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from maskvit.core.configuration import check_arguments
from maskvit.core.modalities import Modality
from maskvit.data.subsets import stratified
from maskvit.evaluators.features import Examples, Extraction
from maskvit.evaluators.reading import check_labels, check_shown, labeled_splits, nothing

Figures = Iterator[tuple[str, float]]


def held_out(examples: Int[np.ndarray, " n"], share: float, seed: int) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " m"]]:
    """(Examples to fit to, those to choose by), each in stored order: a fixed permutation by `seed`, whose first share is held out."""
    order = np.random.default_rng(seed).permutation(len(examples))
    count = max(1, round(share * len(examples)))
    return np.sort(examples[order[count:]]), np.sort(examples[order[:count]])


class Frozen:
    """A classifier fitted to the features of an unmasked pass, its settings chosen on held-out training data, tested once.

    All features are taken under the transform of evaluation, once. Figures of each share of the training data: of all of it by their
    own names, of a share by names that begin with "share_0.01/".

    Args:
      train, test: sources with labels, as `config.data.train`; by default that data set itself and its split "val".
      limit_train, limit_test: only so many examples, evenly spread over the data; None for all.
      batch_size: images at once over all devices while features are taken; no figure depends on it.
      crop: as in `maskvit.data.batches.eval_batches`.
      shown: inputs that the model is shown; by default its first.
      norm: False for tokens as they leave the last block of a model that has a final norm.
      cache: a folder for features (`maskvit.evaluators.features.Extraction`).
      hold_out: share of the training examples by which settings are chosen; the same for every share of the data.
      seed: of what is held out, of shares, of initial values and of the order of examples.
      shares: shares of the training data that are fitted to as well, drawn by `seed`, each class with its part (0.01: 1 %).
      options: what the evaluator alone knows; the signature of its `read_options`.

    Raises ValueError for data without labels, and for settings that cannot be.
    """

    what = ""

    def __init__(
        self,
        *,
        objective: Any,
        modalities: Mapping[str, Modality],
        image_size: tuple[int, int],
        mesh: Mesh,
        data: Mapping[str, Any],
        train: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        limit_train: int | None = None,
        limit_test: int | None = None,
        batch_size: int = 256,
        crop: float | int = 0.875,
        shown: Sequence[str] | None = None,
        norm: bool = True,
        cache: str | None = None,
        hold_out: float = 0.1,
        seed: int = 0,
        shares: Sequence[float] = (),
        options: Mapping[str, Any] | None = None,
    ):
        self.objective, self.mesh, self.norm, self.seed = objective, mesh, norm, seed
        check_arguments("config.evaluators options", self.read_options, options or {})
        self.options = self.read_options(**(options or {}))
        if not 0 < hold_out < 1:
            raise ValueError(f"{self.what} hold_out is {hold_out}; it must be a share between 0 and 1")
        if wrong := [share for share in shares if not 0 < share < 1]:
            raise ValueError(f"{self.what} shares names {wrong[0]}; each must be between 0 and 1, such as 0.01")
        self._hold_out, self._shares = float(hold_out), tuple(map(float, shares))
        inputs = check_shown(objective, objective.model.inputs[:1] if shown is None else shown)
        readings = labeled_splits(
            self.what, modalities, image_size, mesh, data, inputs, train, test, limit_train, limit_test, batch_size, crop
        )  # fmt: skip
        self.extractions = {
            split: Extraction(f"{self.what} {split}", objective, reading, inputs=inputs, norm=norm, cache=cache)
            for split, reading in readings.items()
        }
        self.prepare()

    @staticmethod
    def read_options() -> dict[str, Any]:
        """What `options` may hold."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Check the options against the model."""

    kinds: tuple[str, ...] = ()  # features that are taken
    given: tuple[str, ...] = ()  # names of the figures of one share

    @property
    def names(self) -> tuple[str, ...]:
        """Of all figures that `run` yields."""
        return tuple(prefix + name for prefix in ("", *(f"share_{share:g}/" for share in self._shares)) for name in self.given)

    def protocol(self) -> dict[str, Any]:
        """How the figures are taken, as plain data."""
        parts = {split: extraction.protocol() for split, extraction in self.extractions.items()}
        return dict(
            parts, figures=type(self).__name__.lower(), hold_out=self._hold_out, seed=self.seed, shares=self._shares, **self.options
        )  # fmt: skip

    def run(self, params: Any, objective_state: Any, between: Callable[[], None] = nothing) -> Figures:
        """Yield the figures."""
        train, test = (self.extractions[split](params, objective_state, self.kinds, between) for split in ("train", "test"))
        for split, examples in (("train", train), ("test", test)):
            check_labels(self.what, examples, self.extractions[split].reading)
        names = [len(extraction.reading.source.label_names) for extraction in self.extractions.values()]
        num_classes = int(max(*names, train.labels.max() + 1, test.labels.max() + 1))
        for share in (1.0, *self._shares):
            chosen = np.arange(len(train.labels))
            if share < 1:
                chosen = stratified(np.asarray(train.labels), max(2, round(share * len(chosen))), self.seed)
            if len(chosen) < 2:
                raise ValueError(f"{self.what} needs at least 2 training examples, one to fit to and one to choose by")
            fitted, chosen_by = held_out(chosen, self._hold_out, self.seed)
            for name, value in self.fit(train, test, fitted, chosen_by, num_classes, between):
                yield (f"share_{share:g}/" if share < 1 else "") + name, value

    def fit(
        self, train: Examples, test: Examples, fitted: Int[np.ndarray, " k"], chosen_by: Int[np.ndarray, " m"], num_classes: int,
        between: Callable[[], None],
    ) -> Figures:  # fmt: skip
        """The figures of what is fitted to the training examples `fitted` and chosen by `chosen_by`."""
        raise NotImplementedError
