"""How fast it is: `python -m maskvit.bench [step|loader]`.

`step` times whole train steps of MultiMAE on synthetic batches that lie on the device: random masks, attention-guided
masks, and (where torch is installed) a torch model of the same sizes, in turns inside one run, so that a ratio holds
even where other work slows the machine. It needs JAX, flax and optax, no data library and no plotting. `loader` times
the input pipeline alone.

A line of JSON per measurement goes to standard output; the table for the eye goes to standard error.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SIZES = ("Ti", "S", "B", "L")
DTYPES = ("float32", "bfloat16")
# The random-mask step first: ratios are against it.
STEPS = ("random", "guided")


def step_config(
    size: Any, image: int, dtype: str, guided: bool, *, num_visible: int = 98, decoder: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The config of one step: MultiMAE of the published recipe with rgb, depth, semseg and four outputs."""
    from maskvit.modalities import DEPTH, RGB, SEMSEG

    return dict(
        image_size=(image, image),
        modalities=dict(rgb=RGB, depth=DEPTH, semseg=SEMSEG),
        objective=dict(
            name="multimae",
            inputs=("rgb", "depth", "semseg"),
            outputs=("rgb", "depth", "semseg", "norm_rgb"),
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


def in_turns(calls: Mapping[str, Callable[[], None]], rounds: int, warmup: int = 0) -> dict[str, list[float]]:
    """Seconds of every call, `rounds` times a, b, ..., a, b, ... after `warmup` untimed rounds. A call ends when its work has."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warmup + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: Sequence[float], batch: int) -> dict[str, float]:
    """Median, minimum and maximum seconds per step, and images/s at the median."""
    median = statistics.median(seconds)
    return dict(median_s=median, min_s=min(seconds), max_s=max(seconds), images_per_s=batch / median)


def ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of the ratio inside a round: what slows a whole round cancels out."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def resident_peak_gb() -> float:
    """The largest main memory this process has held so far, in 1e9 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def device_peak_gb(device: Any) -> float | None:
    """The largest memory the device has held so far, in 1e9 bytes; None where it does not count (the CPU)."""
    stats = device.memory_stats() or {}
    return stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None


def compiled_gb(compiled: Any) -> float | None:
    """What the compiler plans for one program: arguments, results and temporaries, donated buffers counted once."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    return (plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes) / 1e9


def bench_step(
    size: Any,
    *,
    batch: int,
    image: int,
    dtype: str,
    steps: int,
    warmup: int,
    with_torch: bool,
    num_visible: int = 98,
    decoder: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Time the steps of `STEPS`, and torch's, in turns: one record per measurement, see `step_record`.

    `batch` is the global batch over all devices; `size` a name of `SIZES` or a block of encoder sizes. One state, donated
    from step to step, goes through all of them: they are the same model and optimiser, so memory holds one copy.
    """
    import jax

    from maskvit.flops import step_flops
    from maskvit.models import frozen_mask
    from maskvit.objectives import build_objective
    from maskvit.optim import Cosine, adamw
    from maskvit.sharding import check_batch, make_mesh, parameter_shardings, place_batch
    from maskvit.step import state_from_params, train_step

    mesh = make_mesh()
    check_batch(batch, mesh)
    objectives = {
        name: build_objective(step_config(size, image, dtype, name == "guided", num_visible=num_visible, decoder=decoder)) for name in STEPS
    }
    objective = objectives["random"]
    shapes = jax.eval_shape(lambda key: objective.init(key)[0], jax.random.key(0))
    optimizer = adamw(shapes, frozen_mask(shapes), Cosine(peak=1e-4, total=1000, warmup=10))

    def make_state(key: Any) -> Any:
        params, objective_state = objective.init(key)
        return state_from_params(params, objective_state, optimizer)

    shardings = parameter_shardings(jax.eval_shape(make_state, jax.random.key(0)), mesh)
    state = jax.jit(make_state, out_shardings=shardings)(jax.random.key(0))
    data = place_batch(synthetic_batch(objective.model, batch), mesh)

    holder, compiled, compile_s = {"state": state}, {}, {}
    del state
    for name in STEPS:
        step = functools.partial(train_step, objective=objectives[name], optimizer=optimizer, seed=0)
        start = time.perf_counter()
        compiled[name] = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(holder["state"], data).compile()
        compile_s[name] = time.perf_counter() - start

    def run(name: str) -> None:
        holder["state"], metrics = compiled[name](holder["state"], data)
        jax.block_until_ready((holder["state"], metrics))
        holder["loss"] = metrics["loss"][0]

    calls: dict[str, Callable[[], None]] = {name: functools.partial(run, name) for name in STEPS}
    in_turns(calls, 0, warmup)
    memory = resident_peak_gb()  # before torch comes in
    if with_torch:
        calls["torch"] = torch_step(objective, batch, dtype)
        in_turns({"torch": calls["torch"]}, 0, warmup)
    seconds = in_turns(calls, steps)
    loss = float(holder["loss"])
    if loss != loss:
        raise FloatingPointError("the benchmark's loss is NaN: its timings would not be those of a real step")

    device = jax.devices()[0]
    common = dict(size=size if isinstance(size, str) else "custom", batch=batch, image=image, dtype=dtype, steps=steps)
    records = []
    for name in STEPS:
        flops = step_flops(objectives[name])
        record = step_record(name, seconds, batch, flops, device, jax.device_count())
        record |= dict(compile_s=compile_s[name], planned_gb=compiled_gb(compiled[name]), resident_peak_gb=memory)
        records.append({**common, **record, "device_peak_gb": device_peak_gb(device)})
    if with_torch:
        flops = step_flops(objective)
        records.append({**common, **step_record("torch", seconds, batch, flops, device, 1)})
    return records


def step_record(name: str, seconds: Mapping[str, Sequence[float]], batch: int, flops: float, device: Any, devices: int) -> dict[str, Any]:
    """One measurement: seconds, images/s, GFLOP per image (counted from the sizes), TFLOP/s, MFU, ratios to the others."""
    record = dict(measurement=name, **summary(seconds[name], batch), gflop_per_image=flops / 1e9)
    record["tflops_per_s"] = flops * record["images_per_s"] / 1e12
    record["mfu"] = utilisation(flops * record["images_per_s"], device.device_kind, devices)
    record |= {f"ratio_to_{other}": ratio(seconds[name], seconds[other]) for other in seconds if other != name}
    return record


def utilisation(flops_per_s: float, device_kind: str, devices: int) -> float | None:
    """Share of the devices' dense bfloat16 peak; None where the peak is not known, or `clu`, which metrics need, is absent."""
    if importlib.util.find_spec("clu") is None:
        return None
    from maskvit.metrics import flops_utilisation

    return flops_utilisation(flops_per_s, 1.0, device_kind=device_kind, device_count=devices)


def torch_step(objective: Any, batch: int, dtype: str) -> Callable[[], None]:
    """One training step of a plain torch model of the same sizes: forward, backward, AdamW; on CUDA where JAX runs on a GPU.

    The yardstick of this benchmark, not a port: embedded patches of all modalities of which the first `num_visible` count
    as visible, the encoder with `scaled_dot_product_attention`, a decoder per output, squared errors (cross-entropy for
    classes) over all tokens. What it leaves out (drawing masks, gathering, normalising targets) is to its advantage.
    """
    import jax
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        """Pre-norm transformer block."""

        def __init__(self, width: int, heads: int, ratio: float):
            super().__init__()
            self.heads = heads
            self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.fc1, self.fc2 = nn.Linear(width, round(ratio * width)), nn.Linear(round(ratio * width), width)

        def forward(self, x: Any) -> Any:
            b, n, d = x.shape
            q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
            return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    class Decoder(nn.Module):
        """Cross-attention of one query per token of the output, its MLP, blocks and head."""

        def __init__(self, queries: int, values: int, context: int, width: int, depth: int, heads: int, mlp_ratio: float):
            super().__init__()
            self.heads, hidden = heads, round(mlp_ratio * width)
            self.queries = nn.Parameter(0.02 * torch.randn(queries, width))
            self.project, self.q, self.kv = nn.Linear(context, width), nn.Linear(width, width), nn.Linear(width, 2 * width)
            self.proj, self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, hidden), nn.Linear(hidden, width)
            self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(3))
            self.blocks = nn.Sequential(*(Block(width, heads, mlp_ratio) for _ in range(depth)))
            self.head = nn.Linear(width, values)

        def forward(self, encoded: Any) -> Any:
            b = encoded.shape[0]
            split = lambda x: x.reshape(b, x.shape[1], self.heads, -1).transpose(1, 2)  # noqa: E731
            k, v = self.kv(self.norms[0](self.project(encoded))).chunk(2, dim=-1)
            q = self.q(self.norms[1](self.queries.expand(b, -1, -1)))
            x = self.proj(F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).reshape(b, *self.queries.shape))
            x = x + self.fc2(F.gelu(self.fc1(self.norms[2](x))))
            return self.head(self.blocks(x))

    model, encoder, decoder = objective.model, dict(objective.model.encoder), dict(objective.model.decoder)
    ratios = {"mlp_ratio": decoder.get("mlp_ratio", 4.0)}
    specs = [model.modality(name) for name in model.inputs]
    sizes = [spec.patch_pixels**2 * (spec.embed_dim if spec.kind == "categorical" else spec.channels) for spec in specs]
    cuda = jax.devices()[0].platform == "gpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = True  # JAX's default on these devices too
    else:
        torch.set_num_threads(cpu_threads())

    class Model(nn.Module):
        """Patch projections, encoder and decoders; returns the loss."""

        def __init__(self) -> None:
            super().__init__()
            self.embeds = nn.ModuleList(nn.Linear(size, model.width) for size in sizes)
            self.global_tokens = nn.Parameter(torch.zeros(1, model.num_global_tokens, model.width))
            self.encoder = nn.Sequential(
                *(Block(model.width, encoder["heads"], encoder.get("mlp_ratio", 4.0)) for _ in range(encoder["depth"]))
            )
            shapes = {output: model.modality(output).grid(model.image_size) for output in model.outputs}
            self.decoders = nn.ModuleDict(
                {
                    output: Decoder(rows * columns, model.modality(output).values_per_token, model.width, **{**ratios, **decoder})
                    for output, (rows, columns) in shapes.items()
                }
            )

        def forward(self, patches: list[Any], targets: dict[str, Any]) -> Any:
            tokens = torch.cat([embed(x) for embed, x in zip(self.embeds, patches, strict=True)], dim=1)[:, : objective.num_visible]
            encoded = self.encoder(torch.cat([tokens, self.global_tokens.expand(len(tokens), -1, -1)], dim=1))
            total = 0.0
            for output, head in self.decoders.items():
                prediction, spec = head(encoded).float(), model.modality(output)
                if spec.kind == "categorical":
                    total = total + F.cross_entropy(prediction.reshape(-1, spec.num_classes), targets[output].reshape(-1))
                else:
                    total = total + F.mse_loss(prediction, targets[output])
            return total

    net = Model().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    patches = [torch.randn(batch, n, size, device=device) for n, size in zip(model.layout.sizes, sizes, strict=True)]
    targets = {}
    for output in model.outputs:
        spec = model.modality(output)
        n = spec.grid(model.image_size)[0] * spec.grid(model.image_size)[1]
        if spec.kind == "categorical":
            targets[output] = torch.randint(spec.num_classes, (batch, n, spec.patch_pixels**2), device=device)
        else:
            targets[output] = torch.randn(batch, n, spec.values_per_token, device=device)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = net(patches, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()

    return run


def cpu_threads() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_cpu_threads(count: int) -> None:
    """Keep this process to `count` cores. Must run before JAX starts, which then makes that many threads."""
    if not hasattr(os, "sched_setaffinity"):
        raise SystemExit("--cpu-threads needs Linux; leave it out to use all cores")
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(allowed):
        raise SystemExit(f"--cpu-threads {count} is not between 1 and the {len(allowed)} cores of this process")
    os.sched_setaffinity(0, set(allowed[:count]))


def bench_loader(name: str, data_dir: str, split: str, image: int, batch: int, batches: int, workers: int) -> dict[str, Any]:
    """Records per second of the training pipeline: read, decode, crop, flip, batch. The first batch is not timed."""
    import tensorflow_datasets as tfds

    from maskvit.data import open_source
    from maskvit.data.pipeline import train_batches
    from maskvit.data.sources import STATED
    from maskvit.modalities import DEPTH, RGB, SEMSEG, parse_modalities

    # What the data set states of itself (class count, code for missing depth) goes before the published declarations.
    stated = (tfds.builder(name, data_dir=data_dir).info.metadata or {}).get("modalities", {})
    declared = dict(rgb=RGB, depth=DEPTH, semseg=SEMSEG)
    modalities = parse_modalities(
        {key: {**fields, **{k: v for k, v in stated.get(key, {}).items() if k in STATED}} for key, fields in declared.items()}
    )
    source = open_source("tfds", modalities, name=name, data_dir=data_dir, split=split)
    augment = dict(crop="random_resized", scale=(0.2, 1.0), ratio=(0.75, 4 / 3), flip=0.5, resize="pil")
    stream = train_batches(source, modalities, (image, image), seed=0, global_batch=batch, augment=augment, workers=workers)
    try:
        next(stream)
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
        seconds = time.perf_counter() - start
    finally:
        stream.close()
    return dict(
        measurement="loader", source=source.describe(), image=image, batch=batch, batches=batches, workers=workers,
        seconds=seconds, records_per_s=batch * batches / seconds,
    )  # fmt: skip


def machine() -> dict[str, Any]:
    """Where the figures were taken: they mean little without it."""
    import jax

    device = jax.devices()[0]
    return dict(
        measurement="machine", platform=device.platform, device=device.device_kind, devices=jax.device_count(), cpu_threads=cpu_threads(),
        jax=jax.__version__, python=platform.python_version(), matmul_precision=jax.config.jax_default_matmul_precision or "default",
    )  # fmt: skip


def table_row(record: Mapping[str, Any]) -> str:
    """One measurement for the eye."""
    memory = record.get("device_peak_gb") or record.get("planned_gb")
    parts = [
        f"{record['measurement']:<7} {record['size']:<6} batch {record['batch']:<5} {record['dtype']:<9}",
        f"{record['median_s']:8.4f} s/step ({record['min_s']:.4f}-{record['max_s']:.4f})",
        f"{record['images_per_s']:8.1f} images/s",
        f"{record['gflop_per_image']:6.1f} GFLOP/image {record['tflops_per_s']:7.3f} TFLOP/s",
        f"MFU {record['mfu']:.1%}" if record["mfu"] is not None else "",
        f"{memory:.2f} GB" if memory else "",
        *(f"{key.removeprefix('ratio_to_')} x {value:.2f}" for key, value in record.items() if key.startswith("ratio_to_")),
    ]
    return "  ".join(part for part in parts if part)


def comma_list(kind: Callable[[str], Any], known: Sequence[Any] | None = None) -> Callable[[str], list[Any]]:
    """An argparse type: "a,b" to a list, each item converted and among `known`."""

    def parse(text: str) -> list[Any]:
        items = [kind(item) for item in text.split(",")]
        for item in items:
            if known is not None and item not in known:
                raise argparse.ArgumentTypeError(f"{item!r} is not one of {', '.join(map(str, known))}")
        return items

    return parse


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m maskvit.bench", description="Times train steps or the input pipeline.")
    parser.add_argument("what", nargs="?", choices=("step", "loader"), default="step")
    parser.add_argument("--batch", type=comma_list(int), default=[8], help="images per step over all devices; 64,256 times both")
    parser.add_argument("--image", type=int, default=224, help="side of the square image")
    parser.add_argument("--steps", type=int, default=5, help="timed rounds (loader: batches)")
    parser.add_argument("--cpu-threads", type=int, default=0, help="keep to this many cores (0: all)")
    step = parser.add_argument_group("step")
    step.add_argument("--size", choices=SIZES, default="B")
    step.add_argument("--dtype", type=comma_list(str, DTYPES), default=["float32"], help="compute types; float32,bfloat16 times both")
    step.add_argument("--warmup", type=int, default=2, help="untimed rounds")
    step.add_argument("--no-torch", action="store_true", help="leave torch out even where it is installed")
    loader = parser.add_argument_group("loader")
    loader.add_argument("--data-dir", help="the folder of the prepared data set")
    loader.add_argument("--name", default="scenes", help="its TFDS name")
    loader.add_argument("--split", default="train")
    loader.add_argument("--workers", type=int, default=0, help="worker processes")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    if options.cpu_threads:
        limit_cpu_threads(options.cpu_threads)
    # Torch shares the GPU: memory is taken as needed, not three quarters of it at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    def show(record: Mapping[str, Any]) -> None:
        print(json.dumps({key: round(value, 6) if isinstance(value, float) else value for key, value in record.items()}), flush=True)

    if options.what == "loader":
        if not options.data_dir:
            parser.error("loader needs --data-dir, where the data set was prepared")
        for batch in options.batch:
            show(bench_loader(options.name, options.data_dir, options.split, options.image, batch, options.steps, options.workers))
        return
    show(machine())
    with_torch = not options.no_torch and importlib.util.find_spec("torch") is not None
    for dtype in options.dtype:
        for batch in options.batch:
            times = dict(steps=options.steps, warmup=options.warmup)
            records = bench_step(options.size, batch=batch, image=options.image, dtype=dtype, with_torch=with_torch, **times)
            for record in records:
                show(record)
                print(table_row(record), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
