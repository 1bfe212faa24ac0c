"""The main job in minutes on a CPU, from the shipped PyTorch checkpoint to one page with everything on it (`make demo`).

Builds rendered scenes, converts a small MultiMAE checkpoint, continues it with attention-guided masking, compares it with
the imported one on held-out scenes, and writes WORKDIR/index.html. Exits with 1 unless the held-out loss at fixed guided
masks fell and the reconstructions beat a mean patch.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from maskvit.core.arguments import make_folder
from maskvit.core.errors import add_debug, log_lines, run_command
from maskvit.core.keys import sample_keys
from maskvit.core.shipped import bring_configs, find
from maskvit.core.types import Batch, MaskPlan, Params, batch_of
from maskvit.plots import curves, page, panels
from maskvit.training import setup

LOG = logging.getLogger("maskvit")
CHECKPOINT = Path("assets/multimae_scenes.pth")
SCENES = dict(num_train=3000, num_val=600)
HELD_OUT_SEED = 1


def loss_of_predictions(objective: Any, batch: Batch, plan: MaskPlan, predictions: Mapping[str, Array]) -> dict[str, Array]:
    """Sums and counts of every output's masked loss for given predictions."""
    prepared = objective.prepare(batch)
    layout = objective.model.layout_of(prepared.values_of(objective.model.inputs))
    return objective.loss_sums(predictions, prepared, plan, layout)


def held_out_losses(objective: Any, params: Params, batches: Sequence[Batch], plans: Sequence[MaskPlan]) -> dict[str, float]:
    """Masked loss per output over held-out batches, at given plans."""
    loss = jax.jit(lambda p, batch, plan: objective.loss(p, (), batch, None, jnp.int32(0), plan)[1][1])
    return _mean([loss(params, batch, plan) for batch, plan in zip(batches, plans, strict=True)])


def mean_patches(objective: Any, batches: Sequence[Batch]) -> dict[str, Float[Array, "n p c"]]:
    """What a model without eyes predicts: the mean over images of every output at every place; for classes, the
    logarithm of their frequency there. For an output of normalized patches that is each patch's own mean: zero."""

    def of_batch(batch: Batch) -> dict[str, Array]:
        prepared, result = objective.prepare(batch), {}
        for name in objective.model.outputs:
            target, spec = objective.target(name, prepared), objective.model.modality(name)
            result[name] = jax.nn.one_hot(target, spec.num_classes).mean(0) if spec.kind == "categorical" else target.mean(0)
        return result

    means = jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), axis=0), *[jax.jit(of_batch)(batch) for batch in batches])
    for name in objective.model.outputs:
        spec = objective.model.modality(name)
        if spec.kind == "categorical":
            means[name] = jnp.log(means[name] + 1e-4)
        elif name != spec.name:
            means[name] = jnp.zeros_like(means[name])
    return means


def mean_patch_losses(objective: Any, means: Mapping[str, Array], batches: Sequence[Batch], plans: Sequence[MaskPlan]) -> dict[str, float]:
    """The masked losses of `mean_patches` on held-out batches at given plans."""

    def loss(batch: Batch, plan: MaskPlan) -> Any:
        b = plan.masked.shape[0]
        predictions = {name: jnp.broadcast_to(mean, (b, *mean.shape)) for name, mean in means.items()}
        return {f"loss/{name}": value for name, value in loss_of_predictions(objective, batch, plan, predictions).items()}

    return _mean([jax.jit(loss)(batch, plan) for batch, plan in zip(batches, plans, strict=True)])


def _mean(metrics: Sequence[Any]) -> dict[str, float]:
    from maskvit.metrics.accumulate import summarize

    return {name.removeprefix("loss/"): value for name, value in summarize(metrics).items()}


def batches_of(config: Mapping[str, Any], objective: Any, split: str, limit: int) -> list[Batch]:
    """Unaugmented batches of a split, on the device."""
    from maskvit.data import open_source
    from maskvit.data.batches import eval_batches

    specs = {spec.name: spec for spec in objective.model.modalities}
    source = dict(config["data"]["train"], split=split)
    stream = eval_batches(
        open_source(source.pop("source"), specs, **source), specs, objective.model.image_size, batch_size=100, limit=limit, crop=1.0
    )
    arrays = ({key: jnp.asarray(value) for key, value in batch.items() if isinstance(value, np.ndarray)} for batch in stream)
    return [batch_of(one).only(tuple(specs)) for one in arrays]


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m maskvit demo", description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"), help="where data, runs and the page go")
    add_debug(parser)
    options = parser.parse_args(arguments)
    return run_command(lambda: demo(options.workdir), options.debug)


def demo(workdir: Path) -> int:
    """Everything; 1 where a check failed."""
    log_lines()
    checkpoint = find(CHECKPOINT)
    if not checkpoint.exists():
        raise FileNotFoundError(f"{CHECKPOINT} is missing, here and in the package: run the demo in the root of a checkout")
    bring_configs()
    make_folder(workdir, "--workdir")

    from configs import demo as experiment
    from maskvit.checkpoints import load_params
    from maskvit.convert import convert
    from maskvit.data.builders import prepare
    from maskvit.objectives import build_objective

    times: list[tuple[str, float]] = []

    def timed(name: str, function: Any, *positional: Any, **named: Any) -> Any:
        LOG.info("--- %s", name)
        start = time.perf_counter()
        result = function(*positional, **named)
        times.append((name, time.perf_counter() - start))
        return result

    config = experiment.get_config()
    config.data.train.data_dir = str(workdir / "data")
    config.init_from.path = str(workdir / "imported")
    config = config.to_dict()
    height = config["image_size"][0]
    timed("rendering scenes", prepare, "scenes", str(workdir / "data"), size=height, **SCENES)
    if not (workdir / "imported" / "0" / "manifest.json").exists():  # a second `make demo` resumes where the first stopped
        timed("converting the PyTorch checkpoint", convert, checkpoint, workdir / "imported")

    objective = build_objective(config)
    held_out = batches_of(config, objective, "val", SCENES["num_val"])
    train_set = batches_of(config, objective, "train", 1000)
    imported = jax.device_put(load_params(workdir / "imported")[0])
    # Fixed guided masks: those that the *imported* model's attention asks for, the same for both models.
    plan = jax.jit(lambda p, batch, keys: objective.plan(p, batch, keys)[0])
    size = held_out[0].size
    plans = [plan(imported, batch, sample_keys(HELD_OUT_SEED, i, size)) for i, batch in enumerate(held_out)]

    before_config = {**config, "total": 0}
    timed("k-NN of the imported checkpoint", setup.train, str(workdir / "before"), **before_config)
    state = timed("continuing with attention-guided masking", setup.train, str(workdir / "run"), **config)
    params = jax.device_put(jax.device_get(state.params))

    losses = {
        "imported": held_out_losses(objective, imported, held_out, plans),
        "continued": held_out_losses(objective, params, held_out, plans),
        "mean patch": mean_patch_losses(objective, mean_patches(objective, train_set), held_out, plans),
    }
    checks = [("held-out loss below the imported checkpoint's", sum(losses["continued"].values()) < sum(losses["imported"].values()))]
    # Class maps have no mean: there the page shows the comparison with class frequencies, and nothing hangs on it.
    pictured = [name for name in objective.model.outputs if objective.model.modality(name).kind == "continuous"]
    checks += [(f"{name}: better than a mean patch", losses["continued"][name] < losses["mean patch"][name]) for name in pictured]

    pictures = {}
    some = jax.tree.map(lambda x: x[:4], held_out[0])
    some_plan = jax.tree.map(lambda x: x[:4], plans[0])
    draw = jax.jit(lambda p, batch, plan: objective.visualize(p, (), batch, None, plan))
    for name, weights in (("imported", imported), ("continued", params)):
        arrays = draw(weights, some, some_plan)
        pictures[name] = panels.masking_panel(jax.device_get(arrays), {s.name: s for s in objective.model.modalities}, samples=3)
    page = build_page(config, workdir, losses, checks, pictures, times)
    (workdir / "index.html").write_text(page)
    for name, passed in checks:
        LOG.info("%s  %s", "pass" if passed else "FAIL", name)
    LOG.info("page: %s", workdir / "index.html")
    return 0 if all(passed for _, passed in checks) else 1


def build_page(
    config: Mapping[str, Any], workdir: Path, losses: Mapping[str, Mapping[str, float]], checks: Sequence[tuple[str, bool]],
    pictures: Mapping[str, bytes], times: Sequence[tuple[str, float]],
) -> str:  # fmt: skip
    """The demo's page from its numbers and pictures."""
    from maskvit.data.scenes import KIND_NAMES

    rows = read_metrics(workdir / "run")
    training = [row for row in rows if "loss" in row]
    names = [name for name in training[0] if name.startswith("loss")] + ["learning_rate", "grad_norm", "images_per_second"]
    steps = [row["step"] for row in training]
    series = {name: (steps, [row.get(name, float("nan")) for row in training]) for name in names}
    before = next(row for row in reversed(read_metrics(workdir / "before")) if any(key.startswith("knn/") for key in row))
    after = next(row for row in reversed(rows) if any(key.startswith("knn/") for key in row))
    top1 = sorted(key for key in after if key.endswith("/top1_k20"))
    groups = {key.split("/")[1].replace("_", " "): {"imported": before[key], "continued": after[key]} for key in top1}
    knn_rows = [(key.removeprefix("knn/"), before[key], after[key]) for key in sorted(after) if key.startswith("knn/")]
    outputs = list(losses["continued"])
    loss_rows = [(name, losses["imported"][name], losses["continued"][name], losses["mean patch"][name]) for name in outputs]
    imported, continued, mean_patch = (float(sum(losses[who].values())) for who in ("imported", "continued", "mean patch"))
    loss_rows.append(("sum", imported, continued, mean_patch))
    speed = np.median([row["images_per_second"] for row in training if "images_per_second" in row])
    objective = config["objective"]
    P, T, F, C, S = page.Prose, page.Table, page.Figure, page.Commands, page.Section
    return page.html_page(
        "maskvit: attention-guided masking, from a PyTorch checkpoint",
        [
            S("What was run", [
                P("A small MultiMAE, stored in the key layout of the public PyTorch checkpoint, was converted and pretrained further "
                  "on rendered scenes. Before each step one extra forward pass over all tokens says which tokens the model attends to "
                  "most; those are hidden, and the model rebuilds them from what is left."),
                C("python -m maskvit demo"),
                T(("setting", "value"), [
                    ("images", f"{SCENES['num_train']} for training, {SCENES['num_val']} held out, {config['image_size']} pixels"),
                    ("visible tokens", f"{objective['num_visible']} per image over {', '.join(objective['inputs'])}"),
                    ("scores, guidance", f"{objective['scores']['name']}, {objective['guidance']}"),
                    ("steps", f"{config['total']} of {config['global_batch']} images"),
                ]),
            ]),
            S("Did it work", [T(("check", "result"), [(name, "pass" if passed else "FAIL") for name, passed in checks])]),
            S("Held-out loss", [
                P("Over held-out scenes at fixed masks: those that the imported checkpoint's own attention asks for. A mean patch "
                  "predicts, at every place, the training set's mean there (class frequencies for the semantic map; for normalized "
                  "patches each patch's own mean)."),
                T(("output", "imported", "continued", "mean patch"), loss_rows),
            ]),
            S("Masks, guidance and reconstructions", [
                F(pictures["continued"], "Held-out scenes, the continued model: input, attention, what stays visible, reconstruction."),
                F(pictures["imported"], "The same scenes and masks, the imported checkpoint."),
            ]),
            S("Training", [F(curves.curves(series), "Losses on hidden tokens, learning rate, gradient norm and speed over steps.")]),
            S("k-NN on frozen features", [
                P("Top-1 on the kind of the nearest object. Mean color and raw pixels are baselines without a model."),
                F(curves.bars(groups, references={"chance": 100 / len(KIND_NAMES)}), "Top-1 accuracy, k = 20, before and after."),
                T(("feature", "imported", "continued"), knn_rows),
            ]),
            S("Timing", [
                T(("part", "seconds"), [(name, round(seconds, 1)) for name, seconds in times]),
                P(f"Training ran at {speed:.0f} images per second (median of its log intervals), guidance pass included."),
            ]),
        ],
        summary="Built, converted, continued and compared on this machine.",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
