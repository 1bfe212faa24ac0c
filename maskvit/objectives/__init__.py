"""Objectives: what training minimizes, as pure functions with the state outside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from maskvit.core.configuration import check_arguments, hashable, look_up
from maskvit.core.modalities import parse_modalities
from maskvit.core.types import DataNeeds
from maskvit.objectives.distillation_methods import dino, ibot
from maskvit.objectives.methods import crossmae, mae, multimae
from maskvit.objectives.supervised import supervised


@runtime_checkable
class Objective(Protocol):
    """What the train step, the evaluators and the pictures know of a method.

    `needs`: what the loader must deliver; `check()` raises where there is nothing to train for; `flops(views)`: arithmetic of a step
    per image, `views` as the loader cuts them (None for one crop);
    `init(key, num_records) -> (params, state)`, `init_state(params, num_records) -> state` for given parameters;
    `resolve(to_steps) -> objective`: durations of its schedules turned to steps;
    `plan(params, batch, keys, state, step) -> (plan, counts)`: what to hide, and how many samples each loss is a mean over;
    `loss(params, state, batch, keys, step, plan=None, counts=None, shared_key=None) -> (scalar, (observed, metrics))`:
    `keys` are the samples', `shared_key` the step's; `observed` has one row per sample, or is None;
    `recall(state, index) -> (state, kept)`: what holds for every sample, and what is kept of the records `index`, which comes to all
    others as `batch.kept`; `summarize(metrics, step) -> metrics`: scalars out of the sums that `loss` returned;
    `after_update(state, params, batch, keys, step, observed, metrics, accepted) -> state`: what follows the optimizer, on the whole
    batch (a teacher's average, what is learned of the samples); where `accepted` is False the state stays bit for bit;
    `differences(stored, own) -> (fresh, dropped)`, names of tensors: what may differ from a checkpoint that a run begins from, or None;
    `predict(params, state, batch, inputs=None, norm=True) -> {feature: "b d"}`, `tokens` of the same arguments -> `Encoded`, and
    `encoder_params(params, state)`, whose features these are (`maskvit.heads.values.ReadsFeatures`);
    `visualize(params, state, batch, keys) -> pictures' arrays`.
    """

    model: Any
    guidance: Any
    num_visible: int
    differences: Callable[[Any, Any], tuple[list[str], list[str]]] | None

    @property
    def needs(self) -> DataNeeds: ...
    def check(self) -> None: ...
    def flops(self, views: Any = None) -> float: ...
    def init(self, key: Any, num_records: int = 1) -> tuple[Any, Any]: ...
    def init_state(self, params: Any, num_records: int = 1) -> Any: ...
    def resolve(self, to_steps: Any) -> Any: ...
    def plan(self, params: Any, batch: Any, keys: Any, state: Any = None, step: Any = 0) -> tuple[Any, Any]: ...
    def loss(
        self, params: Any, state: Any, batch: Any, keys: Any, step: Any, plan: Any = None, counts: Any = None, shared_key: Any = None
    ) -> Any: ...
    def after_update(
        self, state: Any, params: Any, batch: Any, keys: Any, step: Any, observed: Any, metrics: Any, accepted: Any = True
    ) -> Any: ...
    def recall(self, state: Any, index: Any) -> tuple[Any, Any]: ...
    def summarize(self, metrics: Any, step: Any) -> Any: ...
    def encoder_params(self, params: Any, state: Any) -> Any: ...
    def predict(self, params: Any, state: Any, batch: Any, inputs: Any = None, norm: bool = True) -> Any: ...
    def tokens(self, params: Any, state: Any, batch: Any, inputs: Any = None, norm: bool = True) -> Any: ...
    def visualize(self, params: Any, state: Any, batch: Any, keys: Any) -> Any: ...


OBJECTIVES: dict[str, Callable[..., Any]] = {
    "multimae": multimae, "mae": mae, "crossmae": crossmae, "dino": dino, "ibot": ibot, "supervised": supervised,
}  # fmt: skip


def build_objective(config: Mapping[str, Any]) -> Any:
    """The objective of a config with `modalities`, `image_size` and `objective` blocks (plain data)."""
    check_blocks(config)
    block = {key: hashable(value) for key, value in config["objective"].items()}
    name = block.pop("name", None)
    constructor = look_up("config.objective.name", OBJECTIVES, name)
    given = ("modalities", "image_size")
    check_arguments("config.objective", constructor, block, given)
    return constructor(parse_modalities(config["modalities"]), parse_image_size(config["image_size"]), **block)


def check_blocks(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless `config` has the blocks that `build_objective` reads, each of its kind."""
    check_arguments("config", _model_blocks, {key: config[key] for key in ("modalities", "image_size", "objective") if key in config})


def resolved_durations(objective: Any, where: str = "objective") -> dict[str, int]:
    """{dotted config key: steps} of every duration that a resolved objective uses; one that is still words is not in use."""
    durations: dict[str, int] = {}
    for field in dataclasses.fields(objective):
        value = getattr(objective, field.name)
        if field.type == "Duration" and not isinstance(value, str):
            durations[f"{where}.{field.name}"] = int(value)
        elif dataclasses.is_dataclass(value) and field.name not in ("model", "guidance"):
            durations |= resolved_durations(value, f"{where}.{field.name}")
    return durations


def _model_blocks(*, modalities: Mapping[str, Any], image_size: int | tuple[int, ...], objective: Mapping[str, Any]) -> None:
    """What `build_objective` needs of a config; its signature is the reference."""


def parse_image_size(size: Any) -> tuple[int, int]:
    """`config.image_size`, (height, width) or the side of a square. Raises ValueError for anything else."""
    most = 2**16
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and 0 < side <= most for side in sides):
        raise ValueError(
            f"config.image_size is {size!r}; give (height, width) in pixels, or for a square a number without parentheses "
            f"(from 1 to {most})"
        )
    return sides[0], sides[1]
