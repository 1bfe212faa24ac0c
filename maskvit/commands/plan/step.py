"""The real train step of a config, compiled for devices that need not be there; no data are read and no array is made."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskvit.core.types import Batch, DataNeeds, Record
from maskvit.data.augment.settings import parse_augment
from maskvit.nn.attention import attention_kernel, fitting_kernel
from maskvit.nn.backbone import frozen_mask
from maskvit.objectives import build_objective
from maskvit.optim import build_optimizer
from maskvit.optim.schedules import Cosine
from maskvit.optim.transforms import freeze_block
from maskvit.sharding import batch_sharding, check_batch, fitting_mesh, parameter_shardings, record_rows, replicated, sharding_block
from maskvit.training.step import init_state, train_step

STEPS = 10_000  # in place of every duration: no arithmetic depends on how long a run is


class Compiled(NamedTuple):
    """`memory`: the compiler's own account, per device; `flops`: the model's arithmetic per image; `attention`: what computes it."""

    text: str
    memory: Any
    flops: float
    attention: str
    parameters: int
    seconds: float


def abstract_batch(objective: Any, views: Any, size: int) -> Batch:
    """Shapes and types of a batch of `size` samples as the loader delivers it (`maskvit.data.batches.train_batches`)."""
    model, needs = objective.model, objective.needs

    def pixels(spec: Any, leading: tuple[int, ...], image: Sequence[int]) -> Any:
        height, width = spec.size((image[0], image[1]))
        if spec.kind == "categorical":
            return jax.ShapeDtypeStruct((*leading, height, width), jnp.int32)
        return jax.ShapeDtypeStruct((*leading, height, width, spec.channels), jnp.uint8 if spec.channels == 3 else jnp.float32)

    def of_all(leading: tuple[int, ...], image: Sequence[int]) -> dict[str, Any]:
        return {spec.name: pixels(spec, leading, image) for spec in model.modalities}

    kinds = dict(index=((size,), jnp.int32), box=((size, 4), jnp.float32), flip=((size,), jnp.bool_))
    record = Record(**{name: jax.ShapeDtypeStruct(*kinds[name]) for name in needs.record})
    whole = of_all((-(-size // needs.whole_every),), model.image_size) if needs.whole_every else {}
    seen = {} if views is None else {
        "global": of_all((size, 2), model.image_size), "local": of_all((size, views.local_crops), views.local_size)
    }  # fmt: skip
    return Batch(
        values={} if needs.views else of_all((size,), model.image_size),
        label=jax.ShapeDtypeStruct((size,), jnp.int32) if needs.num_classes else None,
        maps=_maps(model, needs, size), record=record, views=seen, whole={name: whole[name] for name in model.inputs} if whole else {},
    )  # fmt: skip


def _maps(model: Any, needs: DataNeeds, size: int) -> Any:
    """Stored guidance or block masks."""
    if needs.blocks:
        return jax.ShapeDtypeStruct((size, 2, *model.layout.grids[0]), jnp.float32)
    return jax.ShapeDtypeStruct((size, len(model.inputs), *model.layout.grids[0]), jnp.float32) if needs.maps else None


def compile_step(
    config: Mapping[str, Any], devices: Sequence[Any], options: Mapping[str, Any], *, capability: float | None, memory: float,
    records: int, micro_batches: int,
) -> Compiled:  # fmt: skip
    """Compile the step of a whole config. `capability`: of the GPUs, None for others; `memory`: of a device; `records`: of the data.

    Raises ValueError as a run would for a config that cannot work.
    """
    objective_block = dict(config["objective"])
    if objective_block.get("attention", "auto") == "auto":  # "auto" would look at the devices of this machine
        platform = "gpu" if capability is not None else devices[0].platform
        objective_block["attention"] = fitting_kernel(platform, capability, objective_block.get("compute_dtype", "float32"))
    attention = attention_kernel(objective_block["attention"], objective_block.get("compute_dtype", "float32"))
    objective = build_objective({"modalities": config["modalities"], "image_size": config["image_size"], "objective": objective_block})
    objective.check()
    objective = objective.resolve(lambda duration: STEPS)
    views = parse_augment(dict(config["data"].get("augment") or {})).views if objective.needs.views else None
    shapes, beside = jax.eval_shape(objective.init, jax.random.key(0))
    mesh = fitting_mesh((shapes, beside), memory, devices, **sharding_block(**config["sharding"] or {}))
    check_batch(config["global_batch"], mesh, micro_batches)
    block = {key: value for key, value in config["optimizer"].items() if key != "base_lr"}
    if block.get("freeze"):
        block["freeze"] = dict(freeze_block(**block["freeze"]), until=STEPS)
    optimizer = build_optimizer(shapes, frozen_mask(shapes, objective.model), Cosine(peak=1e-4, total=STEPS, warmup=10), **block)
    state = jax.eval_shape(lambda: init_state(objective, optimizer, 0, record_rows(records, mesh)))
    places = parameter_shardings(state, mesh)
    step = jax.jit(
        functools.partial(train_step, objective=objective, optimizer=optimizer, seed=0, micro_batches=micro_batches, mesh=mesh),
        in_shardings=(places, batch_sharding(mesh)), out_shardings=(places, replicated(mesh)), donate_argnums=0,
    )  # fmt: skip
    began = time.perf_counter()
    compiled = step.lower(state, abstract_batch(objective, views, config["global_batch"])).compile(compiler_options=dict(options))
    seconds = time.perf_counter() - began
    parameters = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
    return Compiled(compiled.as_text() or "", compiled.memory_analysis(), objective.flops(views), attention, parameters, seconds)
