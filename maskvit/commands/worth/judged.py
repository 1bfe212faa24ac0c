"""What fine-tuned runs say of each held-out example: confusion matrices, and the examples on which two runs differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped

from maskvit.commands.segment.photos import enlarged
from maskvit.evaluators.classes import Classification
from maskvit.evaluators.dense import Segmentation
from maskvit.features import load, said
from maskvit.sharding import parameter_shardings, place_batch, replicated


class Judged(NamedTuple):
    """A run on the held-out examples.

    `matrix`: examples, or their pixels, by (true class, given class); `right`: share of each example that is right, 0 or 1 of pictures,
    NaN where no class is known.
    """

    matrix: Int[np.ndarray, "k k"]
    right: Float[np.ndarray, " n"]


class Example(NamedTuple):
    """One held-out example, by the number of its record, and what is said of it by run.

    `truth`, `answers`: a class number, or "h w" class numbers of pixels, -1 where a pixel is not labeled.
    """

    number: int
    picture: Shaped[np.ndarray, "h w c"]
    truth: Any
    answers: dict[str, Any]


def has_classes(evaluator: Any) -> bool:
    """Whether its examples can be judged one by one."""
    return type(evaluator) in (Classification, Segmentation)


def judge(folder: Path, evaluator: Any) -> Judged:
    """The run in a workdir on the evaluator's data, pictures and pixels at the model's size."""
    classes = evaluator.num_classes
    matrix, right = np.zeros((classes, classes), np.int64), np.full(len(evaluator.reading), np.nan)
    place = 0
    for batch, answers in _answered(folder, evaluator):
        for row in np.flatnonzero(batch["index"] >= 0).tolist():
            if batch["valid"][row]:
                truth = _truth(batch, evaluator, row)
                given = _given(np.asarray(answers[row]), truth)
                known = (truth >= 0) & (truth < classes)
                np.add.at(matrix, (truth[known], given[known]), 1)
                right[place] = (truth == given)[known].mean() if known.any() else np.nan
            place += 1
    return Judged(matrix, right)


def examples(runs: dict[str, Path], evaluator: Any, chosen: Sequence[int]) -> list[Example]:
    """The examples of these places among the evaluator's, as the runs answer them. `runs`: workdirs by name."""
    found: dict[int, Example] = {}
    for name, folder in runs.items():
        place = 0
        for batch, answers in _answered(folder, evaluator):
            for row in np.flatnonzero(batch["index"] >= 0).tolist():
                if place in chosen:
                    truth = _truth(batch, evaluator, row)
                    if place not in found:
                        picture = np.asarray(batch[evaluator.inputs[0]][row])
                        found[place] = Example(int(batch["index"][row]), picture, truth, {})
                    found[place].answers[name] = _given(np.asarray(answers[row]), truth)
                place += 1
    return [found[place] for place in chosen]


def differing(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"], most: int) -> list[int]:
    """Places of the examples on which `one` is better than `other` by most, best first; at most `most`, none of equal ones."""
    gain = np.nan_to_num(one - other)
    order = np.argsort(-gain, kind="stable")[:most]
    return [int(place) for place in order if gain[place] > 0]


def _answered(folder: Path, evaluator: Any) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Batches as the loader gives them, and the class of every row or pixel, on the devices that the evaluator uses."""
    mesh, loaded = evaluator.reading.mesh, load(folder)
    params = jax.device_put(loaded.params, parameter_shardings(loaded.params, mesh))
    state = jax.device_put(loaded.state, replicated(mesh))
    for batch in evaluator.reading.host_batches("examples"):
        values = place_batch({name: batch[name] for name in evaluator.inputs}, mesh).values
        told = said(evaluator.objective, evaluator.inputs, params, state, values)
        yield batch, np.asarray(told["ids"] if "ids" in told else told["probabilities"].argmax(axis=-1))


def _truth(batch: dict[str, Any], evaluator: Any, row: int) -> Int[np.ndarray, "*s"]:
    return np.asarray(batch[evaluator.target][row] if evaluator.target else batch["label"][row], np.int64)


def _given(answer: Int[np.ndarray, "*s"], truth: Int[np.ndarray, "*t"]) -> Int[np.ndarray, "*t"]:
    """The answer at the size of the truth, which may be kept smaller."""
    answer = np.asarray(answer, np.int64)
    return answer if answer.shape == truth.shape else enlarged(answer, truth.shape)
