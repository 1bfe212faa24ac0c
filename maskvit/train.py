"""`run`: the parts of an experiment built from its config, and the one loop that trains and evaluates everything."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maskvit import checkpoints
from maskvit.configuration import check_arguments, look_up
from maskvit.data import SOURCES, open_source
from maskvit.data.pipeline import eval_batches, train_batches
from maskvit.data.pipeline import steps_per_epoch as epoch_steps
from maskvit.data.transforms import parse_augment
from maskvit.data.views import GLOBAL_VIEWS
from maskvit.durations import is_time, to_steps
from maskvit.errors import all_mistakes
from maskvit.evaluators import build_evaluators, check_evaluator
from maskvit.flops import distillation_flops, step_flops
from maskvit.keys import sample_keys
from maskvit.metrics import Accumulator, Progress, Throughput, make_writers, peak_flops
from maskvit.models import count_parameters, frozen_mask
from maskvit.objectives import build_objective
from maskvit.optim import Cosine, adamw, freeze_block, with_adam_moments
from maskvit.sharding import check_batch, make_mesh, parameter_shardings, place_batch, replicated
from maskvit.step import init_state, state_from_params, train_step
from maskvit.types import Batch, TrainState

LOG = logging.getLogger("maskvit")
PICTURE_SAMPLES = 4


class ConfigError(ValueError):
    """The config asks for something that does not exist or does not fit; nothing was computed yet."""


class Stopped(SystemExit):
    """The run was asked to end (SIGTERM); its state is saved. The exit code is the signal's, 143."""


def main(config: Any, workdir: str, profile: str | None = None) -> None:
    """`run` a ConfigDict, with log lines on standard error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("absl", "orbax", "jax", "grain"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    plain = config.to_dict()
    with _config_errors():
        check_config(plain)
    run(workdir, profile=profile, **plain)


@contextlib.contextmanager
def _config_errors() -> Iterator[None]:
    """Mistakes found while the parts are built are the config's."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


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
    *, train: Mapping[str, Any], augment: Mapping[str, Any] | None = None, workers: int = 0, prefetch: int = 2
) -> dict[str, Any]:
    """`config.data`."""
    return dict(train=dict(train), augment=dict(augment or {}), workers=workers, prefetch=prefetch)


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


def check_config(config: Mapping[str, Any]) -> None:
    """Raise `Mistakes` with all that is wrong with a plain config, as far as it shows without data, devices and files."""
    arguments: dict[str, Any] = {"seed": 0, "micro_batch": 0, "log_every": 50, "picture_every": 0, **config}
    with all_mistakes() as checks, checks.check():
        check_arguments("config", run, config, given=("workdir", "profile"))
    with all_mistakes() as checks:
        for key, least in (("global_batch", 1), ("micro_batch", 0), ("log_every", 1), ("seed", 0)):
            with checks.check():
                if not least <= arguments[key] < 2**31:
                    raise ValueError(f"config.{key} is {arguments[key]}; it must be at least {least} and below 2**31")
        periods = {"total": config["total"], "picture_every": arguments["picture_every"]}
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
                    to_steps(period, steps_per_epoch=1, global_batch=1, total_steps=None if key == "total" else 1)
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


def compile_step(
    step: Any, state: TrainState, batch: Any, seed: Any, *, global_batch: int, micro_batch: int, devices: int, model: Any
) -> tuple[Any, int, float]:
    """Compile the train step with as few micro-batches as fit: (compiled step, micro-batches, bytes per device).

    `micro_batch` > 0 fixes the samples at once over all devices. Else the compiler's own account of memory decides,
    from an estimate on.
    """
    limit = memory_limit()
    counts = micro_batch_counts(global_batch, micro_batch, devices)
    if limit is not None:
        per_sample = activation_bytes(model)
        counts = [n for n in counts if global_batch / n / devices * per_sample < limit] or counts[-1:]
    for n in counts:
        compiled = jax.jit(functools.partial(step, micro_batches=n), donate_argnums=0).lower(state, batch, seed).compile()
        memory = compiled.memory_analysis()
        needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes if memory else 0
        if limit is None or needed <= limit or n == counts[-1]:
            break
        LOG.info("%d micro-batch(es) would need %.1f GB per device of %.1f GB: trying more", n, needed / 1e9, limit / 1e9)
    if limit is not None and needed > limit:
        LOG.warning(
            "the step needs %.1f GB per device, which has %.1f GB: lower config.micro_batch or set remat=True", needed / 1e9, limit / 1e9
        )
    return compiled, n, needed


def micro_batch_counts(global_batch: int, micro_batch: int, devices: int) -> list[int]:
    """Into how many micro-batches a batch may be split, fewest first; just one number where `micro_batch` is given."""
    counts = [n for n in range(1, global_batch // devices + 1) if global_batch % (n * devices) == 0]
    if not micro_batch:
        return counts
    if global_batch % micro_batch or global_batch // micro_batch not in counts:
        sizes = ", ".join(str(global_batch // n) for n in counts[:6])
        raise ConfigError(
            f"config.micro_batch is {micro_batch}: it must divide config.global_batch {global_batch} into equal parts on {devices} "
            f"devices, for example {sizes}; 0 takes the largest that fits"
        )
    return [global_batch // micro_batch]


def activation_bytes(model: Any) -> float:
    """A floor for what one sample keeps for the backward pass: eight activations and one attention map per encoder block.

    Only a first guess, which saves compilations; the compiler's account decides.
    """
    encoder = dict(model.encoder)
    tokens = 100 if model.remat else 200
    width = 2 if model.compute_dtype == "bfloat16" else 4
    return tokens * 8 * encoder["width"] * (1 if model.remat else encoder["depth"]) * width


def memory_limit() -> float | None:
    """Bytes one device may use: its own limit, or its share of the free main memory on the CPU."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return 0.8 * free / jax.local_device_count()


def stop_on_sigterm() -> threading.Event:
    """An event that SIGTERM sets; a second signal ends the process at once. Only the main thread can listen."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        return asked

    def handle(number: int, frame: Any) -> None:
        if asked.is_set():
            os._exit(128 + number)
        asked.set()

    signal.signal(signal.SIGTERM, handle)
    return asked


def all_processes_stop(asked: threading.Event, step: int, log_every: int) -> bool:
    """Whether to stop at this step: the same answer on every process. Several processes agree every `log_every` steps."""
    if jax.process_count() == 1:
        return asked.is_set()
    if step % log_every:
        return False
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(asked.is_set())).any())


def profile_window(profile: str | None) -> Any:
    """`--profile=START:STOP` to a function of (step, directory) that traces those steps with JAX's profiler."""
    if not profile:
        return lambda step, directory: None
    try:
        start, stop = (int(part) for part in profile.split(":"))
    except ValueError as error:
        raise ConfigError(f"--profile is {profile!r}; expected START:STOP in steps, for example 10:20") from error

    def trace(step: int, directory: Path) -> None:
        if step == start:
            jax.profiler.start_trace(str(directory))
        if step == stop:
            jax.profiler.stop_trace()

    return trace


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
            f"parameters  {total:,} of which {trainable:,} trained",
            f"tokens      {model.layout.num_tokens} ({tokens}), {objective.num_visible} visible",
            f"batch       {global_batch} in {micro_batches} micro-batch(es) of {global_batch // micro_batches}",
            f"memory      {memory / 1e9:.2f} GB per device" + (f" of {limit / 1e9:.1f} GB" if limit else ""),
            f"schedule    steps {step} to {total_steps} ({steps_per_epoch} per epoch), lr " + " -> ".join(f"{r:.3g}" for r in rates),
            f"arithmetic  {flops / 1e12:.3g} TFLOP per step, {work:.3g} FLOP to go{hours}",
        ]
    )


def guidance_loading(source: Any) -> dict[str, Any]:
    """What the loader must deliver for a guidance source: arguments of `train_batches`."""
    if source is None:
        return {}
    extras = tuple(key for key in source.batch_keys if key != "guidance")
    return dict(extras=extras, whole_every=source.whole_every, maps=source.maps, blocks=source.blocks)


# Pictures


class Painter:
    """Draws the same few unaugmented samples every time, on process 0."""

    def __init__(self, objective: Any, source: Any, modalities: Mapping[str, Any], seed: int, loading: Mapping[str, Any]):
        self._objective, self._seed = objective, seed
        self._modalities = modalities
        size = objective.model.image_size
        loading = {key: value for key, value in loading.items() if key != "whole_every"}
        batches = eval_batches(
            source, modalities, size, batch_size=PICTURE_SAMPLES, limit=PICTURE_SAMPLES, inputs=objective.model.inputs, **loading
        )
        with batches:
            first = next(batches)
        self._batch = {k: v for k, v in first.items() if isinstance(v, np.ndarray) and k not in ("valid", "label")}
        self._visualize = jax.jit(objective.visualize)

    def __call__(self, state: TrainState) -> dict[str, np.ndarray]:
        """{name: picture} for the writers."""
        from PIL import Image

        from maskvit.figures import masking_panel

        # Parameters are the same on every device: one local copy serves, and the other processes need not take part.
        params, objective_state = jax.tree.map(lambda x: x.addressable_data(0), (state.params, state.objective_state))
        keys = sample_keys(self._seed, 0, PICTURE_SAMPLES)
        step = state.step.addressable_data(0)
        arrays = jax.device_get(self._visualize(params, objective_state, self._batch, keys, step=step))
        return {"masking": np.asarray(Image.open(io.BytesIO(masking_panel(arrays, self._modalities, PICTURE_SAMPLES))).convert("RGB"))}


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
    writers: Sequence[str] = (),
    profile: str | None = None,
) -> TrainState:
    """Train to `total` (a duration: "100 epochs", "2000 steps"; 0 only evaluates), or go on where `workdir` stopped.

    Start order: resume from the newest sound checkpoint of `workdir`, else `init_from`, else scratch. `global_batch` is
    the recipe's; `micro_batch` samples (0: as many as fit) are worked off at once. `log_every` is in steps, `picture_every`
    and `checkpoint.every` are durations. Returns the final state.
    """
    arguments = dict(locals())
    config = {key: arguments[key] for key in sorted(arguments) if key not in ("workdir", "profile")}

    # The parts, cheap ones first: whatever is wrong is said before any work is lost.
    with _config_errors():
        checkpoint = _block("config.checkpoint", checkpoint_block, checkpoint or {})
        init_from = _block("config.init_from", init_block, init_from or {})
        data = _block("config.data", data_block, data)
        check_arguments("config.schedule", make_schedule, schedule, ("base_lr", "global_batch", "steps_per_epoch", "imported_epochs"))
        check_arguments("config.optimizer", optimizer_block, optimizer)
        optimizer = dict(optimizer)
        base_lr = optimizer.pop("base_lr")
        method = build_objective(dict(modalities=modalities, image_size=image_size, objective=objective))
        if not 0 <= seed < 2**31:
            raise ValueError(f"config.seed is {seed}; it must be at least 0 and below 2**31")
        model = method.model
        if not model.outputs and not model.projection:
            raise ValueError("config.objective.outputs is empty: there is nothing to train for")
        mesh = make_mesh()
        check_batch(global_batch, mesh)
        specs = {spec.name: spec for spec in model.modalities}
        train_source = dict(data["train"])
        source = open_source(train_source.pop("source", "tfds"), specs, **train_source)
        steps_per_epoch = epoch_steps(len(source), global_batch)
        views = parse_augment(data["augment"]).views
        needs_views = bool(model.projection)
        if needs_views != (views is not None):
            what = "learns from several views of a record: set" if needs_views else "takes one view of a record: remove"
            raise ValueError(f"config.objective.name {objective['name']!r} {what} config.data.augment.views")
        micro_batch_counts(global_batch, micro_batch, mesh.size)
        duration = functools.partial(to_steps, steps_per_epoch=steps_per_epoch, global_batch=global_batch)
        total_steps = duration(total)
        method = method.resolve(functools.partial(duration, total_steps=total_steps))
        if optimizer.get("freeze"):
            freeze = _block("config.optimizer.freeze", freeze_block, optimizer["freeze"])
            optimizer["freeze"] = dict(freeze, until=duration(freeze["until"], total_steps=total_steps))
        loading = guidance_loading(method.guidance)
        every = {"checkpoint": duration(checkpoint["every"], total_steps=total_steps)}
        every["picture"] = duration(picture_every, total_steps=total_steps) if picture_every else 0
        evaluations = {
            name: duration(block.get("every", total_steps), total_steps=total_steps) for name, block in (evaluators or {}).items()
        }
        runners = build_evaluators(
            {n: {k: v for k, v in b.items() if k != "every"} for n, b in (evaluators or {}).items()},
            objective=method, modalities=specs, image_size=model.image_size, mesh=mesh, data=data,
        )  # fmt: skip
    store = checkpoints.CheckpointStore(Path(workdir) / "checkpoints", keep=checkpoint["keep"])

    # Resume > init_from > scratch.
    resume_step = store.latest_valid()
    saved = store.metadata(resume_step) if resume_step is not None else {}
    with _config_errors():
        if saved:
            checkpoints.check_same_run(saved["config"], config)
        shapes = jax.eval_shape(lambda key: method.init(key)[0], jax.random.key(seed))
        imported_epochs = saved.get("imported_epochs")
        if resume_step is None and init_from["path"] and schedule.get("start_epochs", 0) is None:
            imported_epochs = checkpoints.load_params(init_from["path"])[1].get("source", {}).get("epochs_done")
        cosine = make_schedule(base_lr, global_batch, steps_per_epoch, imported_epochs=imported_epochs, **schedule)
        if cosine.start + total_steps > cosine.total:
            raise ValueError(
                f"config.total is {total_steps} steps from step {cosine.start} of a schedule of {cosine.total}: it would run "
                "past the schedule's end; raise config.schedule.total_epochs or lower config.total"
            )
        optim = adamw(shapes, frozen_mask(shapes, model), cosine, **optimizer)
        log = make_writers(writers, workdir, config, resume_step)

    abstract = jax.eval_shape(lambda: init_state(method, optim, seed, len(source)))
    shardings = parameter_shardings(abstract, mesh)
    if resume_step is not None:
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
        state = store.restore(resume_step, target)
        LOG.info("resuming at step %d of %d from %s", resume_step, total_steps, workdir)
    else:
        with _config_errors():
            params, moments = start_params(method, seed, init_from)
        objective_state = jax.jit(lambda p: method.init_state(p, len(source)))(params)
        if init_from["path"] and not (init_from["fresh"] or init_from["drop"]):
            objective_state = checkpoints.with_stored_teacher(objective_state, init_from["path"])
        state = state_from_params(params, objective_state, optim)
        if moments is not None:
            state = state._replace(opt_state=with_adam_moments(state.opt_state, moments))
        # Through host memory: every process holds the same values, and places its own part of them.
        state = jax.tree.map(lambda x, s: jax.device_put(np.asarray(x), s), state, shardings)
        del params, objective_state, moments

    metadata = dict(config=config, versions=checkpoints.versions(), imported_epochs=imported_epochs, steps_per_epoch=steps_per_epoch)
    step = int(state.step)

    def evaluate(due: Sequence[str]) -> None:
        for name in due:
            results = {f"{name}/{key}": value for key, value in runners[name].run(state.params, state.objective_state)}
            LOG.info("step %d  %s", step, "  ".join(f"{key} {value:.2f}" for key, value in results.items()))
            log.write_scalars(step, results)

    if step >= total_steps:
        evaluate(list(runners) if total_steps == 0 else [])
        LOG.info("nothing to train: step %d of %d", step, total_steps)
        log.close()
        store.close()
        return state

    batches = train_batches(
        source, specs, model.image_size, seed=seed, global_batch=global_batch, start_step=step, augment=data["augment"],
        process_index=jax.process_index(), process_count=jax.process_count(), workers=data["workers"], prefetch=data["prefetch"],
        inputs=model.inputs, **loading,
    )  # fmt: skip
    batch: Batch | None = place_batch(next(batches), mesh)
    pure_step = functools.partial(_placed_step, objective=method, optimizer=optim, shardings=shardings, metric_sharding=replicated(mesh))
    # An argument, not a constant: runs that differ in their seed alone share a compilation.
    step_seed = np.int32(seed)
    compiled, micro_batches, memory = compile_step(
        pure_step, state, batch, step_seed, global_batch=global_batch, micro_batch=micro_batch, devices=mesh.size, model=model
    )
    if views is None:
        flops = global_batch * step_flops(method)
    else:
        flops = global_batch * distillation_flops(method, GLOBAL_VIEWS, views.local_crops, views.local_image_size)
    if jax.process_index() == 0:
        LOG.info("%s", start_report(
            method, mesh, source, shapes, cosine, step, total_steps=total_steps, steps_per_epoch=steps_per_epoch, global_batch=global_batch,
            micro_batches=micro_batches, flops=flops, memory=memory,
        ))  # fmt: skip
    painter = Painter(method, source, specs, seed, loading) if every["picture"] and jax.process_index() == 0 else None
    asked_to_stop = stop_on_sigterm()
    accumulated, throughput, progress = Accumulator(), Throughput(global_batch, flops), Progress(total_steps, step)
    trace = profile_window(profile)
    bad_before = int(saved.get("bad_samples", 0))

    def save() -> None:
        with throughput.paused():
            store.save(step, state, dict(metadata, bad_samples=bad_before + batches.bad_samples))

    # The order of these lines is what makes a resumed run equal an uninterrupted one: a checkpoint at step s holds
    # the state before batch s, and batch s is a function of s.
    try:
        while True:
            # A resumed run did all that is due at its first step before it stopped.
            fresh = step != resume_step
            due = [name for name, period in evaluations.items() if fresh and is_time(step, period, total_steps)]
            draw = painter if painter is not None and fresh and is_time(step, every["picture"], total_steps, first=True) else None
            if due or draw is not None:
                with throughput.paused():
                    jax.block_until_ready(state)
                    evaluate(due)
                    if draw is not None:
                        log.write_images(step, draw(state))
            if fresh and is_time(step, every["checkpoint"], total_steps):
                save()
            if step == total_steps:
                break
            if all_processes_stop(asked_to_stop, step, log_every):
                save()
                store.wait()
                LOG.info("stopped by SIGTERM at step %d, state saved: the same command goes on from here", step)
                raise Stopped(143)
            if batch is None:
                with throughput.waiting():
                    host_batch = next(batches)
                batch = place_batch(host_batch, mesh)
            trace(step, Path(workdir) / "profile")
            state, metrics = compiled(state, batch, step_seed)
            accumulated.add(metrics)
            batch, step = None, step + 1
            throughput.step()
            progress.update(step)
            if step % log_every == 0 or step == total_steps:
                values = accumulated.summarize()
                skipped = values.pop("skipped") * (log_every if step % log_every == 0 else step % log_every)
                values |= throughput.read() | {"skipped_steps": float(state.skipped), "epoch": step / steps_per_epoch}
                if bad_before + batches.bad_samples:
                    values["bad_samples"] = float(bad_before + batches.bad_samples)
                progress.report(step, values)
                for alarm in (name for name, value in values.items() if name.startswith("alarm/") and value > 0):
                    progress.message(f"step {step}: ALARM {alarm.removeprefix('alarm/')} in {values[alarm]:.0%} of the last steps")
                if skipped:
                    progress.message(f"step {step}: {round(skipped)} of the last steps skipped, loss or gradient was not finite")
                log.write_scalars(step, values)
                if round(skipped) >= log_every > 1:
                    raise FloatingPointError(
                        f"all of the last {log_every} steps up to step {step} had a non-finite loss or gradient: look at the data and the "
                        f"learning rate; the last checkpoint in {workdir} is from before the loss was lost"
                    )
    finally:
        batches.close()
        progress.close()
        store.close()
        log.close()
    return state


def _placed_step(
    state: Any, batch: Any, seed: Any, *, objective: Any, optimizer: Any, micro_batches: int, shardings: Any, metric_sharding: Any
):
    """`train_step` whose results stay where the rules put them."""
    state, metrics = train_step(state, batch, objective=objective, optimizer=optimizer, seed=seed, micro_batches=micro_batches)
    state = jax.lax.with_sharding_constraint(state, shardings)
    return state, jax.lax.with_sharding_constraint(metrics, metric_sharding)
