"""`python -m maskvit worth`: the sentence, what it rests on, mistakes, and small real comparisons."""

from __future__ import annotations

import copy
import json
import re

import jax
import numpy as np
import pytest

from configs import tasks
from maskvit.checkpoints import save_imported
from maskvit.commands.sweep.cells import Experiment
from maskvit.commands.sweep.runs import make_runs
from maskvit.commands.worth import __main__ as command
from maskvit.commands.worth.judged import Judged, differing, judge
from maskvit.commands.worth.page import CONTINUED, IMPORTED, SCRATCH, Figures, class_scores, class_section, sentence
from maskvit.training.parts import build_parts
from tests.runs import make_scenes, write_config
from tests.tiny import fresh_params, tiny_objective

ENCODER = dict(width=48, depth=1, heads=3)


# The sentence


def figures(imported, continued, name="accuracy/top1", rising=True):
    values = {SCRATCH: {}, IMPORTED: dict(enumerate(imported)), CONTINUED: dict(enumerate(continued))}
    return Figures(name, rising, values, 100)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (figures([70, 71, 72], [71, 73, 72.5]), "added +1.17 points of accuracy/top1 over the imported checkpoint (3 seeds, 95 % interval"),
        (figures([70, 71, 72], [71, 73, 72.5]), "-0.73 ... +3.06): not told from zero."),
        (figures([70, 71, 72], [72.1, 73, 73.9]), "+1.75 ... +2.25): told from zero."),
        (figures([70, 71, 72], [60, 61.5, 61]), "cost 10.2 points of accuracy/top1 against the imported checkpoint"),
        (figures([0.5, 0.6], [0.4, 0.5], "depth/rmse", False), "changed depth/rmse, of which less is better, by -0.10 against"),
        (figures([70], [75]), "added +5.00 points of accuracy/top1 over the imported checkpoint (1 seed, no interval): one pair of runs"),
        (figures([70, 71], [70, 71]), "changed accuracy/top1 by 0.00 points against the imported checkpoint (2 seeds"),
        (figures([70], []), "There is nothing to compare"),
    ],
)
def test_the_sentence(given, words):
    assert words in sentence(given)


def test_scores_of_classes():
    matrix = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    np.testing.assert_allclose(class_scores(matrix, False), [75, 75, np.nan])
    np.testing.assert_allclose(class_scores(matrix, True), [600 / 9, 50, np.nan])
    better = np.array([[8, 0, 0], [1, 3, 0], [0, 0, 0]])
    judged = {cell: [Judged(m, np.zeros(1))] for cell, m in ((SCRATCH, matrix), (IMPORTED, matrix), (CONTINUED, better))}
    rows = class_section(judged, ("a", "b", "c"), False).blocks[0].rows
    assert rows == [["a", 8, "75.0", "75.0", "100.0", "+25.0"], ["b", 4, "75.0", "75.0", "75.0", "+0.0"]]


def test_examples_on_which_one_is_better():
    one, other = np.array([1, 0, 0.5, np.nan, 0.9]), np.array([0, 1, 0.5, 0, 0.8])
    assert differing(one, other, 8) == [0, 4] and differing(one, other, 1) == [0] and differing(other, one, 8) == [1]


# Runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Scenes, two checkpoints of one small model and one of another, and configs of two tasks."""
    root = tmp_path_factory.mktemp("worth")
    data = dict(source="tfds", name="scenes", data_dir=make_scenes(root / "data"))
    modalities = {"rgb": dict(channels=3, patch=8, loss="mse", scale=1 / 255)}
    for name, width, seed in (("imported", 48, 1), ("continued", 48, 2), ("wide", 96, 1)):
        config = dict(inputs=("rgb",), outputs=("rgb",), encoder=dict(ENCODER, width=width), num_visible=4)
        objective = tiny_objective(copy.deepcopy(modalities), **config)
        metadata = {"config": dict(image_size=[32, 32], modalities=modalities, objective=dict(name="multimae", **config))}
        save_imported(root / name, jax.device_get(fresh_params(objective, seed)), metadata)
    goals = {"classes": (dict(name="classification", num_classes=12), {}, "classification", "top1")}
    goals["pixels"] = dict(name="segmentation", target="semseg"), tasks.SCENES_HEAD, "segmentation", "mean_iou"
    for name, (goal, head, evaluator, figure) in goals.items():
        config = tasks.scenes_task(goal, head, evaluator, 4, ENCODER, data)
        with config.unlocked(), config.ignore_type():
            config.image_size, config.total, config.global_batch = (32, 32), "2 steps", 8
            config.evaluators[evaluator] = dict(config.evaluators[evaluator].to_dict(), every="2 steps", batch_size=6)
            config.best = dict(figure=f"{evaluator}/{figure}", patience=1)
        write_config(root / f"{name}.py", config.to_dict())
    return root


def run(world, out, *more, config="classes", imported="imported", continued="continued"):
    places = ["--imported", str(world / imported), "--continued", str(world / continued), "--out", str(out)]
    return command.main(["--config", str(world / f"{config}.py"), *places, *more])


def results(out):
    """The result of every run of a comparison, by (cell, seed)."""
    found = [json.loads(path.read_text()) for path in out.glob("*/seed_*/result.json")]
    return {(result["cell"], result["seed"]): result for result in found}


def judged(out, result):
    """What `judge` says of a run."""
    parts = build_parts(command.experiment(**{**result["config"], "image_size": (32, 32)}), None)
    return judge(out / result["cell"] / f"seed_{result['seed']}", next(iter(parts.evaluators.values())))


def test_classes_are_compared_by_what_the_runs_reached(world, tmp_path, capsys, one_device):
    """Two seeds from three beginnings. All on the page is what an evaluator measured in the run."""
    out = tmp_path / "out"
    assert run(world, out, "--seeds", "2", "--config.optimizer.base_lr=1e-2") == 0
    said, found = capsys.readouterr().out, results(out)
    assert set(found) == {(cell, seed) for cell in (SCRATCH, IMPORTED, CONTINUED) for seed in (0, 1)}
    one = judged(out, found[CONTINUED, 1])
    assert 100 * np.trace(one.matrix) / 12 == pytest.approx(found[CONTINUED, 1]["final"]["classification/top1"], abs=1e-4)
    assert one.matrix.sum() == 12 and np.nansum(one.right) == np.trace(one.matrix)
    configs = {key: result["config"] for key, result in found.items()}
    assert all(config["optimizer"]["base_lr"] == 1e-2 and "patience" not in config["best"] for config in configs.values())
    paths = {key: config["init_from"]["path"] for key, config in configs.items()}
    assert paths[SCRATCH, 0] == "" and paths[IMPORTED, 1].startswith(str(world / "imported")) and "continued" in paths[CONTINUED, 0]
    assert [configs[cell, 0]["optimizer"]["layer_decay"] for cell in (SCRATCH, IMPORTED, CONTINUED)] == [1.0, 0.75, 0.75]
    gain = [np.subtract(*(found[cell, seed]["final"]["classification/top1"] for cell in (CONTINUED, IMPORTED))) for seed in (0, 1)]
    text = (out / "index.html").read_text()
    first = re.search(r"<header><h1>Was it worth it\?</h1><p>(.*?)</p>", text)[1]
    assert first in said and f"{abs(np.mean(gain)):.2f}"[:4] in first and "2 seeds" in first
    assert "Learning curves" in text and "By class" in text and "Examples that differ" in text and "<script" not in text

    # Another checkpoint is not taken for this one, whose runs are finished.
    assert run(world, out, "--seeds", "2", "--config.optimizer.base_lr=1e-2", imported="continued", continued="imported") == 2
    error = capsys.readouterr().err
    assert "compares another imported checkpoint" in error and error.count("\n") == 1


def test_pixels_are_compared(world, tmp_path, one_device):
    out = tmp_path / "out"
    assert run(world, out, "--seeds", "1", config="pixels") == 0
    result = results(out)[CONTINUED, 0]
    matrix = judged(out, result).matrix
    iou, given = class_scores(matrix, True), matrix.sum(0) > 0
    mean = np.nansum(iou) / np.sum(~np.isnan(iou) | given)  # a class that is given and never there counts 0
    assert mean == pytest.approx(result["final"]["segmentation/mean_iou"], abs=1e-3)
    text = (out / "index.html").read_text()
    assert "one pair of runs cannot be told from chance" in text and "labeled pixels" in text and "background" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(config="nowhere"), "the config file"),
        (dict(imported="nowhere"), "nowhere"),
        (dict(continued="imported"), "--imported and --continued are the same checkpoint"),
        (dict(continued="wide"), "wide"),
        (dict(more=["--config.best=None"]), "set config.best.figure"),
        (dict(more=["--config.optimizer.bse_lr=1"]), "bse_lr"),
        (dict(more=["--config.data.train.name=other"]), "other"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(arguments, words, world, tmp_path, capsys):
    more = arguments.pop("more", [])
    assert run(world, tmp_path / "out", *more, **arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and "Traceback" not in error and not (tmp_path / "out").exists()


def test_runs_of_another_config_are_told(world, tmp_path, capsys):
    base = command.fine_tuning(str(world / "classes.py"), [])
    cells = command.make_cells(base, {IMPORTED: world / "imported", CONTINUED: world / "continued"})
    first = make_runs(Experiment(base, cells), cells, 1, tmp_path)[0]
    first.folder.mkdir(parents=True)
    changed = {**first.config, "total": "3 steps"}
    result = dict(cell=first.cell, seed=0, config=changed, seconds=1.0, failed="", final={})
    (first.folder / "result.json").write_text(json.dumps(result))
    assert run(world, tmp_path) == 2 and "holds a run of another config" in capsys.readouterr().err
