"""`run`: the parts of an experiment built and checked from its config, its state restored or begun; `loop` does the rest."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maskvit import checkpoints
from maskvit.core.config_files import get_value
from maskvit.core.configuration import check_arguments, look_up
from maskvit.core.durations import to_steps
from maskvit.core.errors import FAILED, all_mistakes, log_lines, message
from maskvit.core.flops import distillation_flops, step_flops
from maskvit.core.modalities import Modality
from maskvit.core.types import TrainState
from maskvit.data import SOURCES, open_source
from maskvit.data.batches import train_batches
from maskvit.data.identity import data_identity
from maskvit.data.maps import open_maps
from maskvit.data.order import steps_per_epoch as epoch_steps
from maskvit.data.transforms import parse_augment
from maskvit.data.views import GLOBAL_VIEWS
from maskvit.data.workers import LoaderError
from maskvit.evaluators import build_evaluators, check_evaluator
from maskvit.metrics.throughput import Throughput, peak_flops
from maskvit.metrics.writers import Writers, check_writers, make_writers
from maskvit.nn.backbone import count_parameters, frozen_mask
from maskvit.objectives import OBJECTIVES, build_objective, resolved_durations
from maskvit.optim.schedules import Cosine
from maskvit.optim.transforms import adamw, freeze_block, with_adam_moments
from maskvit.sharding import check_batch, make_mesh, parameter_shardings, place_batch, replicated
from maskvit.training.disk import warn_of_little_space
from maskvit.training.flight import Results, Telling
from maskvit.training.loop import Loop, Run, Stopped, evaluate, first_batch, write_figures
from maskvit.training.microbatches import compile_step, memory_limit, micro_batch_counts
from maskvit.training.painter import Painter
from maskvit.training.profiling import parse_window
from maskvit.training.signals import StopSignals
from maskvit.training.spikes import Guard, guard_block
from maskvit.training.step import init_state, state_from_params, train_step

__all__ = ["Stopped", "main", "make_schedule", "run"]

LOG = logging.getLogger("maskvit")
LOW_RATE = 1e-6  # a learning rate that stays below teaches a model nothing in the time people wait


def main(config: Any, workdir: str, profile: str | None = None, debug: bool = False) -> None:
    """`run` a ConfigDict, with log lines on standard error. Raises what `run` raises; several mistakes in the config are one list."""
    log_lines(debug)
    plain = config.to_dict()
    check_config(plain)
    try:
        run(workdir, profile=profile, **plain)
    except LoaderError as error:
        if not error.thread_hangs:
            raise
        print(f"error: {message(error)}", file=sys.stderr, flush=True)
        os._exit(FAILED)  # the interpreter would wait for that thread, for ever


def _arguments(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The config as `run` sees it: every key, without what is no part of it."""
    bound.apply_defaults()
    return {key: value for key, value in sorted(bound.arguments.items()) if key not in ("workdir", "profile")}


# What the config's blocks may hold: the signatures are the reference.


def make_schedule(
    base_lr: float,
    global_batch: int,
    steps_per_epoch: int,
    *,
    total_epochs: float,
    start_epochs: float | None = 0.0,
    warmup_epochs: float = 0.0,
    min_lr: float = 0.0,
    imported_epochs: float | None = None,
) -> Cosine:
    """`config.schedule` in epochs of this run's own length to a schedule in steps; lr = base_lr * global_batch / 256.

    `start_epochs=None` goes on where the imported checkpoint stopped (`imported_epochs`).
    """
    if start_epochs is None:
        if imported_epochs is None:
            raise ValueError("config.schedule.start_epochs is None, but the checkpoint does not say its epoch: give start_epochs")
        start_epochs = imported_epochs
    in_steps = lambda epochs: round(epochs * steps_per_epoch)  # noqa: E731
    scale = global_batch / 256
    return Cosine(base_lr * scale, in_steps(total_epochs), in_steps(warmup_epochs), in_steps(start_epochs), min_lr * scale)


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


def optimizer_block(
    *, base_lr: float, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8, weight_decay: float | tuple[float, float] = 0.05,
    no_decay: Sequence[str] = (), clip_norm: float | None = None, clip_tensor_norm: float | None = None,
    freeze: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """`config.optimizer`: the base learning rate, and the arguments of `optim.adamw`."""


def init_block(*, path: str = "", fresh: Sequence[str] = (), drop: Sequence[str] = ()) -> dict[str, Any]:
    """`config.init_from`."""
    return dict(path=path, fresh=tuple(fresh), drop=tuple(drop))


def checkpoint_block(*, every: str | int = "1 epochs", keep: int = 3) -> dict[str, Any]:
    """`config.checkpoint`."""
    return dict(every=every, keep=keep)


def _block(where: str, function: Any, values: Mapping[str, Any]) -> dict[str, Any]:
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
    "optimizer.clip_norm": (1e-12, 1e12),
    "optimizer.clip_tensor_norm": (1e-12, 1e12),
    "schedule.total_epochs": (1e-9, 1e9),
    "schedule.start_epochs": (0, 1e9),
    "schedule.warmup_epochs": (0, 1e9),
    "schedule.min_lr": (0, 1e6),
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
        check_arguments("config", run, config, given=("workdir", "profile"))
    with all_mistakes() as checks:
        with checks.check():
            _check_ranges(config)
        periods = {"total": config["total"], "picture_every": config.get("picture_every", 0)}
        data: dict[str, Any] = {}
        with checks.check():
            data = _block("config.data", data_block, config["data"])
        with checks.check():
            train_block = {"source": "tfds", **data.get("train", {})}
            constructor = look_up("config.data.train.source", SOURCES, train_block.pop("source"))
            check_arguments("config.data.train", constructor, train_block, given=("modalities",))
        with checks.check():
            parse_augment(data.get("augment"))
        with checks.check():
            _block("config.init_from", init_block, config.get("init_from") or {})
        with checks.check():
            periods["guard.replicas_every"] = _block("config.guard", guard_block, config.get("guard") or {})["replicas_every"]
        with checks.check():
            check_writers(config.get("writers", ()))
        with checks.check():
            periods["checkpoint.every"] = _block("config.checkpoint", checkpoint_block, config.get("checkpoint") or {})["every"]
        with checks.check():
            given = ("base_lr", "global_batch", "steps_per_epoch", "imported_epochs")
            check_arguments("config.schedule", make_schedule, config["schedule"], given)
        with checks.check():
            check_arguments("config.optimizer", optimizer_block, config["optimizer"])
            if config["optimizer"].get("freeze"):
                periods["optimizer.freeze.until"] = _block("config.optimizer.freeze", freeze_block, config["optimizer"]["freeze"])["until"]
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


# Start-up


def start_params(objective: Any, seed: int, init_from: Mapping[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """Fresh parameters, replaced by a checkpoint's where `init_from` names one: (params, moments).

    Imported optimiser moments come along only where every trained tensor was loaded as it is.
    """
    params = jax.jit(lambda key: objective.init(key)[0])(jax.random.key(seed))
    if not init_from["path"]:
        return params, None
    params, rows = checkpoints.init_from(params, **init_from)
    LOG.info("%s", checkpoints.format_report(rows))
    changed = [row for row in rows if row.action in ("fresh", "dropped")]
    moments = checkpoints.load_adam(init_from["path"])
    if moments is not None and changed:
        LOG.info("the checkpoint's optimiser moments are not used: its parameters do not map one to one to this model's")
        moments = None
    if moments is not None:
        LOG.info("optimiser moments imported, at update %d", int(moments["count"]))
    return params, moments


def write_parameter_table(workdir: str, shapes: Any) -> None:
    """Every parameter's name, shape and size as WORKDIR/parameters.txt."""
    from clu import parameter_overview

    table = parameter_overview.get_parameter_overview(shapes, include_stats=False)
    (Path(workdir) / "parameters.txt").write_text(table + "\n")


def start_report(
    objective: Any, mesh: Any, source: Any, shapes: Any, schedule: Cosine, step: int, *, total_steps: int, steps_per_epoch: int,
    global_batch: int, micro_batches: int, flops: float, memory: float,
) -> str:  # fmt: skip
    """What is about to run, in a few lines."""
    model, device = objective.model, mesh.devices.flat[0]
    total, trainable = count_parameters(shapes, model)
    tokens = ", ".join(f"{name} {size}" for name, size in zip(model.layout.names, model.layout.sizes, strict=True))
    rates = [float(schedule(s)) for s in (step, (step + total_steps) // 2, total_steps)]
    work = flops * (total_steps - step)
    peak = peak_flops(device.device_kind)
    hours = f"; {work / (0.3 * peak * mesh.size) / 3600:.1f} h at 30 % of the devices' peak" if peak else ""
    limit = memory_limit()
    return "\n".join(
        [
            f"devices     {mesh.size} x {device.device_kind} in {jax.process_count()} process(es)",
            f"data        {source.describe()}",
            f"parameters  {total:,} of which {trainable:,} trained; parameters.txt lists them",
            f"tokens      {model.layout.num_tokens} ({tokens}), {objective.num_visible} visible",
            f"batch       {global_batch} in {micro_batches} micro-batch(es) of {global_batch // micro_batches}",
            f"memory      {memory / 1e9:.2f} GB per device" + (f" of {limit / 1e9:.1f} GB" if limit < float("inf") else ""),
            f"schedule    steps {step} to {total_steps} ({steps_per_epoch} per epoch), lr " + " -> ".join(f"{r:.3g}" for r in rates),
            f"arithmetic  {flops / 1e12:.3g} TFLOP per step, {work:.3g} FLOP to go{hours}",
        ]
    )


def warn_of_low_rate(cosine: Cosine, first: int, last: int, base_lr: float, global_batch: int) -> None:
    """Say so where the learning rate of steps `first` ... `last` - 1 stays so low that next to nothing will be learned."""
    highest = max(float(cosine(round(step))) for step in np.linspace(first, max(first, last - 1), 20))
    if highest < LOW_RATE:
        LOG.warning(
            "the learning rate stays below %.1e: config.optimizer.base_lr %g x config.global_batch %d / 256 = %.1e at its peak, and this "
            "run is at steps %d to %d of a schedule of %d. Hardly anything will be learned: raise config.optimizer.base_lr or "
            "config.global_batch, or start earlier in the schedule (config.schedule.start_epochs)",
            highest * 1.01, base_lr, global_batch, base_lr * global_batch / 256, cosine.start + first, cosine.start + last, cosine.total,
        )  # fmt: skip


# The parts


@dataclass
class Parts:
    """What a config stands for, built and checked; nothing was computed yet. Periods and lengths are in steps."""

    data: dict[str, Any]
    init_from: dict[str, Any]
    checkpoint: dict[str, Any]
    guard: dict[str, Any]
    optimizer: dict[str, Any]
    base_lr: float
    method: Any
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

    @property
    def loading(self) -> dict[str, Any]:
        """What the loader must deliver for a guidance source: arguments of `train_batches`."""
        source = self.method.guidance
        if source is None:
            return {}
        extras = tuple(key for key in source.batch_keys if key != "guidance")
        return dict(extras=extras, whole_every=source.whole_every, maps=source.maps, blocks=source.blocks)


def build_parts(config: Mapping[str, Any], profile: str | None) -> Parts:
    """The parts of a whole config. Raises `Mistakes` with everything that is wrong in any block of it."""
    check_config(config)
    checkpoint = checkpoint_block(**config["checkpoint"] or {})
    guard = guard_block(**config["guard"] or {})
    data = data_block(**config["data"])
    views = parse_augment(data["augment"]).views
    optimizer = dict(config["optimizer"])
    base_lr, global_batch = optimizer.pop("base_lr"), config["global_batch"]
    method = build_objective({key: config[key] for key in ("modalities", "image_size", "objective")})
    specs = {spec.name: spec for spec in method.model.modalities}
    mesh = make_mesh()
    with all_mistakes() as checks:
        with checks.check():
            if not method.model.outputs and not method.model.projection:
                raise ValueError("config.objective.outputs is empty: there is nothing to train for")
        with checks.check():
            if bool(method.model.projection) != (views is not None):
                what = "takes one view of a record: remove" if views is not None else "learns from several views of a record: set"
                raise ValueError(f"config.objective.name {config['objective']['name']!r} {what} config.data.augment.views")
        with checks.check():
            check_batch(global_batch, mesh)
            micro_batch_counts(global_batch, config["micro_batch"], mesh.size)
        with checks.check():
            window = parse_window(profile)
        with checks.check(FileNotFoundError):
            train_source = dict(data["train"])
            source = open_source(train_source.pop("source", "tfds"), specs, **train_source)
            steps_per_epoch = epoch_steps(len(source), global_batch)
    with all_mistakes() as checks:
        duration = functools.partial(to_steps, steps_per_epoch=steps_per_epoch, global_batch=global_batch)
        total_steps = duration(config["total"])
        period = functools.partial(duration, total_steps=total_steps)
        with checks.check():
            if not _continues_imported(config):
                _schedule(config, base_lr, steps_per_epoch, total_steps, None)
        with checks.check():
            method = method.resolve(period)
        with checks.check():
            if optimizer.get("freeze"):
                freeze = _block("config.optimizer.freeze", freeze_block, optimizer["freeze"])
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
                objective=method, modalities=specs, image_size=method.model.image_size, mesh=mesh, data=data,
            )  # fmt: skip
    return Parts(
        data, init_block(**config["init_from"] or {}), checkpoint, guard, optimizer, base_lr, method, mesh, specs, source, views,
        steps_per_epoch, total_steps, periods, evaluations, evaluators, window,
    )  # fmt: skip


# The run


def run(
    workdir: str,
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
    deterministic: bool = False,
    writers: Sequence[str] = (),
    profile: str | None = None,
) -> TrainState:
    """Train to `total` (a duration: "100 epochs", "2000 steps"; 0 only evaluates), or resume where `workdir` stopped.

    Start order: resume from the newest sound checkpoint of `workdir`, else `init_from`, else scratch. `global_batch` is
    the recipe's; `micro_batch` samples (0: as many as fit) are processed at once. `log_every` is in steps, `picture_every`
    and `checkpoint.every` are durations. `guard`: see `maskvit.training.spikes`. `deterministic`: on GPUs too a run is
    repeated bit for bit. Returns the final state.

    Raises `Mistakes` for a config that cannot work, before anything is computed, and Stopped after a signal.
    """
    given = dict(locals())
    config = _arguments(inspect.signature(run).bind(**given))
    parts = build_parts(config, profile)
    with contextlib.ExitStack() as closing:
        store = checkpoints.CheckpointStore(os.path.join(workdir, "checkpoints"), keep=parts.checkpoint["keep"])
        closing.callback(store.close)
        resume_step = store.latest_valid()
        saved = store.metadata(resume_step) if resume_step is not None else {}
        same = compared_on_resuming(config, parts)
        if saved:
            checkpoints.check_same_run(saved, same, default_config(config))
        imported_epochs = _imported_epochs(config, parts, saved)
        cosine = _schedule(config, parts.base_lr, parts.steps_per_epoch, parts.total_steps, imported_epochs)
        shapes = jax.eval_shape(lambda key: parts.method.init(key)[0], jax.random.key(seed))
        optim = adamw(shapes, frozen_mask(shapes, parts.method.model), cosine, **parts.optimizer)
        log = make_writers(writers, workdir, config, resume_step)
        closing.callback(log.close)

        abstract = jax.eval_shape(lambda: init_state(parts.method, optim, seed, len(parts.source)))
        shardings = parameter_shardings(abstract, parts.mesh)
        if resume_step is not None:
            target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
            state = store.restore(resume_step, target)
            LOG.info("resuming at step %d of %d from %s", resume_step, parts.total_steps, workdir)
        else:
            state = _first_state(parts, optim, shardings, seed)

        step = int(state.step)
        if step >= parts.total_steps:
            _evaluate_alone(parts, state, log)
            LOG.info("nothing to train: step %d of %d", step, parts.total_steps)
            return state
        signals = closing.enter_context(StopSignals())
        warn_of_low_rate(cosine, step, parts.total_steps, parts.base_lr, global_batch)
        warn_of_little_space(store.directory, sum(x.nbytes for x in jax.tree.leaves(state)), store.keep)
        batches = train_batches(
            parts.source, parts.specs, parts.method.model.image_size, seed=seed, global_batch=global_batch, start_step=step,
            augment=parts.data["augment"], process_index=jax.process_index(), process_count=jax.process_count(),
            workers=parts.data["workers"], prefetch=parts.data["prefetch"], timeout=parts.data["timeout"],
            inputs=parts.method.model.inputs, **parts.loading,
        )  # fmt: skip
        closing.callback(batches.close)
        place = functools.partial(place_batch, mesh=parts.mesh)
        batch, telling = place(first_batch(batches, signals)), Telling(parts.mesh)
        pure_step = functools.partial(
            _placed_step, objective=parts.method, optimizer=optim, shardings=shardings, result_sharding=replicated(parts.mesh)
        )
        compiled, micro_batches, memory = compile_step(
            pure_step, (state, batch, np.int32(seed), np.float32(0), telling(0, has_batch=True)), global_batch=global_batch,
            micro_batch=micro_batch, before=int(saved.get("micro_batches", 0)), devices=parts.mesh.size, model=parts.method.model,
            deterministic=deterministic,
        )  # fmt: skip
        flops = _flops(parts, global_batch)
        if jax.process_index() == 0:
            write_parameter_table(workdir, shapes)
            LOG.info("%s", start_report(
                parts.method, parts.mesh, parts.source, shapes, cosine, step, total_steps=parts.total_steps,
                steps_per_epoch=parts.steps_per_epoch, global_batch=global_batch, micro_batches=micro_batches, flops=flops, memory=memory,
            ))  # fmt: skip
        draws = parts.periods["picture"] > 0
        parts_of_loop = Run(
            workdir=Path(workdir), total_steps=parts.total_steps, steps_per_epoch=parts.steps_per_epoch, log_every=log_every, seed=seed,
            periods=parts.periods, evaluations=parts.evaluations, evaluators=parts.evaluators, draws=draws,
            painter=Painter(parts.method, parts.source, parts.specs, seed, parts.loading) if draws and jax.process_index() == 0 else None,
            store=store, log=log, batches=batches, place=place, compiled=compiled, telling=telling,
            guard=Guard.resumed({name: parts.guard[name] for name in ("max_skipped", "sigmas", "on_spike")}, saved.get("guard")),
            throughput=Throughput(global_batch, flops), profile=parts.profile, timeout=parts.data["timeout"], saved=saved,
            metadata=dict(same, versions=checkpoints.versions(), imported_epochs=imported_epochs, micro_batches=micro_batches),
        )  # fmt: skip
        return Loop(parts_of_loop, state, batch, signals, closing).run()


def compared_on_resuming(config: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """What of a run goes into its checkpoints so that `checkpoints.check_same_run` can compare it."""
    durations = resolved_durations(parts.method)
    if parts.optimizer.get("freeze"):
        durations["optimizer.freeze.until"] = parts.optimizer["freeze"]["until"]
    maps = parts.loading.get("maps")
    of_maps = dict(maps=data_identity(open_maps(maps))) if maps else {}
    return dict(config=config, steps_per_epoch=parts.steps_per_epoch, data=data_identity(parts.source), durations=durations, **of_maps)


def default_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted key: value} of all that `config` may leave out, from the signatures that read its blocks."""
    readers: dict[str, Any] = {
        "": run, "data": data_block, "optimizer": optimizer_block, "schedule": make_schedule, "init_from": init_block,
        "checkpoint": checkpoint_block, "guard": guard_block, "objective": OBJECTIVES[config["objective"]["name"]],
        "data.train": SOURCES[config["data"]["train"].get("source", "tfds")],
        **{f"modalities.{name}": Modality for name in config["modalities"]},
    }  # fmt: skip
    return {
        f"{block}.{name}".removeprefix("."): parameter.default
        for block, reader in readers.items()
        for name, parameter in inspect.signature(reader).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    } | {"data.train.source": "tfds"}


def _imported_epochs(config: Mapping[str, Any], parts: Parts, saved: Mapping[str, Any]) -> float | None:
    """For how many epochs the imported checkpoint was trained, where the schedule continues there."""
    if saved or not _continues_imported(config) or not parts.init_from["path"]:
        return saved.get("imported_epochs")
    return checkpoints.load_epochs_done(parts.init_from["path"])


def _continues_imported(config: Mapping[str, Any]) -> bool:
    return config["schedule"].get("start_epochs", 0) is None


def _schedule(config: Mapping[str, Any], base_lr: float, steps_per_epoch: int, total_steps: int, imported_epochs: float | None) -> Cosine:
    """The learning rate of the run. Raises where the run is longer than its schedule."""
    cosine = make_schedule(base_lr, config["global_batch"], steps_per_epoch, imported_epochs=imported_epochs, **config["schedule"])
    if cosine.start + total_steps > cosine.total:
        raise ValueError(
            f"config.total is {total_steps} steps from step {cosine.start} of a schedule of {cosine.total}: it would run "
            "past the schedule's end; raise config.schedule.total_epochs or lower config.total"
        )
    return cosine


def _first_state(parts: Parts, optim: Any, shardings: Any, seed: int) -> TrainState:
    """The state of step 0: fresh, or from a checkpoint's parameters, moments and teacher."""
    init_from = parts.init_from
    params, moments = start_params(parts.method, seed, init_from)
    objective_state = jax.jit(lambda p: parts.method.init_state(p, len(parts.source)))(params)
    if init_from["path"] and not (init_from["fresh"] or init_from["drop"]):
        objective_state = checkpoints.with_stored_teacher(objective_state, init_from["path"])
    state = state_from_params(params, objective_state, optim)
    if moments is not None:
        state = state._replace(opt_state=with_adam_moments(state.opt_state, moments))
    # Through host memory: every process holds the same values, and places its own part of them.
    return jax.tree.map(lambda x, s: jax.device_put(np.asarray(x), s), state, shardings)


def _evaluate_alone(parts: Parts, state: TrainState, log: Writers) -> None:
    """`config.total = 0`: the evaluators once, and nothing else."""
    for name in parts.evaluators if parts.total_steps == 0 else ():
        write_figures(log, int(state.step), evaluate(parts.evaluators, name, state, lambda: None))


def _flops(parts: Parts, global_batch: int) -> float:
    """The model's arithmetic per step, in FLOP."""
    if parts.views is None:
        return global_batch * step_flops(parts.method)
    return global_batch * distillation_flops(parts.method, GLOBAL_VIEWS, parts.views.local_crops, parts.views.local_image_size)


def _placed_step(
    state: Any, batch: Any, seed: Any, loss_limit: Any, word: Any, *, objective: Any, optimizer: Any, micro_batches: int, shardings: Any,
    result_sharding: Any,
) -> tuple[TrainState, Results]:  # fmt: skip
    """`train_step` whose results stay where the rules put them, with what the processes told along with it (see `Telling`)."""
    told = word.max(axis=0)
    # Whatever is communicated in the step comes after this: two exchanges without an order can block each other on the CPU. All of
    # them depend on the seed; that of a void step does not matter.
    seed = jnp.where(told[1] > 0, 0, seed)
    state, metrics = train_step(
        state, batch, objective=objective, optimizer=optimizer, seed=seed, micro_batches=micro_batches, loss_limit=loss_limit,
        void=told[1] > 0,
    )  # fmt: skip
    state = jax.lax.with_sharding_constraint(state, shardings)
    return state, jax.lax.with_sharding_constraint(Results(metrics, told, optax.tree.norm(state.params)), result_sharding)
