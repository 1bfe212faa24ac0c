"""The best checkpoint by a named figure stays, a run without improvement ends, and one that does harm is stopped."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from maskvit import evaluators
from maskvit.checkpoints import find_checkpoint
from maskvit.checkpoints.manifest import CheckpointError, steps_in
from maskvit.training import setup
from maskvit.training.best import Best, FigureFell, best_block, check_figure
from tests.runs import make_scenes, small_run

pytestmark = pytest.mark.usefixtures("shared_steps", "one_device")
VALUES: dict[str, list[float]] = {}


class Scripted:
    """Gives the values of a list, one each time."""

    names = ("value",)

    def __init__(self, *, objective, modalities, image_size, mesh, data, script: str):
        self.script = script

    def protocol(self):
        return {}

    def run(self, params, objective_state, between):
        yield "value", VALUES[self.script].pop(0)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"))


def run(data_dir: str, workdir: Any, values: list[float], monkeypatch, total: str = "8 steps", keep: int = 1, **best: Any) -> Any:
    """A run that is evaluated every other step."""
    monkeypatch.setitem(evaluators.EVALUATORS, "scripted", Scripted)
    VALUES["here"] = values
    config = small_run(data_dir, total=total, checkpoint=dict(every="100 steps", keep=keep))
    config["evaluators"] = dict(watched=dict(type="scripted", script="here", every="2 steps"))
    return setup.train(str(workdir), **config, best=dict(figure="watched/value", **best))


def test_the_best_checkpoint_stays_beside_the_newest(data_dir, tmp_path, monkeypatch, caplog):
    with caplog.at_level("INFO"):
        run(data_dir, tmp_path, [1.0, 3.0, 2.0, 3.0], monkeypatch)
    assert steps_in(tmp_path / "checkpoints") == [4, 8]  # of two equals the first
    assert find_checkpoint(tmp_path / "best").name == find_checkpoint(tmp_path / "checkpoints" / "best").name == "4"
    assert find_checkpoint(tmp_path).name == "8"
    assert any("the best watched/value is 3.00, of step 4" in record.message for record in caplog.records)


def test_a_resumed_run_knows_the_best_from_before(data_dir, tmp_path, monkeypatch):
    """Stopped after the evaluation of step 4, whose checkpoint was saved before it."""
    run(data_dir, tmp_path, [5.0, 7.0, 1.0, 1.0], monkeypatch, keep=9)
    for step in (6, 8):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    run(data_dir, tmp_path, [6.0, 2.0], monkeypatch, keep=1)
    assert VALUES["here"] == [] and find_checkpoint(tmp_path / "best").name == "4"
    assert steps_in(tmp_path / "checkpoints") == [4, 8]


def test_patience_ends_a_run(data_dir, tmp_path, monkeypatch, caplog):
    with caplog.at_level("INFO"):
        state = run(data_dir, tmp_path, [4.0, 5.0, 6.0, 0.0], monkeypatch, mode="min", patience=2)
    assert int(state.step) == 6 and VALUES["here"] == [0.0]
    assert any("no better value in 2 evaluations" in record.message for record in caplog.records)
    assert int(run(data_dir, tmp_path, [], monkeypatch, mode="min", patience=2).step) == 6  # still has enough


def test_a_figure_that_falls_by_more_than_the_margin_stops_the_run(data_dir, tmp_path, monkeypatch):
    """Evaluated before the first step, whose checkpoint is kept."""
    with pytest.raises(FigureFell, match="stopped at step 4: watched/value is 55.00, 5.00 worse than the 60.00 it began with"):
        run(data_dir, tmp_path, [60.0, 58.5, 55.0], monkeypatch, margin=2.0)
    assert find_checkpoint(tmp_path / "best").name == "0" and steps_in(tmp_path / "checkpoints") == [0, 4]


def test_nan_is_never_the_best():
    best = Best(figure="a/b", patience=3)
    assert not best.observe(1, {"a/b": float("nan")}) and best.observe(2, {"a/b": 1.0}) and best.step == 2
    assert Best.resumed(dict(best_block(figure="a/b")), best.as_json()).value == 1.0
    with pytest.raises(ValueError, match="the evaluator gave a/c"):
        best.observe(3, {"a/c": 1.0})


@pytest.mark.parametrize(
    ("figure", "message"),
    [("accuracy/top1", "must begin with an evaluator of config.evaluators: watched"), ("watched/top1", "gives watched/value")],
)
def test_figures_that_nobody_gives(figure, message):
    with pytest.raises(ValueError, match=message):
        check_figure(figure, {"watched": Scripted})


@pytest.mark.parametrize("wrong", [dict(mode="most"), dict(patience=-1), dict(margin=0.0)])
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match=f"config.best.{next(iter(wrong))} is"):
        best_block(figure="a/b", **wrong)


def test_no_best_is_said(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no best checkpoint"):
        find_checkpoint(tmp_path / "best")
