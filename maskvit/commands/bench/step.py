"""Whole train steps on synthetic batches that lie on the device: MultiMAE with random and guided masks and torch's, or MAE and CrossMAE."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maskvit.commands.bench.timing import (
    compiled_gb,
    device_peak_gb,
    forget_peak,
    in_turns,
    ratio,
    resident_gb,
    resident_peak_gb,
    summary,
    utilization,
)

SIZES = ("Ti", "S", "B", "L", "H")
DTYPES = ("float32", "bfloat16")
# The random-mask step first: ratios are against it.
STEPS = ("random", "guided")
OUTPUTS = ("rgb", "depth", "semseg", "norm_rgb")
# Objectives side by side, as {name: fields of config.objective}: CrossMAE rebuilds a third of what it hides.
OBJECTIVES = {"mae": {}, "crossmae": dict(kept_mask_ratio=0.25)}


def step_config(
    size: Any,
    image: int,
    dtype: str,
    guided: bool,
    *,
    num_visible: int = 98,
    decoder: Mapping[str, int] | None = None,
    outputs: Sequence[str] = OUTPUTS,
) -> dict[str, Any]:
    """The config of one step: MultiMAE of the published recipe with rgb, depth, semseg and four outputs."""
    from maskvit.core.modalities import DEPTH, RGB, SEMSEG

    return dict(
        image_size=(image, image),
        modalities=dict(rgb=RGB, depth=DEPTH, semseg=SEMSEG),
        objective=dict(
            name="multimae",
            inputs=("rgb", "depth", "semseg"),
            outputs=tuple(outputs),
            encoder=size,
            decoder=dict(decoder or dict(width=256, depth=2, heads=8)),
            num_visible=num_visible,
            scores=dict(name="attention_high" if guided else "random"),
            guidance=dict(name="self_attention") if guided else {},
            compute_dtype=dtype,
        ),
    )


def synthetic_batch(model: Any, batch: int) -> dict[str, Any]:
    """Random host arrays as a loader would deliver them: uint8 for three channels, float32 counts for one, class ids."""
    import numpy as np

    rng, arrays = np.random.default_rng(0), {}
    for spec in model.modalities:
        height, width = spec.size(model.image_size)
        if spec.kind == "categorical":
            arrays[spec.name] = rng.integers(0, spec.num_classes, (batch, height, width), dtype=np.int32)
        elif spec.channels == 3:
            arrays[spec.name] = rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
        else:
            arrays[spec.name] = rng.uniform(0, 60_000, (batch, height, width, spec.channels)).astype(np.float32)
    return arrays


def bench_step(
    size: Any,
    *,
    batch: int,
    image: int,
    dtype: str,
    steps: int,
    warmup: int,
    with_torch: bool,
    reference: Path | None = None,
    **sizes: Any,
) -> list[dict[str, Any]]:
    """Time the steps of `STEPS`, and torch's, in turns: one record per measurement, see `step_record`.

    `reference`: a checkout of the published PyTorch MultiMAE, whose own step is timed too (`maskvit.commands.bench.reference_model`).
    `batch` is the global batch over all devices; `size` a name of `SIZES` or a block of encoder sizes; `sizes` as `step_config`.
    One state, donated from step to step, goes through all of them: they are the same model and optimizer, so memory holds one copy.
    """
    import jax

    from maskvit.objectives import build_objective
    from maskvit.sharding import check_batch, make_mesh, place_batch

    mesh = make_mesh()
    check_batch(batch, mesh)
    objectives = {name: build_objective(step_config(size, image, dtype, name == "guided", **sizes)) for name in STEPS}
    objective = objectives["random"]
    optimizer, shardings, state = fresh_state(objective, mesh)
    data = place_batch(synthetic_batch(objective.model, batch), mesh)

    holder, compiled, compile_s = {"state": state}, {}, {}
    del state
    for name in STEPS:
        compiled[name], compile_s[name] = compile_step(objectives[name], optimizer, shardings, holder["state"], data, mesh)

    def run(name: str) -> None:
        holder["state"], metrics = compiled[name](holder["state"], data)
        jax.block_until_ready((holder["state"], metrics))
        holder["loss"] = metrics["loss"][0]

    calls: dict[str, Callable[[], None]] = {name: functools.partial(run, name) for name in STEPS}
    before, measured = resident_gb(), {}
    for name in STEPS:  # the lightest first: what a step gave back, the process keeps for the next
        forget_peak()
        calls[name]()
        most = resident_gb(peak=True)
        if before is not None and most is not None:  # the state and the batch are in both
            measured[name] = most - before + sum(x.nbytes for x in jax.tree.leaves((holder["state"], data))) / 1e9
    in_turns(calls, 0, warmup)
    memory = resident_peak_gb()  # before torch comes in
    others: dict[str, Callable[[], None]] = {}
    if with_torch:
        from maskvit.commands.bench.torch_model import torch_step

        others["torch"] = torch_step(objective, batch, dtype)
    if reference is not None:
        from maskvit.commands.bench.reference_model import reference_step

        others["reference"] = reference_step(reference, objective, batch, dtype)
    in_turns(others, 0, warmup)
    calls |= others
    seconds = in_turns(calls, steps, settle=1)
    loss = float(holder["loss"])
    if loss != loss:
        raise FloatingPointError("the benchmark's loss is NaN: its timings would not be those of a real step")

    device = jax.devices()[0]
    common = dict(size=size if isinstance(size, str) else "custom", batch=batch, image=image, dtype=dtype, steps=steps)
    records = []
    for name in STEPS:
        flops = objectives[name].flops()
        record = step_record(name, seconds, batch, flops, device, jax.device_count())
        record |= dict(compile_s=compile_s[name], planned_gb=compiled_gb(compiled[name]))
        record |= dict(measured_gb=measured.get(name), resident_peak_gb=memory)
        record |= floor_record(compiled[name], device.device_kind, record["median_s"])
        records.append({**common, **record, "device_peak_gb": device_peak_gb(device)})
    records += [{**common, **step_record(name, seconds, batch, objective.flops(), device, 1)} for name in others]
    return records


def fresh_state(objective: Any, mesh: Any) -> tuple[Any, Any, Any]:
    """(optimizer, shardings, state on the devices) of a run of this objective."""
    import jax

    from maskvit.nn.backbone import frozen_mask
    from maskvit.optim.schedules import Cosine
    from maskvit.optim.transforms import adamw
    from maskvit.sharding import parameter_shardings
    from maskvit.training.step import state_from_params

    shapes = jax.eval_shape(lambda key: objective.init(key)[0], jax.random.key(0))
    optimizer = adamw(shapes, frozen_mask(shapes), Cosine(peak=1e-4, total=1000, warmup=10))

    def make_state(key: Any) -> Any:
        params, objective_state = objective.init(key)
        return state_from_params(params, objective_state, optimizer)

    shardings = parameter_shardings(jax.eval_shape(make_state, jax.random.key(0)), mesh)
    return optimizer, shardings, jax.jit(make_state, out_shardings=shardings)(jax.random.key(0))


def compile_step(objective: Any, optimizer: Any, shardings: Any, state: Any, data: Any, mesh: Any) -> tuple[Any, float]:
    """The compiled train step, which donates its state, and how many seconds compiling took."""
    import jax

    from maskvit.training.step import train_step

    step = functools.partial(train_step, objective=objective, optimizer=optimizer, seed=0, mesh=mesh)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(state, data).compile()
    return compiled, time.perf_counter() - start


def bench_objectives(
    size: Any, *, batch: int, image: int, dtype: str, steps: int, warmup: int, decoder: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """Time the train steps of `OBJECTIVES` in turns: one record each, as of `bench_step`, with the arithmetic of the decoder.

    `size`, `batch`: as there; `decoder`: sizes for all, by default each objective's own. Every objective has its own
    parameters and optimizer state on the devices. A peak of memory belongs to the process, and is read after the first rounds
    of each objective in this order of planned memory, least first: the first and every higher one are that objective's own, on
    top of the states of those before it.
    """
    import jax

    from maskvit.core.flops import decoder_flops
    from maskvit.core.modalities import RGB
    from maskvit.objectives import build_objective
    from maskvit.sharding import check_batch, make_mesh, place_batch

    mesh = make_mesh()
    check_batch(batch, mesh)
    rgb = dict(RGB, patch=14 if size == "H" else RGB["patch"])
    records: dict[str, dict[str, Any]] = {}
    runs, states, programs = {}, {}, {}
    common = dict(size=size if isinstance(size, str) else "custom", batch=batch, image=image, dtype=dtype, steps=steps)
    device = jax.devices()[0]
    for name, fields in OBJECTIVES.items():
        block = dict(name=name, encoder=size, decoder=dict(decoder or {}), compute_dtype=dtype, **fields)
        objective = build_objective(dict(image_size=(image, image), modalities=dict(rgb=rgb), objective=block))
        optimizer, shardings, states[name] = fresh_state(objective, mesh)
        data = place_batch(synthetic_batch(objective.model, batch), mesh)
        compiled, compile_s = compile_step(objective, optimizer, shardings, states[name], data, mesh)
        queries = objective.num_queries("norm_rgb", objective.model.layout)
        flops = decoder_flops(objective.model, "norm_rgb", objective.num_visible, queries)
        records[name] = dict(compile_s=compile_s, planned_gb=compiled_gb(compiled), flops=objective.flops(), decoder_flops=flops)
        programs[name] = compiled

        def run(name: str = name, compiled: Any = compiled, data: Any = data) -> None:
            states[name], metrics = compiled(states[name], data)
            jax.block_until_ready((states[name], metrics))
            if not metrics["loss"][0] == metrics["loss"][0]:
                raise FloatingPointError(f"the loss of {name} is NaN: its timings would not be those of a real step")

        runs[name] = run
    for name in sorted(runs, key=lambda name: records[name]["planned_gb"] or 0.0):
        in_turns({name: runs[name]}, 0, warmup)
        records[name] |= dict(device_peak_gb=device_peak_gb(device), resident_peak_gb=resident_peak_gb())
    seconds = in_turns(runs, steps)
    return [
        {
            **common,
            **step_record(name, seconds, batch, record.pop("flops"), device, jax.device_count()),
            "decoder_gmac_per_image": record.pop("decoder_flops") / 2e9,
            **record,
            **floor_record(programs[name], device.device_kind, statistics.median(seconds[name])),
        }
        for name, record in records.items()
    ]


def floor_record(compiled: Any, device_kind: str, median_s: float) -> dict[str, float]:
    """What `python -m maskvit plan` says of this very program: its floor, and how often the measured time holds it; {} on other devices."""
    from maskvit.commands.plan.devices import device_of
    from maskvit.commands.plan.program import floor_seconds

    device = device_of(device_kind)
    if device is None:
        return {}
    floor = floor_seconds(compiled.as_text(), device)
    return dict(floor_s=floor, ratio_to_floor=median_s / floor)


def step_record(name: str, seconds: Mapping[str, Sequence[float]], batch: int, flops: float, device: Any, devices: int) -> dict[str, Any]:
    """One measurement: seconds, images/s, GFLOP per image (counted from the sizes), TFLOP/s, MFU, ratios to the others."""
    times = summary(seconds[name], batch)
    per_second = flops * times["images_per_s"]
    record = dict(measurement=name, **times, gflop_per_image=flops / 1e9, tflops_per_s=per_second / 1e12)
    record["mfu"] = utilization(per_second, device.device_kind, devices)
    record |= {f"ratio_to_{other}": ratio(seconds[name], seconds[other]) for other in seconds if other != name}
    return record


def table_row(record: Mapping[str, Any]) -> str:
    """One measurement for the eye."""
    memory = record.get("device_peak_gb") or record.get("planned_gb")
    parts = [
        f"{record['measurement']:<12} {record['size']:<6} batch {record['batch']:<5} {record['dtype']:<9}",
        f"{record['median_s']:8.4f} s/step ({record['min_s']:.4f}-{record['max_s']:.4f})",
        f"{record['images_per_s']:8.1f} images/s",
        f"{record['gflop_per_image']:6.1f} GFLOP/image {record['tflops_per_s']:7.3f} TFLOP/s",
        f"MFU {record['mfu']:.1%}" if record["mfu"] is not None else "",
        f"{memory:.2f} GB" if memory else "",
        *(f"{value:.3f} x {key.removeprefix('ratio_to_')}" for key, value in record.items() if key.startswith("ratio_to_")),
    ]
    return "  ".join(part for part in parts if part)
