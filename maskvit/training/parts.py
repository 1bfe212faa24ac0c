"""From a config to the parts of a run: everything built and checked, nothing computed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from maskvit import checkpoints
from maskvit.core.durations import to_steps
from maskvit.core.errors import all_mistakes
from maskvit.data import open_source
from maskvit.data.augment.settings import parse_augment
from maskvit.data.identity import data_identity
from maskvit.data.maps import open_maps
from maskvit.data.order import SORTED
from maskvit.data.order import steps_per_epoch as epoch_steps
from maskvit.data.sources import has_labels
from maskvit.evaluators import build_evaluators
from maskvit.objectives import build_objective, resolved_durations
from maskvit.optim.schedules import Schedule
from maskvit.optim.transforms import freeze_block
from maskvit.sharding import check_batch, fitting_mesh, make_mesh, sample_devices, sharding_block
from maskvit.training.best import best_block, check_figure
from maskvit.training.config import checkpoint_block, data_block, init_block, make_schedule, read_block
from maskvit.training.microbatches import least_memory, micro_batch_counts
from maskvit.training.profiling import parse_window
from maskvit.training.spikes import guard_block

LOG = logging.getLogger("maskvit")


@dataclass
class Parts:
    """What a config stands for, built and checked; nothing was computed yet. Periods and lengths are in steps."""

    data: dict[str, Any]
    init_from: dict[str, Any]
    checkpoint: dict[str, Any]
    guard: dict[str, Any]
    best: dict[str, Any]
    optimizer: dict[str, Any]
    base_lr: float
    objective: Any
    mesh: Any
    specs: dict[str, Any]
    source: Any
    views: Any
    steps_per_epoch: int
    total_steps: int
    periods: dict[str, int]
    evaluations: dict[str, int]
    evaluators: dict[str, Any]
    profile: tuple[int, int] | None


def build_parts(config: Mapping[str, Any], profile: str | None) -> Parts:
    """The parts of a whole config that `check_config` has accepted. Raises `Mistakes` with everything that data and devices show wrong."""
    checkpoint = checkpoint_block(**config["checkpoint"] or {})
    guard = guard_block(**config["guard"] or {})
    best = best_block(**config["best"]) if config["best"] else {}
    data = data_block(**config["data"])
    views = parse_augment(data["augment"]).views
    optimizer = dict(config["optimizer"])
    base_lr, global_batch = optimizer.pop("base_lr"), config["global_batch"]
    objective = build_objective({key: config[key] for key in ("modalities", "image_size", "objective")})
    specs = {spec.name: spec for spec in objective.model.modalities}
    sharding = sharding_block(**config["sharding"] or {})
    if sharding["fsdp"] == "auto":
        mesh = fitting_mesh(jax.eval_shape(objective.init, jax.random.key(0)), least_memory(), **sharding)
        LOG.info("config.sharding.fsdp is 'auto': the state is spread over groups of %d devices", mesh.shape["fsdp"])
    else:
        mesh = make_mesh(**sharding)
    with all_mistakes() as checks:
        with checks.check():
            objective.check()
        with checks.check():
            if objective.needs.views != (views is not None):
                what = "takes one view of a record: remove" if views is not None else "learns from several views of a record: set"
                raise ValueError(f"config.objective.name {config['objective']['name']!r} {what} config.data.augment.views")
        with checks.check():
            check_batch(global_batch, mesh)
            micro_batch_counts(global_batch, config["micro_batch"], sample_devices(mesh))
        with checks.check():
            window = parse_window(profile)
        with checks.check(FileNotFoundError):
            train_source = dict(data["train"])
            source = open_source(train_source.pop("source", "tfds"), specs, **train_source)
            steps_per_epoch = epoch_steps(len(source), global_batch)
            check_labels(source, objective.needs.num_classes)
    with all_mistakes() as checks:
        duration = functools.partial(to_steps, steps_per_epoch=steps_per_epoch, global_batch=global_batch)
        total_steps = duration(config["total"])
        period = functools.partial(duration, total_steps=total_steps)
        with checks.check():
            if not _continues_imported(config):
                schedule_of(config, base_lr, steps_per_epoch, total_steps, None)
        with checks.check():
            objective = objective.resolve(period)
        with checks.check():
            if optimizer.get("freeze"):
                freeze = read_block("config.optimizer.freeze", freeze_block, optimizer["freeze"])
                optimizer["freeze"] = dict(freeze, until=period(freeze["until"]))
        blocks, evaluations, periods, evaluators = config["evaluators"] or {}, {}, {}, {}
        wanted = {"checkpoint": checkpoint["every"], "picture": config["picture_every"], "replicas": guard["replicas_every"]}
        for name, every in wanted.items():
            with checks.check():
                periods[name] = period(every) if every else 0
        for name, block in blocks.items():
            with checks.check():
                evaluations[name] = period(block.get("every", total_steps))
        with checks.check(FileNotFoundError):
            evaluators = build_evaluators(
                {name: {key: value for key, value in block.items() if key != "every"} for name, block in blocks.items()},
                objective=objective, modalities=specs, image_size=objective.model.image_size, mesh=mesh, data=data,
            )  # fmt: skip
            for name, evaluator in evaluators.items():
                check_classes(f"config.evaluators.{name}", getattr(evaluator, "label_names", ()), source.label_names)
                for target, names in getattr(evaluator, "pixel_classes", {}).items():
                    check_classes(f"config.evaluators.{name}", names, source.pixel_classes.get(target, ()))
            if best:
                check_figure(best["figure"], evaluators)
    return Parts(
        data, init_block(**config["init_from"] or {}), checkpoint, guard, best, optimizer, base_lr, objective, mesh, specs, source, views,
        steps_per_epoch, total_steps, periods, evaluations, evaluators, window,
    )  # fmt: skip


def check_labels(source: Any, num_classes: int) -> None:
    """Raise ValueError unless a source has the labels that an objective learns; 0 classes need none."""
    if not num_classes:
        return
    names = source.label_names
    if len(names) > num_classes or (names and len(names) < num_classes):
        raise ValueError(
            f"config.objective.task.num_classes is {num_classes}, but the data have {len(names)} classes ({', '.join(names[:3])}, ...): "
            f"{source.describe()}. Set it to {len(names)}"
        )
    if not has_labels(source):
        raise ValueError(f"config.objective.task needs labels, but the data have none: {source.describe()}")


def check_classes(where: str, read: Sequence[str], learned: Sequence[str]) -> None:
    """Raise ValueError where the classes that an evaluator reads are not those that the run learns."""
    if other := checkpoints.other_classes(learned, read):
        raise ValueError(
            f"{where}: class {other[0]} of its data is {other[2]}, but the run learns {other[1]} as that class: pack both with the same "
            "list of classes"
        )


def compared_on_resuming(config: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """What of a run goes into its checkpoints so that `checkpoints.check_same_run` can compare it."""
    durations = resolved_durations(parts.objective)
    if parts.optimizer.get("freeze"):
        durations["optimizer.freeze.until"] = parts.optimizer["freeze"]["until"]
    maps = parts.objective.needs.maps
    more: dict[str, Any] = dict(maps=data_identity(open_maps(maps))) if maps else {}
    if len(parts.source) > SORTED:
        more["order"] = "computed"  # earlier versions sorted data sets of any size
    if learned_classes(parts):
        more["label_names"] = list(learned_classes(parts))
    return dict(config=config, steps_per_epoch=parts.steps_per_epoch, data=data_identity(parts.source), durations=durations, **more)


def learned_classes(parts: Parts) -> tuple[str, ...]:
    """Names of the classes, of pictures or of pixels, that the run's head learns; () where it learns none, or they have no names."""
    if parts.objective.needs.num_classes:
        return tuple(parts.source.label_names)
    target = getattr(getattr(parts.objective, "task", None), "target", "")
    return tuple(parts.source.pixel_classes.get(target, ()))


def imported_epochs(config: Mapping[str, Any], parts: Parts, saved: Mapping[str, Any]) -> float | None:
    """For how many epochs the imported checkpoint was trained, where the schedule continues there."""
    if saved or not _continues_imported(config) or not parts.init_from["path"]:
        return saved.get("imported_epochs")
    return checkpoints.load_epochs_done(parts.init_from["path"])


def _continues_imported(config: Mapping[str, Any]) -> bool:
    return config["schedule"].get("start_epochs", 0) is None


def schedule_of(
    config: Mapping[str, Any], base_lr: float, steps_per_epoch: int, total_steps: int, imported_epochs: float | None
) -> Schedule:
    """The learning rate of the run. Raises where the run is longer than its schedule."""
    schedule = make_schedule(base_lr, config["global_batch"], steps_per_epoch, imported_epochs=imported_epochs, **config["schedule"])
    if schedule.start + total_steps > schedule.total:
        raise ValueError(
            f"config.total is {total_steps} steps from step {schedule.start} of a schedule of {schedule.total}: it would run "
            "past the schedule's end; raise config.schedule.total_epochs or lower config.total"
        )
    return schedule
