"""The start of a run: its first state, and what is told and written before the first step."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maskvit import checkpoints
from maskvit.core.processes import cpu_threads
from maskvit.core.types import Params, TrainState
from maskvit.metrics.throughput import peak_flops
from maskvit.nn.attention import kernel_in_words
from maskvit.nn.backbone import count_parameters
from maskvit.optim.schedules import Schedule
from maskvit.optim.transforms import Optimizer, with_adam_moments
from maskvit.training.loop import Run
from maskvit.training.microbatches import memory_limit
from maskvit.training.parts import Parts, learned_classes
from maskvit.training.step import state_from_params

LOG = logging.getLogger("maskvit")
LOW_RATE = 1e-6  # a learning rate that stays below teaches a model nothing in the time people wait


@functools.partial(jax.jit, static_argnums=0)
def fresh_params(objective: Any, key: Any) -> Any:
    """The parameters that `objective` begins with: traced and compiled once, however often a process starts it."""
    return objective.init(key)[0]


def first_state(parts: Parts, optim: Any, shardings: Any, seed: int, num_records: int) -> TrainState:
    """The state of step 0: fresh, or from a checkpoint's parameters, moments and teacher. `num_records`: rows of what is kept of each."""
    init_from = parts.init_from
    params, moments = start_params(parts.objective, seed, init_from, learned_classes(parts))
    # Through host memory: every process holds the same values, and places its own part of them.
    placed = lambda tree, where: jax.tree.map(lambda x, s: jax.device_put(np.asarray(x), s), tree, where)  # noqa: E731

    def begin(params: Params) -> TrainState:
        return state_from_params(params, parts.objective.init_state(params, num_records), optim)

    # What is kept per record may be larger than a device's memory: each makes its own part.
    state = jax.jit(begin, out_shardings=shardings, donate_argnums=0)(placed(params, shardings.params))
    if init_from["path"] and not (init_from["fresh"] or init_from["drop"]) and init_from["weights"] == "params":
        stored = checkpoints.with_stored_teacher(state.objective_state, init_from["path"])
        if stored is not state.objective_state:
            state = state._replace(objective_state=placed(stored, shardings.objective_state))
    if moments is not None:
        state = state._replace(opt_state=placed(with_adam_moments(state.opt_state, moments), shardings.opt_state))
    return state


def start_params(
    objective: Any, seed: int, init_from: Mapping[str, Any], label_names: Sequence[str] = ()
) -> tuple[Any, dict[str, Any] | None]:
    """Fresh parameters, replaced by a checkpoint's where `init_from` names one: (params, moments).

    Imported optimizer moments come along only where every trained tensor was loaded as it is. `label_names`: of the classes that the
    run learns; ValueError where the head is taken over from one that was trained on others.
    """
    params = fresh_params(objective, jax.random.key(seed))
    if not init_from["path"]:
        return params, None
    params, rows = checkpoints.init_from(params, **init_from, differences=objective.differences)
    LOG.info("%s", checkpoints.format_report(rows))
    check_head(objective, rows, init_from["path"], label_names)
    changed = [row for row in rows if row.action in ("fresh", "dropped")]
    moments = checkpoints.load_adam(init_from["path"]) if init_from["weights"] == "params" else None
    if moments is not None and changed:
        LOG.info("the checkpoint's optimizer moments are not used: its parameters do not map one to one to this model's")
        moments = None
    if moments is not None:
        LOG.info("optimizer moments imported, at update %d", int(moments["count"]))
    return params, moments


def origin(path: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's checkpoints record of the weights at `path` that it starts from (`checkpoints.load_origin`); {} for a fresh start.

    A run that resumes keeps what its checkpoint records, `saved`: the one that it started from may be gone.
    """
    if saved:
        return {name: saved[name] for name in ("started_from", "licence") if name in saved}
    found = checkpoints.load_origin(path) if path else {}
    if found.get("licence"):
        LOG.info("licence     %s: of the weights it starts from, and so of what it trains", found["licence"])
    return found


def check_head(objective: Any, rows: Sequence[checkpoints.LoadRow], path: str, label_names: Sequence[str]) -> None:
    """Raise ValueError where a head is taken over whose classes have other names."""
    if not label_names:
        return
    head = objective.model.task_head or "head"
    if not any(row.action == "loaded" and row.path.startswith(f"{head}/") for row in rows):
        return
    if other := checkpoints.other_classes(checkpoints.load_label_names(path), label_names):
        raise ValueError(
            f"config.init_from.path: the head of {path} has the shape of this run's, but its class {other[0]} is {other[1]}, and that of "
            f"the data {other[2]}: config.init_from.fresh = ('{head}/.*',) begins with a new head"
        )


def write_parameter_table(workdir: str, shapes: Any) -> None:
    """Every parameter's name, shape and size as WORKDIR/parameters.txt."""
    from clu import parameter_overview

    table = parameter_overview.get_parameter_overview(shapes, include_stats=False)
    (Path(workdir) / "parameters.txt").write_text(table + "\n")


def start_report(parts: Parts, run: Run, shapes: Any, optimizer: Optimizer, step: int, global_batch: int, memory: float) -> str:
    """What is about to run, in a few lines."""
    objective, mesh, total_steps = parts.objective, parts.mesh, run.total_steps
    model, device, micro_batches = objective.model, mesh.devices.flat[0], run.metadata["micro_batches"]
    flops = parts.objective.flops(parts.views) * global_batch
    total, trainable = count_parameters(shapes, model)
    if optimizer.frozen is not None:
        trainable = sum(x.size for x, frozen in zip(*map(jax.tree.leaves, (shapes, optimizer.frozen)), strict=True) if not frozen)
    tokens = ", ".join(f"{name} {size}" for name, size in zip(model.layout.names, model.layout.sizes, strict=True))
    rates = [float(optimizer.schedule(s)) for s in (step, (step + total_steps) // 2, total_steps)]
    work = flops * (total_steps - step)
    peak = peak_flops(device.device_kind)
    hours = f"; {work / (0.3 * peak * mesh.size) / 3600:.1f} h at 30 % of the devices' peak" if peak else ""
    limit = memory_limit()
    recomputed = f"; recomputed for the backward pass: {model.remat}" if model.remat else ""
    return "\n".join(
        [
            f"devices     {mesh.size} x {device.device_kind} in {jax.process_count()} process(es)",
            f"data        {parts.source.describe()}",
            f"parameters  {total:,} of which {trainable:,} trained; parameters.txt lists them",
            f"tokens      {model.layout.num_tokens} ({tokens}), {objective.num_visible} visible",
            f"attention   {kernel_in_words(model.attention_kernel)}{recomputed}",
            f"loader      {run.batches.workers or 'no'} worker process(es) of {cpu_threads()} cores",
            f"batch       {global_batch} in {micro_batches} micro-batch(es) of {global_batch // micro_batches}",
            f"memory      {memory / 1e9:.2f} GB per device" + (f" of {limit / 1e9:.1f} GB" if limit < float("inf") else ""),
            f"schedule    steps {step} to {total_steps} ({run.steps_per_epoch} per epoch), lr " + " -> ".join(f"{r:.3g}" for r in rates),
            f"arithmetic  {flops / 1e12:.3g} TFLOP per step, {work:.3g} FLOP to go{hours}",
        ]
    )


def warn_of_low_rate(schedule: Schedule, first: int, last: int, base_lr: float, global_batch: int) -> None:
    """Say so where the learning rate of steps `first` ... `last` - 1 stays so low that next to nothing will be learned."""
    highest = max(float(schedule(round(step))) for step in np.linspace(first, max(first, last - 1), 20))
    if highest < LOW_RATE:
        LOG.warning(
            "the learning rate stays below %.1e: config.optimizer.base_lr %g x config.global_batch %d / 256 = %.1e at its peak, and this "
            "run is at steps %d to %d of a schedule of %d. Hardly anything will be learned: raise config.optimizer.base_lr or "
            "config.global_batch, or start earlier in the schedule (config.schedule.start_epochs)",
            highest * 1.01, base_lr, global_batch, base_lr * global_batch / 256, schedule.start + first,
            schedule.start + last, schedule.total,
        )  # fmt: skip
