"""How far options of guidance agree with the exact scores, on training crops of pictures that nothing was fitted on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from maskvit.core.keys import sample_keys
from maskvit.core.types import Batch, TokenLayout, batch_of
from maskvit.guidance.agreement import agreement, mean_over_modalities
from maskvit.guidance.attention import SelfAttention
from maskvit.guidance.canvas import ReusedAttention, standard_logs
from maskvit.guidance.predicted import PredictedAttention
from maskvit.guidance.source import Source
from maskvit.masking.scores import SCORES

AUGMENT = dict(crop="random_resized", scale=(0.2, 1.0), ratio=(0.75, 4 / 3), flip=0.5, resize="pil")
VIEWS = 3  # crops of each picture that agreement is measured on
FIT_CROPS = 32  # crops of each picture that read-outs are fitted on
UNGUIDED = {"random": "random", "color noise": "color"}


def scenes(first: int, count: int, size: tuple[int, int]) -> Any:
    """Rendered scenes in memory."""
    from maskvit.data.builders.scenes import record
    from maskvit.data.sources import ListSource

    return ListSource([record(index, 0, size) for index in range(first, first + count)])


def pictures(folder: str | None, modality: str) -> Any:
    """A folder of picture files."""
    from maskvit.features import Pictures, find_pictures

    return Pictures(find_pictures([folder or ""]), modality)


def crops(source: Any, objective: Any, passes: int, seed: int, first_index: int = 0, whole: bool = False) -> Iterator[tuple[Batch, Any]]:
    """Training crops of every record, `passes` times: (batch with index, box and flip, keys). `whole`: with the whole pictures too."""
    from maskvit.data.batches import train_batches

    model, count = objective.model, len(source)
    batch = next(n for n in range(min(20, count), 0, -1) if count % n == 0)  # so that no record is left out of a pass
    specs = {spec.name: spec for spec in model.modalities}
    stream = train_batches(
        source, specs, model.image_size, seed=seed, global_batch=batch, augment=AUGMENT, inputs=model.inputs,
        extras=("index", "box", "flip"), whole_every=int(whole),
    )  # fmt: skip
    try:
        for step in range(passes * count // batch):
            arrays = {key: jnp.asarray(value) for key, value in next(stream).items() if isinstance(value, np.ndarray)}
            arrays["index"] += first_index
            yield batch_of(arrays), sample_keys(seed, step, batch)
    finally:
        stream.close()


def mirrored(batch: Batch) -> Batch:
    """The same samples, mirrored."""
    return batch._replace(values={name: value[:, :, ::-1] for name, value in batch.values.items()})


def mirror_scores(scores: Float[np.ndarray, "b n"], layout: TokenLayout) -> Float[np.ndarray, "b n"]:
    """Scores of mirrored samples, back at the tokens of the samples themselves."""
    parts = [
        scores[:, span].reshape(-1, *grid)[:, :, ::-1].reshape(len(scores), -1)
        for span, grid in zip(layout.spans(), layout.grids, strict=True)
    ]
    return np.concatenate(parts, axis=1)


class Learner:
    """A source that remembers: what it learns of crops and their exact scores, as in training but with the weights at rest."""

    def __init__(self, source: Source, objective: Any, params: Any, num_records: int):
        self.source, self._fits = source, isinstance(source, PredictedAttention)
        self.state = source.init(objective.model, params, num_records)
        self.maps = source.needs.record != ()
        every_crop: Any = dataclasses.replace(cast(Any, source), every=1)

        def learn(params: Any, state: Any, batch: Batch, keys: Key[Array, " b"], targets: Float[Array, "b n"]) -> Any:
            request = source.remind(objective._request(params, {}, batch, keys), state)
            return (
                every_crop.update(request, jnp.int32(0), None)
                if source.needs.whole_every
                else cast(PredictedAttention, source).learn(request, targets)
            )

        self._learn = jax.jit(learn)

    def see(self, params: Any, batch: Batch, keys: Any, targets: Float[Array, "b n"], fit: bool) -> None:
        """Learn from crops; without `fit` only the maps of their records change, not what holds for all records."""
        if fit or self.maps:
            new = self._learn(params, self.state, batch, keys, targets)
            self.state = self.state | {"maps": new["maps"]} if self._fits and not fit else new

    def solve(self) -> None:
        """The read-out of what was seen."""
        if isinstance(self.source, PredictedAttention):
            self.state = jax.jit(self.source.solved)(self.state)


def agreements(
    name: str, objective: Any, params: Any, options: Mapping[str, Any], learn: Any, measured: Any, seed: int = 0, fit_crops: int = FIT_CROPS
) -> list[dict[str, Any]]:
    """One record per option: agreement with the exact scores of the same weights, mean over modalities and per modality.

    Read-outs are fitted on `fit_crops` crops of each of the pictures `learn`; maps of the `measured` pictures are made of other crops
    than those that are measured. Nothing is stale: the weights stand still.
    """
    layout, model, exact = objective.model.layout, objective.model, SelfAttention()
    visits = max(option.visits for option in options.values())
    records, whole = len(learn) + len(measured), any(option.source and option.source.needs.whole_every for option in options.values())

    def request_of(params: Any, state: Any, batch: Batch, keys: Key[Array, " b"], source: Source | None = None) -> Any:
        request = objective._request(params, {}, batch, keys)
        return source.remind(request, state) if source else request

    targets_of = jax.jit(lambda p, batch, keys: standard_logs(exact, request_of(p, (), batch, keys)))
    exact_of = jax.jit(lambda p, batch, keys: exact(request_of(p, (), batch, keys)))
    learners = {
        option.source: Learner(option.source, objective, params, records)
        for option in options.values()
        if isinstance(option.source, (PredictedAttention, ReusedAttention))
    }
    fitted = [learner for learner in learners.values() if isinstance(learner.source, PredictedAttention)]
    for batch, keys in crops(learn, objective, fit_crops, seed) if fitted else ():
        targets = targets_of(params, batch, keys)
        for learner in fitted:
            learner.see(params, batch, keys, targets, fit=True)
    for learner in fitted:
        learner.solve()

    views = []
    for batch, keys in crops(measured, objective, VIEWS, seed + 1, len(learn)):
        truth = np.asarray(exact_of(params, batch, keys))
        views.append((batch, keys, truth, mirror_scores(np.asarray(exact_of(params, mirrored(batch), keys)), layout)))
    truth, ceiling = (np.concatenate([view[i] for view in views]) for i in (2, 3))

    def record_of(option_name: str, option: Any) -> dict[str, Any]:
        if option_name == "exact of the mirror image":
            scores = ceiling
        elif option.source is None:
            score = SCORES[UNGUIDED[option_name]]
            scores = np.concatenate([np.asarray(score(keys, layout, None, None)) for _, keys, _, _ in views])
        else:
            state = learners[option.source].state if option.source in learners else ()
            call = jax.jit(lambda p, s, batch, keys: option.source(request_of(p, s, batch, keys, option.source)))
            scores = np.concatenate([np.asarray(call(params, state, batch, keys)) for batch, keys, _, _ in views])
        found = agreement(scores, truth, ceiling, layout)
        share = option.source.flops(model, 2048) / exact.flops(model) if option.source else 0.0
        parts = {f"{modality}/{key}": value for modality, values in found.items() for key, value in values.items()}
        common = dict(measurement="guidance_agreement", model=name, option=option_name, visits=option.visits, cost_share=share)
        return common | dict(samples=len(scores), **mean_over_modalities(found), **(parts if len(found) > 1 else {}))

    made: dict[str, dict[str, Any]] = {}
    for visit in range(visits + 1):
        made |= {key: record_of(key, option) for key, option in options.items() if option.visits == visit}
        for batch, keys in crops(measured, objective, 1, seed + 2 + visit, len(learn), whole and visit == 0) if visit < visits else ():
            targets = targets_of(params, batch, keys)
            for learner in learners.values():
                if visit == 0 or not learner.source.needs.whole_every:
                    learner.see(params, batch, keys, targets, fit=False)
    return [{key: None if isinstance(v, float) and math.isnan(v) else v for key, v in made[option].items()} for option in options]
