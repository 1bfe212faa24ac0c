"""What a config of a run may hold: the signatures here are the reference of its keys, and of what each may be."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maskvit.checkpoints.weights import WEIGHTS
from maskvit.core.config_files import get_value
from maskvit.core.configuration import check_arguments, look_up
from maskvit.core.durations import to_steps
from maskvit.core.errors import all_mistakes
from maskvit.core.modalities import Modality
from maskvit.data import SOURCES
from maskvit.data.augment.settings import parse_augment
from maskvit.evaluators import check_evaluator
from maskvit.metrics.writers import check_writers
from maskvit.objectives import OBJECTIVES, build_objective
from maskvit.optim import OPTIMIZERS, SCHEDULES
from maskvit.optim.schedules import Schedule
from maskvit.optim.transforms import freeze_block
from maskvit.sharding import sharding_block
from maskvit.training.best import best_block
from maskvit.training.spikes import guard_block


def experiment(
    *,
    total: str | int,
    global_batch: int,
    image_size: int | tuple[int, ...],
    modalities: Mapping[str, Any],
    objective: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    schedule: Mapping[str, Any],
    data: Mapping[str, Any],
    seed: int = 0,
    micro_batch: int = 0,
    evaluators: Mapping[str, Any] | None = None,
    init_from: Mapping[str, Any] | None = None,
    log_every: int = 50,
    picture_every: str | int = 0,
    checkpoint: Mapping[str, Any] | None = None,
    guard: Mapping[str, Any] | None = None,
    sharding: Mapping[str, Any] | None = None,
    best: Mapping[str, Any] | None = None,
    deterministic: bool = False,
    writers: Sequence[str] = (),
) -> dict[str, Any]:
    """The whole config, with its defaults.

    `total`: a duration ("100 epochs", "2000 steps"; 0 only evaluates). `global_batch` is the recipe's; `micro_batch` samples (0: as
    many as fit) are processed at once. `log_every` is in steps, `picture_every` and `checkpoint.every` are durations. `guard`: see
    `maskvit.training.spikes`. `sharding`: `maskvit.sharding.sharding_block`. `best`: `maskvit.training.best`. `deterministic`: on GPUs
    too a run is repeated bit for bit.
    """
    return dict(sorted(locals().items()))


def make_schedule(
    base_lr: float,
    global_batch: int,
    steps_per_epoch: int,
    *,
    total_epochs: float,
    start_epochs: float | None = 0.0,
    warmup_epochs: float = 0.0,
    min_lr: float = 0.0,
    name: str = "cosine",
    power: float | None = None,
    start_factor: float | None = None,
    imported_epochs: float | None = None,
) -> Schedule:
    """`config.schedule` in epochs of this run's own length to a schedule in steps; lr = base_lr * global_batch / 256.

    `min_lr` is multiplied alike (MAE and MultiMAE state theirs after multiplication). `start_epochs=None` continues where the imported
    checkpoint stopped (`imported_epochs`). `power` and `start_factor` are for the schedules that have them.
    """
    schedule = look_up("config.schedule.name", SCHEDULES, name)
    given = {"power": power, "start_factor": start_factor}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    fields = {field.name for field in dataclasses.fields(schedule)}
    for key, value in options.items():
        if key not in fields:
            raise ValueError(f"config.schedule.{key} is {value}, which schedule {name!r} does not have: remove it, or choose another name")
    if "steps_per_epoch" in fields:
        options["steps_per_epoch"] = steps_per_epoch
    if start_epochs is None:
        if imported_epochs is None:
            raise ValueError("config.schedule.start_epochs is None, but the checkpoint does not say its epoch: give start_epochs")
        start_epochs = imported_epochs
    in_steps = lambda epochs: round(epochs * steps_per_epoch)  # noqa: E731
    scale = global_batch / 256
    return schedule(base_lr * scale, in_steps(total_epochs), in_steps(warmup_epochs), in_steps(start_epochs), min_lr * scale, **options)


def data_block(
    *, train: Mapping[str, Any], augment: Mapping[str, Any] | None = None, workers: int = 0, prefetch: int = 2, timeout: float = 600.0
) -> dict[str, Any]:
    """`config.data`. `timeout`: seconds without a batch, or half of those without a finished step, after which a run ends."""
    for name, value, least in (("workers", workers, 0), ("prefetch", prefetch, 1)):
        if value < least:
            raise ValueError(f"config.data.{name} is {value}; it must be at least {least}")
    if not timeout > 0:
        raise ValueError(f"config.data.timeout is {timeout}; it must be above 0 seconds")
    return dict(train=dict(train), augment=dict(augment or {}), workers=workers, prefetch=prefetch, timeout=float(timeout))


def optimizer_block(*, base_lr: float, name: str = "adamw") -> None:
    """`config.optimizer`: what all optimizers have. The other keys are the arguments of `maskvit.optim.OPTIMIZERS[name]`."""


def optimizer_reader(block: Mapping[str, Any]) -> Callable[..., None]:
    """A function of what `config.optimizer` may hold, given the optimizer it names: for its signature."""
    own = look_up("config.optimizer.name", OPTIMIZERS, block.get("name", "adamw"))
    shared, options = (inspect.signature(function, eval_str=True).parameters.values() for function in (optimizer_block, own))

    def reader(**_: Any) -> None: ...

    reader.__signature__ = inspect.Signature([*shared, *(p for p in options if p.kind is p.KEYWORD_ONLY)])  # type: ignore[attr-defined]
    return reader


def init_block(*, path: str = "", fresh: Sequence[str] = (), drop: Sequence[str] = (), weights: str = "params") -> dict[str, Any]:
    """`config.init_from`. `weights`: the checkpoint's parameters, or its "teacher" or the average of its weights, "ema"."""
    look_up("config.init_from.weights", WEIGHTS, weights)
    return dict(path=path, fresh=tuple(fresh), drop=tuple(drop), weights=weights)


def checkpoint_block(*, every: str | int = "1 epochs", keep: int = 3) -> dict[str, Any]:
    """`config.checkpoint`."""
    return dict(every=every, keep=keep)


def read_block(where: str, function: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    check_arguments(where, function, values)
    return function(**values)


# Numbers of the config and their limits; what is not here is limited where it is used.
RANGES: dict[str, tuple[float, float]] = {
    "global_batch": (1, 2**31 - 1),
    "micro_batch": (0, 2**31 - 1),
    "log_every": (1, 2**31 - 1),
    "seed": (0, 2**31 - 1),
    "optimizer.base_lr": (0, 1e6),
    "optimizer.b1": (0, 0.999999),
    "optimizer.b2": (0, 0.999999999),
    "optimizer.eps": (0, 1),
    "optimizer.weight_decay": (0, 1e3),
    "optimizer.momentum": (0, 0.999999),
    "optimizer.trust": (1e-12, 1e6),
    "optimizer.layer_decay": (1e-6, 1),
    "optimizer.clip_norm": (1e-12, 1e12),
    "optimizer.clip_tensor_norm": (1e-12, 1e12),
    "schedule.total_epochs": (1e-9, 1e9),
    "schedule.start_epochs": (0, 1e9),
    "schedule.warmup_epochs": (0, 1e9),
    "schedule.min_lr": (0, 1e6),
    "schedule.power": (0, 1e3),
    "schedule.start_factor": (0, 1),
    "data.workers": (0, 1024),
    "data.prefetch": (0, 1024),
    "checkpoint.keep": (1, 10**6),
}


def _check_ranges(config: Mapping[str, Any]) -> None:
    with all_mistakes() as checks:
        for key, (least, most) in RANGES.items():
            value = get_value(config, key)
            for one in value if isinstance(value, (list, tuple)) else (value,):
                # What is no number at all is told by the types of the blocks. NaN is within no limits.
                with checks.check():
                    if isinstance(one, (int, float)) and not least <= one <= most:
                        raise ValueError(f"config.{key} is {value}; it must be at least {least:g} and at most {most:g}")


def check_config(config: Mapping[str, Any]) -> None:
    """Raise `Mistakes` with all that is wrong with a plain config, as far as it shows without data, devices and files."""
    with all_mistakes() as checks, checks.check():
        check_arguments("config", experiment, config)
    with all_mistakes() as checks:
        with checks.check():
            _check_ranges(config)
        periods = {"total": config["total"], "picture_every": config.get("picture_every", 0)}
        data: dict[str, Any] = {}
        with checks.check():
            data = read_block("config.data", data_block, config["data"])
        with checks.check():
            train_block = {"source": "tfds", **data.get("train", {})}
            constructor = look_up("config.data.train.source", SOURCES, train_block.pop("source"))
            check_arguments("config.data.train", constructor, train_block, given=("modalities",))
        with checks.check():
            parse_augment(data.get("augment"))
        with checks.check():
            read_block("config.init_from", init_block, config.get("init_from") or {})
        with checks.check():
            periods["guard.replicas_every"] = read_block("config.guard", guard_block, config.get("guard") or {})["replicas_every"]
        with checks.check():
            read_block("config.sharding", sharding_block, config.get("sharding") or {})
        if config.get("best"):
            with checks.check():
                read_block("config.best", best_block, config["best"])
        with checks.check():
            check_writers(config.get("writers", ()))
        with checks.check():
            periods["checkpoint.every"] = read_block("config.checkpoint", checkpoint_block, config.get("checkpoint") or {})["every"]
        with checks.check():
            given = ("base_lr", "global_batch", "steps_per_epoch", "imported_epochs")
            check_arguments("config.schedule", make_schedule, config["schedule"], given)
            look_up("config.schedule.name", SCHEDULES, config["schedule"].get("name", "cosine"))
        with checks.check():
            check_arguments("config.optimizer", optimizer_reader(config["optimizer"]), config["optimizer"])
            if freeze := config["optimizer"].get("freeze"):
                periods["optimizer.freeze.until"] = read_block("config.optimizer.freeze", freeze_block, freeze)["until"]
        with checks.check():
            build_objective(config)
        for name, block in (config.get("evaluators") or {}).items():
            with checks.check():
                check_evaluator(name, block)
                periods[f"evaluators.{name}.every"] = block.get("every", 0)
        for key, period in periods.items():
            with checks.check():
                try:
                    steps = to_steps(period, steps_per_epoch=1, global_batch=1, total_steps=None if key == "total" else 1)
                    if steps >= 2**31:
                        raise ValueError(f"{period!r} is longer than any run")
                except ValueError as error:
                    raise ValueError(f"config.{key}: {error}") from error


def default_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted key: value} of all that `config` may leave out, from the signatures that read its blocks."""
    readers: dict[str, Any] = {
        "": experiment, "data": data_block, "optimizer": optimizer_reader(config["optimizer"]), "schedule": make_schedule,
        "init_from": init_block, "checkpoint": checkpoint_block, "guard": guard_block, "best": best_block, "sharding": sharding_block,
        "objective": OBJECTIVES[config["objective"]["name"]],
        "data.train": SOURCES[config["data"]["train"].get("source", "tfds")],
        **{f"modalities.{name}": Modality for name in config["modalities"]},
    }  # fmt: skip
    return {
        f"{block}.{name}".removeprefix("."): parameter.default
        for block, reader in readers.items()
        for name, parameter in inspect.signature(reader).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    } | {"data.train.source": "tfds"}
