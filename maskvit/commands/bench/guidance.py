"""What cheap guidance costs and how far it agrees with the exact scores."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskvit.commands.bench.agreement import agreements, pictures, scenes
from maskvit.commands.bench.step import step_config, synthetic_batch
from maskvit.commands.bench.timing import in_turns, summary
from maskvit.core.types import DataNeeds, batch_of
from maskvit.guidance.attention import SelfAttention
from maskvit.guidance.canvas import ReusedAttention, stride
from maskvit.guidance.cheap import CoarseAttention, MergedAttention, SampledAttention
from maskvit.guidance.predicted import PredictedAttention
from maskvit.guidance.source import Source

Show = Callable[[Mapping[str, Any]], None]


class Option(NamedTuple):
    """A row of the report. `source`: None for masks that read no guidance; `visits`: exact passes that a record has had before."""

    source: Source | None
    visits: int = 0


def options(model: Any) -> dict[str, Option]:
    """The rows by name; those that a model is too shallow for are left out."""
    depth = dict(model.encoder)["depth"]
    rows = {
        "random": Option(None),
        "color noise": Option(None),
        "exact": Option(SelfAttention()),
        "exact of the mirror image": Option(SelfAttention()),
        "last block but one": Option(SelfAttention(block=-2)),
        "block at two thirds": Option(SelfAttention(block=depth * 2 // 3 - 1)),
        **{f"coarse {share:g}": Option(CoarseAttention(resolution=share)) for share in (0.75, 0.625, 0.5)},
        **{f"sampled {share:g}": Option(SampledAttention(share=share)) for share in (0.5, 0.25)},
        **{f"merged {share:g}": Option(MergedAttention(share=share)) for share in (0.5, 0.25)},
        **{f"predicted after {after}": Option(PredictedAttention(after=after, grid=0)) for after in (0, 1, 2, 4)},
        "re-used, whole picture": Option(ReusedAttention(view="whole"), 1),
        **{f"re-used, {visits} crops": Option(ReusedAttention(), visits) for visits in (1, 4, 16)},
        "predicted after 0, 16 crops": Option(PredictedAttention(after=0), 16),
        **{f"predicted after 1, {visits} crops": Option(PredictedAttention(), visits) for visits in (1, 4, 16)},
    }
    return {name: option for name, option in rows.items() if option.source is None or _fits(option.source, model)}


def _fits(source: Source, model: Any) -> bool:
    try:
        source.check(model)
    except ValueError:
        return False
    return True


# Cost


def bench_cost(
    rows: Mapping[str, Option], *, size: Any, batch: int, image: int, dtype: str, steps: int, warmup: int, **sizes: Any
) -> list[dict[str, Any]]:
    """Train steps of MultiMAE with each row's source, in turns in one run; rows with the same source are timed once.

    Times are compared by their medians; for sources that make exact passes in some steps only (`every` above the batch) by their sums,
    which hold whole periods if `steps` is a multiple of every / batch. `sizes`: as `step_config`.
    """
    import jax

    from maskvit.nn.backbone import frozen_mask
    from maskvit.objectives import build_objective
    from maskvit.optim.schedules import Cosine
    from maskvit.optim.transforms import adamw
    from maskvit.training.step import state_from_params, train_step

    random = build_objective(step_config(size, image, dtype, False, **sizes))
    guided = build_objective(step_config(size, image, dtype, True, **sizes))
    objectives: dict[Source | None, Any] = {None: random}
    for option in rows.values():
        if option.source is not None:
            objectives[option.source] = dataclasses.replace(guided, guidance=option.source)
    optimizer_of = functools.partial(adamw, schedule=Cosine(peak=1e-4, total=1000, warmup=10))
    params = jax.jit(lambda key: random.init(key)[0])(jax.random.key(0))
    optimizer = optimizer_of(params, frozen_mask(params))
    shared: dict[str, Any] = {"state": state_from_params(params, {}, optimizer)}
    del params

    own: dict[Source | None, Any] = {}
    calls: dict[Source | None, Any] = {}
    datas: dict[Source | None, Any] = {}
    for source, objective in objectives.items():
        host = _with_places(synthetic_batch(random.model, batch), source, random.model.inputs)
        data = jax.tree.map(jax.numpy.asarray, batch_of(host))
        memory = objective.init_state(shared["state"].params, batch)
        own[source] = shared["state"]._replace(objective_state=memory)
        start = own[source]
        one_step = functools.partial(train_step, objective=objective, optimizer=optimizer, seed=0)
        compiled = jax.jit(one_step, donate_argnums=0).lower(start, data).compile()
        own[source] = dict(step=start.step + 0, objective_state=memory)
        datas[source] = data

        def run(source: Any = source, compiled: Any = compiled) -> None:
            state, metrics = compiled(shared["state"]._replace(**own[source]), datas[source])
            jax.block_until_ready((state, metrics))
            own[source] = dict(step=state.step, objective_state=state.objective_state)
            shared["state"] = state
            shared["loss"] = metrics["loss"][0]

        calls[source] = run
    seconds = in_turns(calls, steps, warmup)
    if not jax.numpy.isfinite(shared["loss"]):
        raise FloatingPointError("the benchmark's loss is not finite: its timings would not be those of a real step")
    base = random.flops()
    records = []
    for name, option in rows.items():
        extra = option.source.flops(random.model, batch) if option.source else 0.0
        record = dict(measurement="guidance_cost", option=name, size=size if isinstance(size, str) else "custom", batch=batch, image=image)
        record |= dict(dtype=dtype, steps=steps, **summary(seconds[option.source], batch))
        record |= dict(gflop_per_image=extra / 1e9, step_gflop_per_image=(base + extra) / 1e9, flop_ratio=(base + extra) / base)
        total = sum if getattr(option.source, "every", 1) > batch else statistics.median
        records.append(record | dict(time_ratio=total(seconds[option.source]) / total(seconds[None])))
    return records


def _with_places(batch: dict[str, Any], source: Source | None, inputs: Sequence[str]) -> dict[str, Any]:
    """The batch with what the source reads beside the modalities."""
    import numpy as np

    size = next(iter(batch.values())).shape[0]
    rng = np.random.default_rng(1)
    length = rng.uniform(0.5, 1.0, (size, 2))
    places = dict(
        index=np.arange(size, dtype=np.int32),
        box=np.concatenate([rng.uniform(0, 1 - length), length], axis=1).astype(np.float32),
        flip=rng.random(size) < 0.5,
    )
    needs = source.needs if source else DataNeeds()
    extra = {key: places[key] for key in needs.record}
    if needs.whole_every:
        extra |= {f"whole/{name}": batch[name][:: stride(size, needs.whole_every)] for name in inputs}
    return batch | extra


# All of it


def bench_guidance(
    timed: Mapping[str, Any] | None,
    only: Sequence[str] = (),
    demo: str | os.PathLike = "",
    checkpoint: str | None = None,
    images: str | None = None,
    learn_from: str | None = None,
    show: Show = lambda record: None,
) -> list[dict[str, Any]]:
    """All records: costs (with `timed`, the arguments of `bench_cost`), agreement on scenes (with `demo`, a PyTorch file of MultiMAE
    trained on them) and on one's own pictures (with `checkpoint`). `show` gets each as it is made.
    """
    import jax

    from maskvit.convert import convert
    from maskvit.features import first_input, load
    from maskvit.objectives import build_objective

    chosen = lambda model: {n: o for n, o in options(model).items() if not only or n == "random" or any(word in n for word in only)}  # noqa: E731
    records: list[dict[str, Any]] = []

    def keep(made: Sequence[dict[str, Any]]) -> None:
        for record in made:
            show(record)
            records.append(record)

    if timed is not None:
        config = step_config(timed["size"], timed["image"], timed["dtype"], False)
        keep(bench_cost(chosen(build_objective(config).model), **timed))
    if demo:
        with tempfile.TemporaryDirectory() as folder:
            convert(Path(demo), Path(folder) / "demo")
            loaded = load(Path(folder) / "demo")
        fresh = jax.jit(lambda key: loaded.objective.init(key)[0])(jax.random.key(0))
        data = scenes(0, 64, loaded.model.image_size), scenes(64, 32, loaded.model.image_size)
        for name, params in (("random weights", fresh), ("demo checkpoint", loaded.params)):
            keep(agreements(name, loaded.objective, params, chosen(loaded.model), *data))
    if checkpoint:
        loaded = load(checkpoint)
        learned, measured = (pictures(folder, first_input(loaded.model).name) for folder in (learn_from, images))
        keep(agreements(Path(checkpoint).name, loaded.objective, loaded.params, chosen(loaded.model), learned, measured))
    return records


# For the eye

COLUMNS = ("low", "high", "spearman", "low_corrected", "high_corrected", "spearman_corrected")


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Costs, then agreement per model, as text."""
    costs = [r for r in records if r["measurement"] == "guidance_cost"]
    found = [r for r in records if r["measurement"] == "guidance_agreement"]
    lines = []
    if costs:
        first = f"step, {costs[0]['size']}, batch {costs[0]['batch']}"
        lines.append(f"{first:32s} GFLOP/image  x random (count)  x random (time)  s/step")
    for r in costs:
        numbers = f"{r['gflop_per_image']:11.1f}  {r['flop_ratio']:16.2f}  {r['time_ratio']:15.2f}  {r['median_s']:6.2f}"
        lines.append(f"{r['option']:32s} {numbers}")
    for model in dict.fromkeys(r["model"] for r in found):
        lines += ["", f"{model:32s} cost/exact  {'  '.join(f'{column:>18s}' for column in COLUMNS)}"]
        lines += [
            f"{r['option']:32s} {r['cost_share']:10.3f}  {'  '.join(f'{r[column]:18.3f}' for column in COLUMNS)}"
            for r in found
            if r["model"] == model
        ]
    return "\n".join(lines)


def write(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """The records as lines of JSON, and the plot where there is agreement to plot."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "guidance_cost.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if any(record["measurement"] == "guidance_agreement" for record in records):
        (folder / "guidance_cost.svg").write_bytes(plot(records))


def plot(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Agreement on the lowest-scored tokens over cost as a share of the exact pass, one panel per model, as SVG.

    A line joins options that differ in one number only, which stands at each of their points.
    """
    from matplotlib.figure import Figure

    from maskvit.plots import curves

    found = [r for r in records if r["measurement"] == "guidance_agreement" and r["option"] != "exact"]  # it agrees with itself
    models = list(dict.fromkeys(record["model"] for record in found))
    families = list(dict.fromkeys(family(record["option"])[0] for record in found if record["option"] not in LIMITS))
    figure = Figure(figsize=(4.4 * max(len(models), 2), 5.2), layout="constrained")
    drawn: dict[str, Any] = {}
    for column, model in enumerate(models):
        axes = figure.add_subplot(1, len(models), column + 1)
        own = [record for record in found if record["model"] == model]
        for name, words in LIMITS.items():
            for record in own:
                if record["option"] == name:
                    axes.axhline(record["low"], color=curves.FAINT, linestyle=":", linewidth=1.2)
                    axes.annotate(words, (1.0, record["low"]), (0, 3), textcoords="offset points", ha="right", fontsize=8)
        for number, name in enumerate(families):
            points = sorted((r["cost_share"], r["low"], family(r["option"])[1]) for r in own if family(r["option"])[0] == name)
            if not points:
                continue
            style: dict[str, Any] = dict(color=curves.LINES[number % len(curves.LINES)], marker="os^D"[number // len(curves.LINES) % 4])
            drawn[name] = axes.plot([x for x, _, _ in points], [y for _, y, _ in points], markersize=5, linewidth=1.4, **style)[0]
            for x, y, varied in points:
                axes.annotate(varied, (x, y), (5, -3), textcoords="offset points", fontsize=8)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_title(model, loc="left", fontsize=11)
        axes.set_xlabel("cost, as a share of the exact pass", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("share of the lowest-scored sixth of all tokens\nthat the exact pass scores lowest too", fontsize=9)
    key: dict[str, Any] = dict(title="n: the number at each point", ncols=4, fontsize=9, frameon=False)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", **key)
    return curves.svg(figure)


# Drawn as lines across: the least and the most that an option can be expected to reach.
LIMITS = {"random": "chance", "exact of the mirror image": "exact pass on the mirrored image"}


def family(option: str) -> tuple[str, str]:
    """An option's name with "n" for its last number, and that number; of a name without one, ""."""
    match = re.search(r"[\d.]+(?=[^\d.]*$)", option)
    return (option, "") if match is None else (f"{option[: match.start()]}n{option[match.end() :]}", match[0])
