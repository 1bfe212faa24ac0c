"""`setup`: from a config to a `Run`, its state restored or begun and its step compiled; `loop` does the rest."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maskvit import checkpoints
from maskvit.core.errors import FAILED, log_lines, message
from maskvit.core.types import TrainState
from maskvit.data.batches import train_batches
from maskvit.data.workers import LoaderError
from maskvit.metrics.results import ResultsFile
from maskvit.metrics.throughput import Throughput
from maskvit.metrics.writers import make_writers
from maskvit.nn.backbone import frozen_mask
from maskvit.optim import build_optimizer
from maskvit.optim.transforms import Optimizer
from maskvit.sharding import parameter_shardings, place_batch, record_rows, replicated, sample_devices
from maskvit.training.best import Best
from maskvit.training.config import check_config, default_config, experiment
from maskvit.training.disk import warn_of_little_space
from maskvit.training.flight import Results, Telling
from maskvit.training.loop import PICTURES, Run, first_batch, loop
from maskvit.training.microbatches import compile_step
from maskvit.training.painter import Painter
from maskvit.training.parts import Parts, build_parts, compared_on_resuming, imported_epochs, schedule_of
from maskvit.training.signals import StopSignals
from maskvit.training.spikes import Guard
from maskvit.training.start import first_state, fresh_params, origin, start_report, warn_of_low_rate, write_parameter_table
from maskvit.training.step import init_state, train_step

LOG = logging.getLogger("maskvit")


def main(config: Any, workdir: str, profile: str | None = None, debug: bool = False) -> None:
    """`train` a ConfigDict, with log lines on standard error. Raises what `train` raises; several mistakes in the config are one list."""
    log_lines(debug)
    try:
        train(workdir, profile, **config.to_dict())
    except LoaderError as error:
        if not error.thread_hangs:
            raise
        print(f"error: {message(error)}", file=sys.stderr, flush=True)
        os._exit(FAILED)  # the interpreter would wait for that thread, for ever


def train(workdir: str, profile: str | None = None, **config: Any) -> TrainState:
    """Train as the config says (`maskvit.training.config.experiment`), or resume where `workdir` stopped. Returns the final state.

    Raises `Mistakes` for a config that cannot work, before anything is computed, and Stopped after a signal.
    """
    return loop(setup(config, workdir, profile))


def setup(config: Mapping[str, Any], workdir: str, profile: str | None = None) -> Run:
    """Build and check all parts, restore or begin the state, fetch the first batch, compile the step.

    Start order: resume from the newest sound checkpoint of `workdir`, else `init_from`, else scratch. `profile`: steps to trace.
    """
    check_config(config)
    config = experiment(**config)
    parts = build_parts(config, profile)
    with contextlib.ExitStack() as closing:
        store = checkpoints.CheckpointStore(os.path.join(workdir, "checkpoints"), keep=parts.checkpoint["keep"])
        closing.callback(store.close)
        resume_step = store.latest_valid()
        saved = store.metadata(resume_step) if resume_step is not None else {}
        same = compared_on_resuming(config, parts)
        if saved:
            checkpoints.check_same_run(saved, same, default_config(config))
        done = imported_epochs(config, parts, saved)
        schedule = schedule_of(config, parts.base_lr, parts.steps_per_epoch, parts.total_steps, done)
        shapes = fresh_params.eval_shape(parts.objective, jax.random.key(config["seed"]))
        optimizer = build_optimizer(shapes, frozen_mask(shapes, parts.objective.model), schedule, **parts.optimizer)
        log = make_writers(config["writers"], workdir, config, resume_step)
        closing.callback(log.close)
        state, shardings = _state(config, parts, optimizer, store, resume_step)
        run = Run(
            workdir=Path(workdir), total_steps=parts.total_steps, steps_per_epoch=parts.steps_per_epoch, log_every=config["log_every"],
            seed=config["seed"], periods=parts.periods, evaluations=parts.evaluations, evaluators=parts.evaluators,
            draws=parts.periods["picture"] > 0, store=store, log=log, profile=parts.profile, timeout=parts.data["timeout"], saved=saved,
            metadata=dict(same, versions=checkpoints.versions(), imported_epochs=done, **origin(parts.init_from["path"], saved)),
            results=None if jax.process_index() else ResultsFile(workdir, config, resume_step, _initial(parts.init_from["path"], saved)),
            state=state,
            best=Best.resumed(parts.best, saved.get("best")) if parts.best else None,
            guard=Guard.resumed({name: parts.guard[name] for name in ("max_skipped", "sigmas", "on_spike")}, saved.get("guard")),
        )  # fmt: skip
        step = int(state.step)
        if step < parts.total_steps:
            run.signals = closing.enter_context(StopSignals())
            warn_of_low_rate(schedule, step, parts.total_steps, parts.base_lr, config["global_batch"])
            warn_of_little_space(store.directory, sum(x.nbytes for x in jax.tree.leaves(state)), store.keep)
            _open_batches(run, config, parts, closing)
            memory = _compile(run, config, parts, optimizer, shardings)
            if jax.process_index() == 0:
                write_parameter_table(workdir, shapes)
                LOG.info("%s", start_report(parts, run, shapes, optimizer, step, config["global_batch"], memory))
        if run.draws and (step < parts.total_steps or PICTURES in saved.get("due", ())):
            run.painter = Painter(parts.objective, parts.source, parts.specs, config["seed"], parts.mesh)
        run.closing = closing.pop_all()
    return run


def _state(
    config: Mapping[str, Any], parts: Parts, optimizer: Optimizer, store: checkpoints.CheckpointStore, resume_step: int | None
) -> tuple[TrainState, Any]:
    """The state to train from, on the devices, and where its arrays lie."""
    rows = record_rows(len(parts.source), parts.mesh)
    abstract = jax.eval_shape(lambda: init_state(parts.objective, optimizer, config["seed"], rows))
    shardings = parameter_shardings(abstract, parts.mesh)
    if resume_step is None:
        return first_state(parts, optimizer, shardings, config["seed"], rows), shardings
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    state = store.restore(resume_step, target)
    LOG.info("resuming at step %d of %d from %s", resume_step, parts.total_steps, store.directory.parent)
    return state, shardings


def _initial(path: str, saved: Mapping[str, Any]) -> str:
    """Which weights a run begins with: a checkpoint, and the digest of its manifest. One that is resumed does not need it any more."""
    if not path:
        return "fresh"
    if saved:
        started = saved.get("started_from")
        return f"{path} ({started['digest']})" if started else path
    step_dir = checkpoints.find_checkpoint(path)
    return f"{step_dir} ({checkpoints.manifest_digest(step_dir)})"


def _open_batches(run: Run, config: Mapping[str, Any], parts: Parts, closing: contextlib.ExitStack) -> None:
    """Start the loader at the state's step, and wait for its first batch."""
    run.batches = train_batches(
        parts.source, parts.specs, parts.objective.model.image_size, seed=config["seed"], global_batch=config["global_batch"],
        start_step=int(run.state.step), augment=parts.data["augment"], process_index=jax.process_index(),
        process_count=jax.process_count(), workers=parts.data["workers"], prefetch=parts.data["prefetch"], timeout=parts.data["timeout"],
        inputs=parts.objective.model.inputs, **parts.objective.needs.loading(),
    )  # fmt: skip
    closing.callback(run.batches.close)
    run.place = functools.partial(place_batch, mesh=parts.mesh)
    run.batch = run.place(first_batch(run.batches, run.signals))


def _compile(run: Run, config: Mapping[str, Any], parts: Parts, optimizer: Optimizer, shardings: Any) -> float:
    """Compile the step for the state and the first batch; returns the memory it needs per device, in bytes."""
    run.telling = Telling(parts.mesh)
    pure_step = functools.partial(
        _placed_step, objective=parts.objective, optimizer=optimizer, mesh=parts.mesh, shardings=shardings,
        result_sharding=replicated(parts.mesh),
    )  # fmt: skip
    arguments = run.state, run.batch, np.int32(config["seed"]), np.float32(0), run.telling(0, has_batch=True)
    run.compiled, micro_batches, memory = compile_step(
        pure_step, arguments, global_batch=config["global_batch"], micro_batch=config["micro_batch"],
        before=int(run.saved.get("micro_batches", 0)), devices=sample_devices(parts.mesh), model=parts.objective.model,
        deterministic=config["deterministic"],
    )  # fmt: skip
    run.metadata["micro_batches"] = micro_batches
    run.throughput = Throughput(config["global_batch"], config["global_batch"] * parts.objective.flops(parts.views))
    return memory


def _placed_step(
    state: Any, batch: Any, seed: Any, loss_limit: Any, word: Any, *, objective: Any, optimizer: Any, micro_batches: int, mesh: Any,
    shardings: Any, result_sharding: Any,
) -> tuple[TrainState, Results]:  # fmt: skip
    """`train_step` whose results stay where the rules put them, with what the processes told along with it (see `Telling`)."""
    told = word.max(axis=0)
    # Whatever is communicated in the step comes after this: two exchanges without an order can block each other on the CPU. All of
    # them depend on the seed; that of a void step does not matter.
    seed = jnp.where(told[1] > 0, 0, seed)
    state, metrics = train_step(
        state, batch, objective=objective, optimizer=optimizer, seed=seed, micro_batches=micro_batches, loss_limit=loss_limit,
        void=told[1] > 0, mesh=mesh,
    )  # fmt: skip
    state = jax.lax.with_sharding_constraint(state, shardings)
    return state, jax.lax.with_sharding_constraint(Results(metrics, told, optax.tree.norm(state.params)), result_sharding)
