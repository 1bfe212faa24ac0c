"""Whole train steps of iBOT on synthetic views that lie on the device: the loader's block masks, and AttMask's from the teacher."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from maskvit.commands.bench.step import step_record
from maskvit.commands.bench.timing import compiled_gb, device_peak_gb, in_turns

ATTMASK = dict(ratio=0.3, ratio_var=0.2, probability=0.5, per="step")
# iBOT first: ratios are against it.
METHODS: dict[str, dict[str, Any]] = {
    "ibot": dict(guidance=dict(name="block_mask", ratio=(0.0, 0.3), ratio_var=(0.0, 0.2))),
    "attmask_high": dict(scores=dict(name="attention_high"), masking=ATTMASK),
    "attmask_hint": dict(scores=dict(name="attention_hint"), masking=ATTMASK),
}
GLOBAL_VIEWS = 2


def distillation_config(size: Any, image: int, dtype: str, method: str, projection: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The config of one step: the published ViT recipe with a head of 8,192 prototypes."""
    from maskvit.core.modalities import RGB

    block = dict(name="ibot", encoder=size, projection=dict(projection or {}), compute_dtype=dtype, **METHODS[method])
    return dict(image_size=(image, image), modalities=dict(rgb=RGB), objective=block)


def synthetic_views(model: Any, batch: int, local_crops: int, local_size: int) -> dict[str, Any]:
    """Random host arrays as a loader would deliver them, block masks among them."""
    import numpy as np

    from maskvit.data.block import block_mask

    rng, grid = np.random.default_rng(0), model.layout.grids[0]
    views = lambda count, side: rng.integers(0, 256, (batch, count, side, side, 3), dtype=np.uint8)  # noqa: E731
    masks = [block_mask(rng, grid[0], grid[1], 0.3 * grid[0] * grid[1] * (i % 2)) for i in range(GLOBAL_VIEWS * batch)]
    blocks = np.stack(masks).reshape(batch, GLOBAL_VIEWS, *grid).astype(np.float32)
    return {"global/rgb": views(GLOBAL_VIEWS, model.image_size[0]), "local/rgb": views(local_crops, local_size), "guidance": blocks}


def bench_distillation(
    size: Any,
    *,
    batch: int,
    image: int,
    dtype: str,
    steps: int,
    warmup: int,
    local_crops: int = 10,
    projection: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Time the steps of `METHODS` in turns: one record each, as `maskvit.commands.bench.step` gives them.

    `batch`: images over all devices, each with two large views and `local_crops` of three sevenths of their side. One state, donated
    from step to step, goes through all methods.
    """
    import jax

    from maskvit.data.views import MultiCrop
    from maskvit.nn.backbone import frozen_mask
    from maskvit.objectives import build_objective
    from maskvit.optim.schedules import Cosine
    from maskvit.optim.transforms import adamw
    from maskvit.sharding import check_batch, make_mesh, parameter_shardings, place_batch
    from maskvit.training.step import init_state, train_step

    mesh = make_mesh()
    check_batch(batch, mesh)
    objectives = {
        name: build_objective(distillation_config(size, image, dtype, name, projection)).resolve(lambda duration: 1000) for name in METHODS
    }
    objective = objectives["ibot"]
    shapes = jax.eval_shape(lambda key: objective.init(key)[0], jax.random.key(0))
    optimizer = adamw(shapes, frozen_mask(shapes, objective.model), Cosine(peak=1e-4, total=1000, warmup=10), clip_tensor_norm=3.0)
    make_state = functools.partial(init_state, objective, optimizer, 0)
    shardings = parameter_shardings(jax.eval_shape(make_state), mesh)
    holder = {"state": jax.jit(make_state, out_shardings=shardings)()}
    patch = objective.model.modalities[0].patch
    local_size = max(1, round(image * 3 / 7 / patch)) * patch
    data = place_batch(synthetic_views(objective.model, batch, local_crops, local_size), mesh)
    compiled = {}
    for name, method in objectives.items():
        step = functools.partial(train_step, objective=method, optimizer=optimizer, seed=0)
        compiled[name] = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(holder["state"], data).compile()

    def run(name: str) -> None:
        holder["state"], metrics = compiled[name](holder["state"], data)
        jax.block_until_ready((holder["state"], metrics))
        holder["loss"] = metrics["loss"][0]

    seconds = in_turns({name: functools.partial(run, name) for name in METHODS}, steps, warmup)
    if not float(holder["loss"]) < float("inf"):
        raise FloatingPointError("the benchmark's loss is not finite: its timings would not be those of a real step")
    device = jax.devices()[0]
    common = dict(size=size if isinstance(size, str) else "custom", batch=batch, image=image, dtype=dtype, steps=steps)
    flops = objective.flops(MultiCrop(local_crops=local_crops, local_size=(local_size, local_size)))
    return [
        {
            **common,
            **step_record(name, seconds, batch, flops, device, jax.device_count()),
            "planned_gb": compiled_gb(compiled[name]),
            "device_peak_gb": device_peak_gb(device),
        }
        for name in METHODS
    ]
