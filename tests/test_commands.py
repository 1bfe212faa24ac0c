"""What a person can get wrong at each command: one line, or one list, exit status 2, and no traceback."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskvit.__main__ import COMMANDS, main
from maskvit.core.errors import EXPECTED
from tests.runs import ROOT, small_run, write_config

# The flags of train are absl's, one set per process: its mistakes are made in child processes below; those of convert in tests/convert.
MAINS: dict[str, Callable[[Sequence[str]], int | None]] = {
    name: importlib.import_module(module).main for name, (module, _, _) in COMMANDS.items() if name not in ("train", "convert")
}
MAPS = dict(
    data=dict(source="tfds", name="scenes", data_dir="nowhere"), modalities=dict(rgb={}), model=dict(checkpoint="nowhere"),
    source=dict(name="self_attention"), out=dict(data_dir="maps", name="maps"), image_size=32, batch_size=4,
)  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder with the things that the commands below are pointed at."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures" / "rgb" / "all").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "pictures" / "rgb" / "all" / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no picture")
    (tmp_path / "syntax.py").write_text("def get_config(:\n")
    (tmp_path / "nothing.py").write_text("x = 1\n")
    (tmp_path / "raises.py").write_text("def get_config():\n    return unknown\n")
    (tmp_path / "cells.py").write_text(
        "from configs import common\nget_config = common.scenes\ndef get_sweep():\n    return {'a': {}, 'b': {'seed.x': 1}}\n"
    )
    write_config(tmp_path / "run.py", small_run("nowhere"))
    write_config(tmp_path / "maps.py", MAPS)
    for name, text in {"broken": '{"step": 1,\n', "list": "[1]\n", "blank": ""}.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(text)
    (tmp_path / "sweep" / "total=1_steps" / "seed_0").mkdir(parents=True)
    (tmp_path / "sweep" / "total=1_steps" / "seed_0" / "result.json").write_text("{")
    damaged = tmp_path / "checkpoint" / "checkpoints" / "1"
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text(json.dumps([]))
    return tmp_path


FEATURES = ["--checkpoint", "nowhere", "--images", "pictures", "--out", "f.npz"]
PREDICT = ["--checkpoint", "nowhere", "--images", "pictures", "--out", "answers"]
EXPLORE = ["--checkpoint", "nowhere", "--images", "pictures", "--out", "e.html"]
EXPORT = ["--checkpoint", "nowhere", "--dst", "m.stablehlo"]
SEGMENT = ["--checkpoint", "nowhere", "--labeled", "pictures", "--images", "pictures", "--out", "answers"]
WORTH = ["--config", "run.py", "--imported", "nowhere", "--continued", "nowhere", "--out", "w"]
SWEEP = ["--config", "run.py", "--grid", "total=1 steps,2 steps", "--out", "sweep"]
MISTAKES: list[tuple[str, list[str], str]] = [
    ("table", ["missing_run"], "no missing_run: a run writes it when an evaluator"),
    # files that are not there, or are not what they should be
    ("features", FEATURES, "nowhere"),
    ("features", [*FEATURES[:1], "empty", *FEATURES[2:]], "empty"),
    ("features", [*FEATURES[:1], "checkpoint", *FEATURES[2:]], "checkpoint"),
    ("features", [*FEATURES[:1], "text.txt", *FEATURES[2:]], "text.txt"),
    ("features", [*FEATURES[:3], "empty", *FEATURES[4:]], "no images below empty"),
    ("features", [*FEATURES[:3], "text.txt", *FEATURES[4:]], "no folder"),
    ("features", [*FEATURES[:5], "f.csv"], ".npz or .safetensors"),
    ("features", [*FEATURES[:5], "none/f.npz"], "the folder none does not exist"),
    ("explore", EXPLORE, "nowhere"),
    ("explore", [*EXPLORE[:1], "checkpoint", *EXPLORE[2:]], "checkpoint"),
    ("explore", [*EXPLORE[:3], "none", *EXPLORE[4:]], "--images is 'none', which does not exist"),
    ("explore", [*EXPLORE[:5], "none/e.html"], "the folder none does not exist"),
    ("explore", [*EXPLORE, "--port", "8000"], "--port is of the server and --out writes a page instead"),
    ("explore", [*EXPLORE[:4], "--budgets", "0.5"], "--budgets is of a page that is written"),
    ("export", EXPORT, "nowhere"),
    ("export", [*EXPORT[:1], "checkpoint", *EXPORT[2:]], "checkpoint"),
    ("export", [*EXPORT[:3], "m.bin"], "its suffix says the format: .stablehlo or .onnx"),
    ("export", [*EXPORT[:3], "none/m.stablehlo"], "the folder none does not exist"),
    ("push", ["--folder", "nowhere", "--repo", "me/x"], "--folder is 'nowhere', which is no folder"),
    ("push", ["--folder", "empty", "--repo", "me/x"], "--folder is 'empty', which holds no files"),
    ("push", ["--folder", "pictures", "--repo", "https://hub/me/x"], "--repo is 'https://hub/me/x'; give NAME, or OWNER/NAME"),
    ("pull", ["--repo", "a b", "--dst", "new"], "--repo is 'a b'; give NAME, or OWNER/NAME"),
    ("pull", ["--repo", "me/x", "--dst", "pictures"], "--dst is 'pictures', which is there already: give a new folder"),
    ("predict", PREDICT, "nowhere"),
    ("predict", [*PREDICT[:1], "checkpoint", *PREDICT[2:]], "checkpoint"),
    ("predict", [*PREDICT[:3], "empty", *PREDICT[4:]], "no images below empty"),
    ("predict", [*PREDICT[:3], "text.txt", *PREDICT[4:]], "no folder"),
    ("predict", [*PREDICT[:5], "runs"], "--out is 'runs', which is there already: give a new folder"),
    ("predict", [*PREDICT[:5], "text.txt"], "--out is 'text.txt', which is there already"),
    ("segment", SEGMENT, "pictures/semseg is no folder: photos belong in DIR/rgb/"),
    ("segment", [*SEGMENT[:3], "empty", *SEGMENT[4:]], "empty/rgb is no folder"),
    ("segment", [*SEGMENT[:7], "runs"], "--out is 'runs', which is there already: give a new folder"),
    ("segment", [*SEGMENT, "--classes", "none.txt"], "none.txt: No such file"),
    ("worth", WORTH, "run.py does not say what runs are judged by: set config.best.figure"),
    ("worth", [*WORTH[:1], "nowhere.py", *WORTH[2:]], "the config file nowhere.py does not exist"),
    ("worth", [*WORTH, "--config.best.figure=knn/top1"], "nowhere"),
    ("data", ["pictures", "--out", "runs"], "--out is 'runs', which is there already: give a new folder"),
    ("report", ["attention", "--checkpoint", "nowhere", "--images", "pictures", "--out", "a.html"], "nowhere"),
    ("report", ["attention", "--checkpoint", "nowhere", "--images", "empty", "--out", "a.html"], "no images below empty"),
    ("report", ["attention", "--checkpoint", "nowhere", "--images", "pictures", "--out", "empty"], "--out is 'empty', which is a folder"),
    ("report", ["decoder", "--checkpoint", "checkpoint", "--images", "pictures", "--out", "a.html"], "checkpoint"),
    ("report", ["rows", "--checkpoint", "empty", "--data_dir", "empty"], "empty"),
    ("report", ["compare", "nowhere", "--out", "a.html"], "nowhere holds no run"),
    ("report", ["compare", "runs/broken", "--out", "a.html"], "runs/broken"),
    ("report", ["compare", "runs/list", "--out", "a.html"], "runs/list"),
    ("report", ["compare", "runs/blank", "--out", "a.html"], "runs/blank"),
    ("report", ["compare", "runs/blank", "--baseline", "x", "--out", "a.html"], "--baseline is 'x'"),
    ("report", ["masks", "--config", "nowhere.py", "--out", "a.html"], "the config file nowhere.py does not exist"),
    ("report", ["masks", "--config", "syntax.py", "--out", "a.html"], "syntax.py:1"),
    ("report", ["masks", "--config", "cells.py", "--out", "a.html"], "cell 'b' of cells.py sets 'seed.x'"),
    ("report", ["masks", "--config", "run.py", "--strategies", "x", "--out", "a.html"], "it has no get_sweep()"),
    ("report", ["masks", "--config", "run.py", "--strategies", "nowhere.py", "--out", "a.html"], "nowhere.py does not exist"),
    ("report", ["masks", "--config", "run.py", "--out", "a.html"], "no prepared data set"),
    ("report", ["guidance", "--config", "run.py", "--maps", "a=nowhere", "--out", "a.html"], "no strategy can be shown"),
    ("plan", ["--config", "run.py", "--devices", "h300"], "--devices is 'h300'; known: "),
    ("plan", ["--config", "run.py", "--devices", "cpu", "--against", "nowhere"], "nowhere"),
    ("plan", ["--config", "run.py", "--devices", "cpu", "--grid", "optimzer.base_lr=1,2"], "config has unknown key 'optimzer'; known"),
    ("plan", ["--config", "run.py", "--devices", "cpu", "--batch", "0"], "argument --batch: 0 must be at least 1"),
    ("sweep", ["--config", "nowhere.py", "--out", "s"], "does not exist"),
    ("sweep", ["--config", "empty", "--out", "s"], "is a folder"),
    ("sweep", ["--config", "syntax.py", "--out", "s"], "syntax.py:1"),
    ("sweep", ["--config", "nothing.py", "--out", "s"], "defines no function get_config()"),
    ("sweep", ["--config", "raises.py", "--out", "s"], "raises.py:2: NameError"),
    ("sweep", ["--config", "run.py", "--out", "s"], "nothing to sweep"),
    ("sweep", ["--config", "cells.py", "--out", "s"], "seed.x"),
    ("sweep", ["--config", "run.py", "--grid", "total", "--out", "s"], "--grid 'total' is not of the form"),
    ("sweep", ["--config", "run.py", "--grid", "objective.nam=a", "--out", "s"], "config.objective has unknown key 'nam'; known: inputs"),
    ("sweep", ["--config", "run.py", "--grid", "global_batch=a,1.5", "--out", "s"], "2 mistakes"),
    ("sweep", SWEEP, "result.json is damaged"),
    ("sweep", [*SWEEP[:5], "text.txt"], "text.txt"),
    ("sweep", [*SWEEP[:5], "s"], "no prepared data set"),
    ("maps", ["--config", "nowhere.py"], "does not exist"),
    ("maps", ["--config", "syntax.py"], "syntax.py:1"),
    ("maps", ["--config", "maps.py"], "nowhere"),
    ("maps", ["--config", "maps.py", "--config.sauce.name=x"], "config has unknown key 'sauce'; known: data"),
    ("maps", ["--config", "maps.py", "--config.source.name=x"], "config.source.name is 'x'; known: self_attention"),
    ("maps", ["--config", "maps.py", "--config.batch_size=x"], "config.batch_size is 'x'; it must be a whole number"),
    ("maps", ["--config", "maps.py", "--config.batch_size.x=1"], "not a block"),
    ("init", ["nowhere"], "there is no folder nowhere"),
    ("init", ["empty"], "expected"),
    ("init", ["text.txt"], "there is no folder text.txt"),
    ("data", ["folder", "--root", "nowhere", "--name", "x", "--data_dir", "d"], "nowhere"),
    ("data", ["folder", "--root", "pictures", "--name", "x y", "--data_dir", "d", "--modalities", "rgb"], "'x y'"),
    ("data", ["folder", "--root", "pictures", "--name", "x", "--data_dir", "text.txt", "--modalities", "rgb"], "text.txt"),
    ("data", ["check", "--config", "nowhere.py"], "the config file nowhere.py does not exist"),
    ("data", ["check", "--config", "run.py", "--out", "none/a.png"], "the folder none does not exist"),
    ("data", ["check", "--config", "run.py"], "no prepared data set"),
    ("data", ["pseudolabel", "--root", "nowhere", "--depth", "x"], "no folder"),
    ("data", ["pseudolabel", "--root", "pictures"], "give --depth MODEL, --semseg MODEL, or both"),
    ("data", ["imagenet", "--root", "nowhere", "--data_dir", "d"], "no folder"),
    ("bench", ["loader", "--data-dir", "nowhere"], "nowhere"),
    ("bench", ["guidance", "--no-time", "--checkpoint", "nowhere", "--images", "pictures", "--learn-from", "pictures"], "nowhere"),
    ("bench", ["guidance", "--no-time", "--scenes", "nowhere.pth"], "nowhere.pth"),
    ("bench", ["--cpu-threads", "100000"], "--cpu-threads 100000"),
    ("bench", ["--image", "30", "--no-torch"], "30"),
    ("bench", ["--out", "text.txt", "guidance", "--no-time"], "text.txt"),
    ("demo", ["--workdir", "text.txt"], "--workdir is 'text.txt', which cannot be made a folder"),
]


def started(main: Callable[[], int | None]) -> tuple[int, str]:
    """(exit status, standard error)."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main() or 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
    return status, error.getvalue()


@pytest.mark.parametrize(("command", "arguments", "message"), MISTAKES, ids=[f"{c} {' '.join(a)}"[:90] for c, a, _ in MISTAKES])
def test_a_mistake_is_one_line(command, arguments, message, here):
    before = sorted(str(path) for path in here.rglob("*"))
    status, error = started(lambda: MAINS[command](arguments))
    assert status == 2 and error.count("error: ") == 1 and "Traceback" not in error and "fault of maskvit" not in error, error
    line, *more = error[error.index("error: ") :].splitlines()
    assert message in error, error
    # A list has a heading and its items; checkpoints that are all damaged are one too, with what to do below it.
    assert not more or line.endswith(":") and all(text.startswith("  ") for text in more[: -1 if "checkpoints" in line else None]), error
    made = {path for path in map(str, here.rglob("*")) if path not in before}
    assert not [path for path in made if os.path.splitext(path)[1] in (".html", ".npz", ".json")]


ARGPARSE = [
    ("features", [*FEATURES, "--crop", "0"], "--crop: 0 must be above 0 and at most 1"),
    ("features", [*FEATURES, "--crop", "nan"], "--crop: nan must be"),
    ("features", [*FEATURES, "--batch_size", "many"], "--batch_size: 'many' is no whole number"),
    ("features", FEATURES[2:], "--checkpoint"),
    ("predict", [*PREDICT, "--crop", "2"], "--crop: 2 must be above 0 and at most 1; or give pad or none"),
    ("predict", [*PREDICT, "--crop", "whole"], "--crop: 'whole' is no number; or give pad or none"),
    ("predict", [*PREDICT, "--weights", "best"], "--weights"),
    ("predict", [*PREDICT, "--top", "0"], "--top: 0 must be at least 1"),
    ("report", ["masks", "--config", "run.py", "--images", "0", "--out", "a.html"], "--images: 0 must be at least 1"),
    ("report", ["guidance", "--config", "run.py", "--tau", "-1", "--out", "a.html"], "--tau"),
    ("report", ["rows", "--checkpoint", "x", "--data_dir", "x", "--limit", "-3"], "--limit: -3 must be at least 1"),
    ("report", ["pie"], "invalid choice: 'pie'"),
    ("sweep", [*SWEEP, "--seeds", "0"], "--seeds: 0 must be at least 1"),
    ("bench", ["--batch", "8,x"], "--batch: 'x' is no whole number"),
    ("bench", ["--size", "Q"], "invalid choice: 'Q'"),
    ("bench", ["--steps", "0"], "--steps: 0 must be at least 1"),
    ("init", ["pictures", "--image_size", "0"], "--image_size: 0 must be at least 1"),
    ("maps", [], "--config"),
    ("data", ["folder"], "--root"),
]


@pytest.mark.parametrize(("command", "arguments", "message"), ARGPARSE, ids=[f"{c} {' '.join(a)}"[:90] for c, a, _ in ARGPARSE])
def test_wrong_flags_are_named_with_the_usage(command, arguments, message, here):
    status, error = started(lambda: MAINS[command](arguments))
    assert status == 2 and message in error and error.startswith("usage: ") and "Traceback" not in error


@pytest.mark.parametrize("command", MAINS)
def test_debug_shows_where(command, here):
    """The traceback of the first mistake above."""
    arguments = next(arguments for name, arguments, _ in MISTAKES if name == command)
    with pytest.raises(Exception) as error, contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        MAINS[command]([*arguments, "--debug"])
    assert not isinstance(error.value, SystemExit)


RUN = ["--config=run.py", "--workdir=w"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "2 mistakes:\n  - the flag --config is missing\n  - the flag --workdir is missing"),
        (RUN[:1], "the flag --workdir is missing"),
        (["--config=nowhere.py", RUN[1]], "the config file nowhere.py does not exist"),
        (["--config=syntax.py", RUN[1]], "syntax.py:1"),
        (["--config=nothing.py", RUN[1]], "nothing.py defines no function get_config()"),
        (["--config=raises.py", RUN[1]], "raises.py:2: NameError"),
        ([*RUN, "--wokdir=x"], "Unknown command line flag 'wokdir'"),
        ([*RUN, "--num_processes=many"], "--num_processes=many"),
        ([*RUN, "stray"], "unknown argument 'stray'"),
        ([*RUN, "--config.modalities.rbg.patch=4"], "config.modalities has no 'rbg'; it has: depth, rgb, semseg"),
        ([*RUN, "--config.totl=4"], "config has unknown key 'totl'; known: total"),
        ([*RUN, "--config.global_batch=a", "--config.seed=b"], "2 mistakes:\n"),
        ([*RUN, "--config.total=ten", "--config.data.wokers=1"], "config.data has unknown key 'wokers'; known: train"),
        (RUN, "no prepared data set 'scenes'"),
    ],
)
def test_mistakes_at_main(arguments: list[str], message: str, here):
    child = subprocess.run([sys.executable, str(ROOT / "main.py"), *arguments], capture_output=True, text=True, cwd=here, check=False)
    lines = child.stderr.splitlines()
    assert child.returncode == 2 and message in child.stderr and "Traceback" not in child.stderr, child.stderr
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert all(line.startswith("  - ") for line in lines[1 + next(i for i, line in enumerate(lines) if line.startswith("error: ")) :])
    assert not list((here / "w").rglob("*.jsonl"))


@pytest.mark.parametrize(
    "start", [["-m", "maskvit", "train"], ["-c", "import sys; from maskvit.__main__ import script; sys.exit(script())", "train"]]
)
def test_train_by_its_other_names(start, here):
    """`python -m maskvit train` and the console script: the same mistakes, the same flags."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, cwd=here, env=environment, check=False)

    child = run(RUN[0])
    assert (child.returncode, child.stderr) == (2, "error: the flag --workdir is missing\n")
    shown = run("--help")
    assert "--workdir" in shown.stdout and "Train, continue or evaluate" in shown.stdout and not shown.stderr


def test_convert_by_its_other_name(here, capsys):
    assert main(["convert", "--src", "nowhere.pth"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 2 mistakes:") and "nowhere.pth: no such file" in error


def test_main_shows_tracebacks_and_help_when_asked(here: Any):
    def start(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(ROOT / "main.py"), *arguments], capture_output=True, text=True, cwd=here, check=False)

    assert "Traceback" in start("--config=nowhere.py", "--workdir=w", "--debug").stderr
    shown = start("--help")
    assert "--workdir" in shown.stdout and "Traceback" not in shown.stderr


def test_errors_of_our_own_are_told_without_their_type():
    """Each exception class of the package was made to tell a person something."""
    found = []
    for path in sorted((ROOT / "maskvit").rglob("*.py")):
        for name in re.findall(r"^class (\w+Error|Mistakes)\(", path.read_text(), re.MULTILINE):
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
            found.append(getattr(module, name))
    found = [error for error in found if issubclass(error, Exception)]  # some guidance is called an error, and is one of the model
    assert len(found) >= 6
    assert not [error.__name__ for error in found if not issubclass(error, EXPECTED)]
