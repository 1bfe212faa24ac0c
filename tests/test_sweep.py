"""Sweeps: parsing, statistics on known numbers, and a small real sweep that is stopped and goes on."""

from __future__ import annotations

import functools
import json
import math
import pathlib

import numpy as np
import pytest

from maskvit.commands.sweep import __main__ as command
from maskvit.commands.sweep import cells as grid
from maskvit.commands.sweep import runs as running
from maskvit.commands.sweep import table, verdict
from maskvit.metrics.directions import better
from maskvit.training import setup
from tests.runs import ROOT, make_scenes, small_run

CONFIG = dict(seed=3, optimizer=dict(base_lr=1e-3, clip_norm=None), objective=dict(scores=dict(name="random"), inputs=("rgb", "depth")))


def write(path: pathlib.Path, config: dict, cells: dict | None = None) -> str:
    text = f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({config!r})\n"
    if cells is not None:
        text += f"\ndef get_sweep():\n    return {cells!r}\n"
    path.write_text(text)
    return str(path)


# Parsing


def test_overrides_set_values_and_replace_blocks():
    changed = grid.overrides(CONFIG, {"optimizer.base_lr": 2.0, "optimizer.clip_norm": 1.0, "objective.scores": {"name": "a", "b": 1}}, "x")
    assert changed["optimizer"] == dict(base_lr=2.0, clip_norm=1.0) and changed["objective"]["scores"] == {"name": "a", "b": 1}
    assert CONFIG["optimizer"]["base_lr"] == 1e-3 and CONFIG["objective"]["scores"] == {"name": "random"}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("seed.a", "cell 'c' sets 'seed.a', but config.seed is 3, not a block"),
        ("objective.scores.name.x", "config.objective.scores.name is 'random', not a block"),
    ],
)
def test_keys_below_values_are_named(key, message):
    with pytest.raises(ValueError) as error:
        grid.overrides(CONFIG, {key: 1}, "cell 'c'")
    assert message in str(error.value)


def test_grid_values_are_literals_or_text():
    assert grid.parse_grid("a.b=1,2.5,x y,None,True", {}) == ("a.b", [1, 2.5, "x y", None, True])
    assert grid.parse_grid("config.a=(0.2,1.0),{'name': 'fixed', 'counts': [1]}", {}) == (
        "a",
        [(0.2, 1.0), {"name": "fixed", "counts": [1]}],
    )
    assert grid.parse_grid("total=20,5 epochs", {"total": "1 epochs"}) == ("total", ["20", "5 epochs"])
    for text in ("a", "a=", "=1"):
        with pytest.raises(ValueError, match="not of the form key=value"):
            grid.parse_grid(text, {})


def test_cells_are_named_rows_times_the_grid():
    experiment = grid.Experiment(CONFIG, {"low": {"objective.scores.name": "low"}, "high": {}})
    cells = grid.make_cells(experiment, [("seed", [1, 2]), ("optimizer.base_lr", [0.1])])
    assert list(cells)[0] == "low,seed=1,optimizer.base_lr=0.1" and len(cells) == 4
    assert cells["high,seed=2,optimizer.base_lr=0.1"] == {"seed": 2, "optimizer.base_lr": 0.1}
    assert list(grid.make_cells(experiment._replace(cells={}), [("a", ["x/y", {"b": 1}])])) == ["a=x_y", "a=_b_1_"]
    with pytest.raises(ValueError, match="nothing to sweep"):
        grid.make_cells(experiment._replace(cells={}), [])
    with pytest.raises(ValueError, match="two cells are called"):
        grid.make_cells(experiment, [("seed", [1, 1])])


def test_a_config_file_is_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.py"):
        grid.load_experiment(tmp_path / "nowhere.py")
    path = write(tmp_path / "a.py", CONFIG, {"wrong": {"objective.inputs.rgb": 1}})
    with pytest.raises(ValueError, match="cell 'wrong' of .*a.py sets 'objective.inputs.rgb'"):
        grid.load_experiment(path)
    for cells in ([1], {"a": 3}, {"a": None}):
        with pytest.raises(ValueError, match=r"get_sweep\(\) of .*c.py must return"):
            grid.load_experiment(write(tmp_path / "c.py", CONFIG, cells))
    assert grid.load_experiment(write(tmp_path / "b.py", CONFIG)).cells == {}


# Statistics


def test_spread_is_the_sample_deviation_of_the_finite():
    assert table.spread([1.0, 3.0, math.nan]) == (2.0, math.sqrt(2), 2)
    assert table.spread([0.1, 0.1, 0.1]) == (0.1, 0.0, 3)
    alone = table.spread([1.0])
    assert alone.mean == 1.0 and math.isnan(alone.deviation) and table.spread([])[2] == 0


def test_differences_are_paired_by_seed():
    cell, baseline = {0: 1.0, 1: 2.0, 2: 3.0, 3: 9.0}, {0: 0.5, 1: 1.0, 2: 2.5, 3: math.nan, 4: 7.0}
    found = table.paired(cell, baseline)
    error = np.std([0.5, 1.0, 0.5], ddof=1) / math.sqrt(3)
    assert found.difference == pytest.approx(2 / 3) and found.pairs == 3 and found.told is False
    np.testing.assert_allclose([found.low, found.high], [2 / 3 - 4.30265 * error, 2 / 3 + 4.30265 * error], rtol=1e-5)  # t of 2 degrees
    assert found.least == pytest.approx((4.30265 + 1.06066) * error, rel=1e-5)
    assert table.paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).told is True  # exactly one apart
    alone = table.paired({0: 2.0, 1: 3.0}, {1: 1.0})
    assert alone.difference == 2.0 and alone.told is None and math.isnan(alone.low) and table.paired(cell, {}).pairs == 0


def test_an_interval_leaves_out_the_truth_once_in_twenty():
    rng = np.random.default_rng(0)
    found = [table.paired(dict(enumerate(rng.normal(size=3) + 1)), dict(enumerate(rng.normal(size=3)))) for _ in range(4000)]
    assert np.mean([not f.low <= 1 <= f.high for f in found]) == pytest.approx(0.05, abs=0.01)


def results(values: dict[str, list[float]]) -> list[dict]:
    return [
        dict(cell=cell, seed=seed, seconds=1.0, failed="", final={"loss": 1.0 + value, "knn/top1": value})
        for cell, runs in values.items()
        for seed, value in enumerate(runs)
    ]


def test_power_is_said_either_way():
    cells = {"random": {}, "low": {}, "null": {"against": "low"}}
    found = table.summarize(results({"random": [10.0, 11.0, 12.0], "low": [5.0, 6.5, 7.0], "null": [6.0, 5.5, 7.5]}), cells, "random")
    assert table.power(found, ["low", "null"]) == (
        "1 of 2 comparisons of a control leave out zero, where 0.1 would if nothing differed: low by -4.83 in knn/top1 against random."
    )
    assert table.power(found, ["null"]).startswith("No power: none of the controls (null) is told from what it is compared with")
    assert found["knn/top1"]["random"]["against"] is None and found["knn/top1"]["null"]["against"] == "low"
    single = table.summarize(results({"random": [10.0], "low": [5.0]}), {"random": {}, "low": {}}, "random")
    assert table.power(single, ["low"]).startswith("Power not known")


def rows(values, told=True):
    """The table of one figure: {cell: difference from "base"}, as `summarize` has it."""
    base = dict(mean=10.0, difference=math.nan, against=None, told=None)
    return {"base": base} | {c: dict(mean=10.0 + d, difference=d, against="base", told=t) for c, (d, t) in values.items()}


def test_a_verdict_in_words():
    figure = "knn/mean/top1_k20"
    found = verdict.verdict(figure, rows({"high": (2.1, True), "low": (-3.0, True), "a": (0.1, False), "b": (0.2, None)}))
    assert verdict.sentence(found, "run") == (
        "Of 4 runs compared with base, 1 is better (high +2.1) and 1 is worse (low -3) in knn/mean/top1_k20; for 1 the seeds show no "
        "difference; 1 cannot be judged by fewer than two seeds (b +0.2)."
    )
    assert verdict.verdict_rows([found]) == [(figure, "high +2.1", "low -3", "1", "b")]
    worse = verdict.verdict("depth/rmse", rows({"high": (2.1, True)}))
    assert verdict.sentence(worse) == "Of 1 cell compared with base, 1 is worse (high +2.1) in depth/rmse."
    assert verdict.verdict_rows([worse])[0][1:3] == ("-", "high +2.1")
    # A training loss is of the tokens that a cell hides: it is higher or lower, never better.
    assert "1 is lower (high -1)" in verdict.sentence(verdict.verdict("loss", rows({"high": (-1.0, True)})))
    same = verdict.verdict(figure, rows({"a": (0.1, False), "b": (-0.2, False)}))
    assert verdict.sentence(same) == "In knn/mean/top1_k20 the seeds show no difference from base: b -0.2, a +0.1."
    alone = verdict.verdict(figure, rows({"a": (0.1, None)}))
    assert verdict.sentence(alone).startswith("In knn/mean/top1_k20, differences from base: a +0.1. With fewer than two seeds in common")
    assert verdict.overall([found, worse]) == (
        "Of 4 comparisons with base in 2 figures, 1 is better (high +2.1 in knn/mean/top1_k20) and 2 are worse (low -3 in "
        "knn/mean/top1_k20, high +2.1 in depth/rmse); for 1 the seeds show no difference. If nothing differed, about 0.2 of them would "
        "still seem to by chance."
    )
    assert verdict.overall([same, same]).startswith("Of 4 comparisons with base in 2 figures, none shows a difference.")
    assert verdict.overall([alone, alone]).startswith("No cell can be judged") and verdict.overall([]).startswith("Nothing can be compared")


def test_figures_that_cells_are_judged_by():
    names = ["held_out/total", "held_out/rgb", "knn/mean_colour/top1_k20", "knn/mean/top1_k20", "knn/mean/top5_k20", "x/c", "x/rmse"]
    assert verdict.main_figures(names) == ["held_out/total", "knn/mean/top1_k20", "x/rmse"]


def test_every_figure_of_an_evaluator_has_a_direction():
    from maskvit.evaluators import classes, dense

    given = [*dense.Segmentation.given, *dense.Depth.given, *dense.Normals.given, *dense.Maps.given, *classes.Classification.given]
    assert {name for name in given if better(f"x/{name}") is None} == set()
    lower = {"abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "mean", "median", "l1", "loss"}
    assert {name for name in given if better(f"x/{name}") == "lower"} == lower
    assert better("knn/mean/top1_k20") == "higher" and better("accuracy/error/fog") == "lower" and better("loss/rgb") == "lower"
    assert better("held_out/rgb", ["held_out/total"]) == "lower" and better("held_out/rgb") is None and better("probe/mean/c") is None


def test_tables_of_known_numbers(tmp_path):
    cells = {"random": {}, "low": {"objective.scores": {"name": "low"}}, "lost": {}, "not run": {}}
    given = results({"random": [10.0, 12.0], "low": [5.0, 7.0], "lost": [5.0, math.nan]})
    text = table.write_tables(tmp_path, given, cells, "random", ["low"], "the <command>")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "random 11 1.414 2 -" in lines and "low 6 1.414 2 random -5 -5 ... -5 yes 0" in lines
    record = json.loads((tmp_path / "sweep.json").read_text())
    row = dict(mean=5.0, deviation=None, seeds=1, against="random", difference=-5.0, low=None, high=None, least=None, pairs=1, told=None)
    assert record["metrics"]["knn/top1"]["lost"] == row
    assert record["runs"][5]["final"]["knn/top1"] is None and "not run" not in record["metrics"]["loss"]
    page = (tmp_path / "sweep.html").read_text()
    said = "Of 2 cells compared with random, 1 is worse (low -5) in knn/top1; 1 cannot be judged by fewer than two seeds (lost -5)."
    assert f"<h1>Sweep</h1><p>{said} " in page and said in text
    assert (
        page.count('src="data:image/') == 1
        and "the &lt;command&gt;" in page
        and "http:" not in page
        and "https:" not in page
    )


def test_metrics_are_read_as_written(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": null, "loss/rgb": 1.5, "non_finite": {"loss": "nan"}}\n'
        '{"step": 2, "loss": 2.0, "lr": 1, "knn/a": 3}\n{"step": 3, "lo'
    )
    rows = running.read_metrics(tmp_path)
    assert len(rows) == 2 and math.isnan(rows[0]["loss"])
    assert running.final_figures(rows, {"evaluators": {"knn": {}}}) == {"loss": 2.0, "loss/rgb": 1.5, "knn/a": 3}
    with pytest.raises(FileNotFoundError, match="is no run"):
        running.read_metrics(tmp_path / "nowhere")


# Sweeps


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    knn = dict(type="knn", every=2, crop=1.0, ks=(3,), batch_size=8)
    plain = small_run(make_scenes(folder / "data"), evaluators=dict(knn=knn), total="2 steps", log_every=2)
    return write(folder / "config.py", plain, {"random": {}, "half": {"objective.num_visible": 4}})


def test_a_real_run(config, tmp_path, capsys, one_device):
    arguments = ["--config", config, "--only", "half", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    said = capsys.readouterr().out
    assert "[1/1] half seed 0: loss " in said and "knn/mean/top1_k3" in said and "0 min left)" in said
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert set(record["metrics"]) >= {"loss", "loss/rgb", "knn/global/top1_k3"} and list(record["metrics"]["loss"]) == ["half"]
    log = (tmp_path / "half" / "seed_0" / "log.txt").read_text()
    assert "4 visible" in log and "step 2/2" in log
    assert command.main(arguments) == 0 and "finished before" in capsys.readouterr().out


@pytest.fixture
def quick(monkeypatch):
    """`setup.train` that only notes what it was asked for; it stops, or loses its loss, where the test says so."""
    asked, faults = [], {}

    @functools.wraps(setup.train)
    def run(workdir, **settings):
        asked.append((pathlib.Path(workdir).parent.name, settings["seed"], settings["objective"]["num_visible"]))
        if len(asked) in faults:
            raise faults[len(asked)]
        (pathlib.Path(workdir) / "metrics.jsonl").write_text(json.dumps({"step": 2, "loss": float(len(asked))}) + "\n")

    monkeypatch.setattr(setup, "train", run)
    return asked, faults


def test_a_stopped_sweep_goes_on_and_is_not_run_twice(config, tmp_path, quick, capsys):
    asked, faults = quick
    faults[2] = KeyboardInterrupt()
    arguments = ["--config", config, "--seeds", "2", "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 130
    assert command.main([*arguments, "--only", "half"]) == 0
    assert command.main([*arguments, "--controls", "half"]) == 0
    assert asked == [("random", 0, 8), ("half", 0, 4), ("half", 0, 4), ("half", 1, 4), ("random", 1, 8)]
    said = capsys.readouterr().out
    assert "[1/4] random seed 0: finished before" in said and "[3/4] random seed 1: loss 5  (" in said
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert {name: row["mean"] for name, row in record["metrics"]["loss"].items()} == {"random": 3.0, "half": 3.5}
    assert "No power: none of the controls (half)" in said

    # The folder belongs to this sweep: another config's is not mistaken for it, and harmless changes are let through.
    plain, cells, _ = grid.load_experiment(config)
    changed = write(tmp_path / "other.py", {**plain, "optimizer": {**plain["optimizer"], "base_lr": 1.0}}, cells)
    assert command.main([*arguments, "--config", changed]) == 2
    error = capsys.readouterr().err
    assert "holds a run of another config" in error and "optimizer.base_lr" in error and "delete that folder" in error
    assert command.main([*arguments, "--config", write(tmp_path / "more.py", {**plain, "log_every": 1}, cells)]) == 0
    assert len(asked) == 5


def test_a_lost_loss_is_a_result(config, tmp_path, quick, capsys):
    asked, faults = quick
    faults[1] = FloatingPointError("all of the last steps had a non-finite loss")
    (tmp_path / "half" / "seed_0").mkdir(parents=True)
    (tmp_path / "half" / "seed_0" / "metrics.jsonl").write_text('{"step": 1, "loss": 4.0}\n')
    arguments = ["--config", config, "--only", "half", "--baseline", "half", "--out", str(tmp_path)]
    assert command.main(arguments) == 0 and command.main(arguments) == 0 and len(asked) == 1
    assert "Lost their loss (not finite) and stopped: half seed 0." in capsys.readouterr().out


def test_mistakes_are_found_before_any_run(config, tmp_path, quick, capsys):
    out = str(tmp_path / "out")
    for arguments, message in (
        (["--grid", "objective.num_visible=8,1000"], "cell 'random,objective.num_visible=1000': config.objective.num_visible is 1000"),
        (["--grid", "objective.scores.nam=a"], "config.objective.scores has unknown key 'nam'; known"),
        (["--grid", "optimizer.base_rl=1"], "config.optimizer has unknown key 'base_rl'; known: base_lr"),
        (["--grid", "schedule.warmup=1"], "config.schedule has unknown key 'warmup'; known: total_epochs"),
        (["--grid", "optimzer.base_lr=1"], "config has unknown key 'optimzer'; known"),
        (["--grid", "data.train.splitt=a"], "config.data.train has unknown key 'splitt'; known"),
        (["--grid", "total=ten"], "config.total: 'ten' is no duration"),
        (["--only", "none"], "--only names 'none', which is no cell; the cells: random, half"),
        (["--controls", "none"], "--controls names 'none'"),
    ):
        assert command.main(["--config", config, "--out", out, *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--config", config, "--out", out, "--seeds", "0"])
    assert "--seeds: 0 must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not quick[0]
    for arguments, message in (
        (["--grid", "global_batch=8,64"], "cell 'random,global_batch=64': the training data hold"),
        (["--grid", "data.train.data_dir=/nowhere"], "cell 'random,data.train.data_dir=_nowhere': no prepared data set"),
    ):
        assert command.main(["--config", config, "--out", out, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir()) and not quick[0]


def test_a_damaged_result_is_named(config, tmp_path, quick, capsys):
    (tmp_path / "random" / "seed_0").mkdir(parents=True)
    for text, message in (("{", "result.json is damaged"), ("3", "is no result of a run"), ('{"cell": "random"}', "is no result of a run")):
        (tmp_path / "random" / "seed_0" / "result.json").write_text(text)
        assert command.main(["--config", config, "--out", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.py")), ids=lambda path: path.stem)
def test_shipped_sweeps_build(path, tmp_path):
    """Every cell's config and objective; nothing runs."""
    experiment = grid.load_experiment(path)
    runs = running.make_runs(experiment, experiment.cells, 3, tmp_path)
    assert len(runs) == 3 * len(experiment.cells) and len({run.folder for run in runs}) == len(runs)
    assert [run.seed for run in runs[:: len(experiment.cells)]] == [0, 1, 2]
    assert experiment.cells[next(iter(experiment.cells))] == {}  # what the others are compared with is the config as it is


# Stages


STAGES = {
    "long": {"total": "2 steps"},
    "tail": {"config": "continued", "after": "long"},
    "tuned": {"config": "tuned", "after": "tail"},
    "tuned_from_random": {"config": "tuned", "seed": 5},
}


def staged(path: pathlib.Path, data_dir: str, cells: dict = STAGES) -> str:
    """A file of three configs: pretraining, its continuation at half the tokens, and a classifier."""
    plain = small_run(data_dir, total="2 steps", log_every=2, checkpoint=dict(every="2 steps", keep=1))
    classes = dict(name="supervised", encoder=plain["objective"]["encoder"], task=dict(name="classification", num_classes=12))
    tuned = {**plain, "modalities": {"rgb": plain["modalities"]["rgb"]}, "objective": classes}
    tuned["evaluators"] = dict(accuracy=dict(type="classification", every="2 steps", batch_size=8))
    write(path, plain, cells)
    functions = "".join(f"\ndef {name}():\n    return ConfigDict({c!r})\n" for name, c in (("continued", plain), ("tuned", tuned)))
    path.write_text(path.read_text() + functions)
    return str(path)


def test_a_stage_begins_with_the_weights_of_the_one_before(tmp_path, capsys, one_device):
    path = staged(tmp_path / "stages.py", make_scenes(tmp_path / "data"))
    assert command.main(["--config", path, "--out", str(tmp_path / "out"), "--only", "long,tail,tuned"]) == 0
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert list(record["metrics"]["accuracy/top1"]) == ["tuned"] and list(record["metrics"]["loss"])[:2] == ["long", "tail"]
    logs = {name: (tmp_path / "out" / name / "seed_0" / "log.txt").read_text() for name in ("long", "tail", "tuned")}
    assert "loaded" not in logs["long"] and "optimizer moments imported" in logs["tail"]
    assert "dropped  outputs/..." in logs["tuned"] and "fresh    head/..." in logs["tuned"]


def test_seeds_of_stages_go_together(tmp_path):
    experiment = grid.load_experiment(staged(tmp_path / "stages.py", "data"))
    runs = running.make_runs(experiment, experiment.cells, 2, tmp_path)
    begin = {(run.cell, run.seed): run.config["init_from"]["path"] for run in runs}
    assert begin["tuned", 1] == str(tmp_path / "tail" / "seed_1") and begin["tuned_from_random", 6] == "" == begin["long", 0]
    with pytest.raises(ValueError, match="some of this sweep refer to others"):
        grid.make_cells(experiment, [("seed", [1])])


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"a": {"config": "nobody"}}, "a cell of .* has config = 'nobody', which is no function of that file"),
        ({"a": {"after": "b"}, "b": {}}, "cell 'a' of .* comes after 'b', which is no cell before it"),
        ({"a": {"against": "b"}}, "cell 'a' of .* is against 'b', which is no cell of it"),
        ({"a": {"config": "tuned", "seed.x": 1}}, "cell 'a' of .* sets 'seed.x'"),
    ],
)
def test_mistakes_in_stages(cells, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        grid.load_experiment(staged(tmp_path / "stages.py", "data", cells))


@pytest.mark.parametrize("name", ["fashion_mnist", "guided_continuation", "guided_fashion_mnist", "downstream_scenes"])
def test_shipped_stages(name, tmp_path):
    experiment = grid.load_experiment(ROOT / "configs" / "sweeps" / f"{name}.py")
    runs = running.make_runs(experiment, grid.make_cells(experiment, []), 1, tmp_path)
    assert len(runs) == len({run.folder for run in runs}) > 10
    assert {run.config["objective"]["name"] for run in runs} == {"supervised", "mae" if "fashion_mnist" in name else "multimae"}
