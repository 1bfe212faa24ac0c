"""Evaluations as data: one line each, and tables that put nothing side by side that was measured differently."""

from __future__ import annotations

import csv
import json
from typing import Any

import pytest

from maskvit.checkpoints.manifest import write_best
from maskvit.commands import table
from maskvit.metrics.results import ResultsFile, digest, read

PROTOCOL = dict(crop=0.875, image_size=[224, 224])


def config(seed: int = 0, mixup: float = 0.0) -> dict[str, Any]:
    return dict(seed=seed, objective=dict(task=dict(mixup=mixup)))


def write(workdir: Any, top1: list[float], protocol: dict[str, Any] = PROTOCOL, **of: Any) -> str:
    workdir.mkdir(exist_ok=True)
    file = ResultsFile(workdir, config(**of), None, "checkpoints/mae_b (0123)")
    for step, value in enumerate(top1, 1):
        file.write(step, "acc", protocol, {"top1": value, "loss": float("nan")}, trained=step > 1)
    return str(workdir)


def test_a_line_says_what_was_measured_of_what(tmp_path):
    write(tmp_path / "run", [50.0, 60.0])
    first, second = read(tmp_path / "run")
    assert first["figures"] == {"top1": 50.0, "loss": None} and first["weights"] == "checkpoints/mae_b (0123)"
    assert second["weights"].endswith("run/checkpoints/2") and second["log"].endswith("run/metrics.jsonl")
    assert first["fingerprint"] == digest(PROTOCOL) != digest(dict(PROTOCOL, crop=1.0)) and first["config"] == config()
    assert first["config_digest"] == digest(config()) and first["seed"] == 0 and first["time"].endswith("Z")


def test_steps_that_a_resumed_run_takes_again_are_dropped(tmp_path):
    write(tmp_path / "run", [50.0, 60.0, 70.0])
    ResultsFile(tmp_path / "run", config(), 2).write(3, "acc", PROTOCOL, {"top1": 71.0}, trained=True)
    assert [line["figures"]["top1"] for line in read(tmp_path / "run")] == [50.0, 60.0, 71.0]


def test_means_and_spreads_over_seeds(tmp_path, capsys):
    runs = [write(tmp_path / f"{m}_{s}", [0.0, 10.0 * m + s], seed=s, mixup=m) for m in (1.0, 2.0) for s in (0, 1)]
    assert table.main([*runs, "--figures", "acc/top1", "--by", "objective.task.mixup", "--out", str(tmp_path / "t.csv")]) == 0
    printed = capsys.readouterr().out
    assert "| objective.task.mixup = 1.0 | 10.50 ± 0.71 (2) |" in printed and f"`acc` {digest(PROTOCOL)}: crop 0.875" in printed
    assert list(csv.reader((tmp_path / "t.csv").open()))[2] == ["objective.task.mixup = 2.0", "20.50 ± 0.71 (2)"]
    assert table.main([runs[0], "--out", str(tmp_path / "t.json")]) == 0
    assert json.loads((tmp_path / "t.json").read_text())["rows"][0]["acc/top1"] == [10.0]


def test_the_best_checkpoint_instead_of_the_last(tmp_path, capsys):
    run = write(tmp_path / "run", [1.0, 9.0, 5.0])
    assert table.main([run, "--at", "best"]) == 2 and "names no best checkpoint" in capsys.readouterr().err
    (tmp_path / "run" / "checkpoints").mkdir()
    write_best(tmp_path / "run" / "checkpoints", 2)
    assert table.main([run, "--at", "best", "--figures", "acc/top1"]) == 0
    assert "| 9.00 |" in capsys.readouterr().out


def test_different_protocols_are_refused(tmp_path, capsys):
    runs = [write(tmp_path / "one", [1.0]), write(tmp_path / "two", [1.0], dict(PROTOCOL, crop=1.0))]
    assert table.main(runs) == 2
    assert "crop: 0.875 in" in (said := capsys.readouterr().err) and "not comparable" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--figures", "acc/top9"], "--figures names 'acc/top9'; the runs have acc/top1, acc/loss"),
        (["--out", "table.txt"], "its suffix says the format"),
    ],
)
def test_mistakes_are_named(arguments, message, tmp_path, capsys):
    assert table.main([write(tmp_path / "run", [1.0]), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_results_and_broken_ones(tmp_path, capsys):
    assert table.main([str(tmp_path)]) == 2 and "a run writes it when an evaluator" in capsys.readouterr().err
    (tmp_path / "results.jsonl").write_text('{"step": 1\n')
    assert table.main([str(tmp_path)]) == 2 and "line 1 is no result" in capsys.readouterr().err
