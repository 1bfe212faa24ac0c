"""The main job in minutes on a CPU, from the shipped PyTorch checkpoint to one page with everything on it (`make demo`).

Renders scenes, converts a small MultiMAE checkpoint, continues it with attention-guided masks, fine-tunes it to classes,
segmentation and depth beside the same models from random initialization, and writes WORKDIR/index.html, which says of every figure
whether it became better or worse. The exit status is 1 where the sum of the held-out losses rose, or where a reconstruction
is no better than a mean patch.
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
import numpy as np

from maskvit.commands.demo.losses import batches_of, held_out_losses, mean_patch_losses, mean_patches
from maskvit.commands.demo.page import Change, Story, build, lines
from maskvit.core.arguments import make_folder
from maskvit.core.errors import add_debug, log_lines, run_command
from maskvit.core.keys import sample_keys
from maskvit.core.shipped import bring_configs, find
from maskvit.core.types import Batch
from maskvit.plots import panels
from maskvit.plots.pictures import to_picture
from maskvit.training import setup

LOG = logging.getLogger("maskvit")
CHECKPOINT = Path("assets/multimae_scenes.pth")
SCENES = dict(num_train=3000, num_val=600)
HELD_OUT_SEED = 1
# Figures of frozen features, and of each task what its evaluator gives: key, words, whether higher is better.
FROZEN = {
    "knn/mean/top1_k20": "k-NN, mean of tokens, top-1 %", "knn/global/top1_k20": "k-NN, global token, top-1 %",
    "probe/mean/top1": "linear probe, mean of tokens, top-1 %", "probe/global/top1": "linear probe, global token, top-1 %",
}  # fmt: skip
RAW = {"knn/raw_pixels/top1_k20": "k-NN top-1 %", "probe/raw_pixels/top1": "linear probe top-1 %"}
TASKS = {
    "classes": {"classification/top1": ("kind of the nearest object, top-1 %", True)},
    "segmentation": {
        "segmentation/mean_iou": ("segmentation, mean IoU %", True),
        "segmentation/pixel_accuracy": ("segmentation, pixels right %", True),
    },
    "depth": {"depth/delta_1": ("depth, within 1.25 of the truth, %", True), "depth/rmse": ("depth, RMSE in m", False)},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m maskvit demo", description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"), help="where data, runs and the page go")
    add_debug(parser)
    options = parser.parse_args(arguments)
    return run_command(lambda: demo(options.workdir), options.debug)


class Timer:
    """Runs the parts of the demo and notes what each takes."""

    def __init__(self) -> None:
        self.times: list[tuple[str, float]] = []

    def __call__(self, name: str, function: Any, *positional: Any, **named: Any) -> Any:
        """What `function` returns."""
        LOG.info("--- %s", name)
        start = time.perf_counter()
        result = function(*positional, **named)
        self.times.append((name, time.perf_counter() - start))
        return result


def demo(workdir: Path) -> int:
    """Everything; 1 where a check failed."""
    log_lines()
    checkpoint = find(CHECKPOINT)
    if not checkpoint.exists():
        raise FileNotFoundError(f"{CHECKPOINT} is missing, here and in the package: run the demo in the root of a checkout")
    bring_configs()
    make_folder(workdir, "--workdir")

    from configs import demo as experiment
    from maskvit.convert import convert
    from maskvit.data.builders import prepare
    from maskvit.objectives import build_objective

    timed = Timer()
    config = experiment.get_config()
    config.data.train.data_dir = str(workdir / "data")
    config.init_from.path = str(workdir / "imported")
    config = config.to_dict()
    timed("rendering scenes", prepare, "scenes", str(workdir / "data"), size=config["image_size"][0], **SCENES)
    if not (workdir / "imported" / "0" / "manifest.json").exists():  # a second `make demo` resumes where the first stopped
        timed("converting the PyTorch checkpoint", convert, checkpoint, workdir / "imported")
    objective = build_objective(config)
    timed("measuring the imported checkpoint", setup.train, str(workdir / "before"), **{**config, "total": 0})
    config["evaluators"]["probe"]["options"]["features"] = ("mean", "global")  # raw pixels are measured once
    state = timed("continuing with attention-guided masks", setup.train, str(workdir / "run"), **config)
    losses, without_eyes, pictures = compare(config, objective, workdir, jax.device_put(jax.device_get(state.params)))
    tasks, models = fine_tune(experiment, workdir, timed)
    some = jax.tree.map(lambda x: x[:4], batches_of(config, objective, "val", 4)[0])  # what is behind them is padding
    pictures["answers"] = answers(some, models, objective)

    before, after = (last_figures(workdir / run) for run in ("before", "run"))
    story = Story(
        losses=losses,
        without_eyes=without_eyes,
        frozen=[Change(words, before[key], after[key], True) for key, words in FROZEN.items()],
        references={words: before[key] for key, words in RAW.items()},
        tasks=tasks,
        pictures=pictures,
        rows=read_metrics(workdir / "run"),
        settings=[*settings(config), ("fine-tuning", f"{experiment.EPOCHS} epochs of {experiment.LABELED} labeled images for each task")],
        times=timed.times,
    )
    (workdir / "index.html").write_text(build(story))
    for line in lines(story):
        LOG.info(line)
    # Class maps have no mean: the page shows the comparison with class frequencies, and nothing hangs on it.
    pictured = [name for name in objective.model.outputs if objective.model.modality(name).kind == "continuous"]
    after_by_name = {change.name.removeprefix("loss of "): change.after for change in losses}
    failed = [f"{name} is rebuilt no better than by a mean patch" for name in pictured if after_by_name[name] >= without_eyes[name]]
    if sum(change.after for change in losses) >= sum(change.before for change in losses):
        failed.append("the sum of the held-out losses did not fall")
    for words in failed:
        LOG.error("FAIL    %s", words)
    LOG.info("page: %s", workdir / "index.html")
    return 1 if failed else 0


def compare(
    config: Mapping[str, Any], objective: Any, workdir: Path, params: Any
) -> tuple[list[Change], dict[str, float], dict[str, bytes]]:
    """(Held-out losses of the imported and the continued model, those of a mean patch, pictures of both models) at fixed guided masks."""
    from maskvit.checkpoints import load_params

    held_out = batches_of(config, objective, "val", SCENES["num_val"])
    imported = jax.device_put(load_params(workdir / "imported")[0])
    # Those that the *imported* model's attention asks for, the same for both models.
    plan = jax.jit(lambda p, batch, keys: objective.plan(p, batch, keys)[0])
    plans = [plan(imported, batch, sample_keys(HELD_OUT_SEED, i, held_out[0].size)) for i, batch in enumerate(held_out)]
    before, after = (held_out_losses(objective, weights, held_out, plans) for weights in (imported, params))
    means = mean_patches(objective, batches_of(config, objective, "train", 1000))
    some, some_plan = (jax.tree.map(lambda x: x[:4], part) for part in (held_out[0], plans[0]))
    draw = jax.jit(lambda p, batch, plan: objective.visualize(p, (), batch, None, plan))
    specs = {spec.name: spec for spec in objective.model.modalities}
    pictures = {
        name: panels.masking_panel(jax.device_get(draw(weights, some, some_plan)), specs, samples=3)
        for name, weights in (("imported", imported), ("continued", params))
    }
    changes = [Change(f"loss of {name}", before[name], after[name], False) for name in after]
    return changes, mean_patch_losses(objective, means, held_out, plans), pictures


def fine_tune(experiment: Any, workdir: Path, timed: Timer) -> tuple[list[Change], dict[str, tuple[Any, Any]]]:
    """(Every task's figures from random initialization and from the continued run, by task the two fine-tuned models)."""
    from maskvit.features import load

    found: dict[str, dict[str, dict[str, float]]] = {}
    models: dict[str, tuple[Any, Any]] = {}
    for task, figures in TASKS.items():
        for start in ("random", "continued"):
            config = getattr(experiment, task)()
            config.data.train.data_dir = str(workdir / "data")
            for evaluator in config.evaluators.values():
                evaluator.data_from.data_dir = str(workdir / "data")
            config.init_from.path = str(workdir / "run") if start == "continued" else ""
            place = workdir / f"{task}_{start}"
            timed(f"fine-tuning: {task}, from {start}", setup.train, str(place), **config.to_dict())
            found.setdefault(task, {})[start] = {key: last_figures(place)[key] for key in figures}
        models[task] = tuple(load(workdir / f"{task}_{start}") for start in ("random", "continued"))  # type: ignore[assignment]
    changes = [
        Change(words, found[task]["random"][key], found[task]["continued"][key], higher)
        for task, figures in TASKS.items()
        for key, (words, higher) in figures.items()
    ]
    return changes, models


def answers(batch: Batch, models: Mapping[str, tuple[Any, Any]], objective: Any) -> bytes:
    """Scenes beside what is true and what both models of each task say, as PNG."""
    from maskvit.data.scenes import KIND_NAMES

    specs = {spec.name: spec for spec in objective.model.modalities}
    rgb = np.asarray(batch.values["rgb"])
    said = {task: [model.predict({"rgb": rgb}) for model in pair] for task, pair in models.items()}
    columns = ["photo", *(f"{name}\n{who}" for name in ("classes", "depth") for who in ("true", "from random", "continued"))]
    rows = []
    for i in range(len(rgb)):
        kinds = [KIND_NAMES[int(batch.label[i])], *(KIND_NAMES[int(one["probabilities"][i].argmax())] for one in said["classes"])]
        tiles = [(to_picture(specs["rgb"], rgb[i]), "")]
        true_ids, true_depth = (np.asarray(batch.values[name][i]) for name in ("semseg", "depth"))
        classes = [true_ids, *(one["ids"][i] for one in said["segmentation"])]
        tiles += [(to_picture(specs["semseg"], ids), word) for ids, word in zip(classes, kinds, strict=True)]
        depths = [true_depth, *(one["values"][i] for one in said["depth"])]
        tiles += [(to_picture(specs["depth"], depth, like=true_depth), "") for depth in depths]
        rows.append((str(i + 1), tiles))
    return panels.labeled_grid(columns, rows)


def settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the page says of the run."""
    objective = config["objective"]
    return [
        ("images", f"{SCENES['num_train']} for training, {SCENES['num_val']} held out, {config['image_size'][0]} pixels"),
        ("visible tokens", f"{objective['num_visible']} per image over {', '.join(objective['inputs'])}"),
        ("scores", objective["scores"]["name"]),
        ("guidance", objective["guidance"]["name"]),
        ("continuation", f"{config['total']} of {config['global_batch']} images"),
    ]


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def last_figures(workdir: Path) -> dict[str, Any]:
    """The last value of everything in a run's metrics.jsonl."""
    found: dict[str, Any] = {}
    for row in read_metrics(workdir):
        found |= row
    return found


if __name__ == "__main__":
    sys.exit(main())
