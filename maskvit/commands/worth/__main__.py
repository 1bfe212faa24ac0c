"""Was continuing the pretraining worth it? Three fine-tunings at the same budget on your labels, and one page.

    python -m maskvit worth --config configs/finetune/own_classes.py --imported checkpoints/multimae_b --continued runs/continued \
        --seeds 3 --out runs/worth --config.data.train.name=photos --config.objective.task.num_classes=12

The fine-tuning of --config runs once per seed from scratch, from the imported checkpoint as it was and from the one that continued its
pretraining: same data, steps and settings. `config.best.figure` is what the runs are judged by, at their last evaluation. OUT/index.html
states the difference with its interval in its first sentence. OUT/CELL/seed_N are the runs, OUT/sweep.html their tables. What is finished
is skipped: the same command resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskvit.checkpoints import find_checkpoint, manifest_digest
from maskvit.commands.report.compare import read_run
from maskvit.commands.sweep.__main__ import run_cells
from maskvit.commands.sweep.cells import Experiment
from maskvit.commands.sweep.runs import make_runs, write
from maskvit.commands.worth.judged import differing, examples, has_classes, judge
from maskvit.commands.worth.page import (
    CONTINUED,
    IMPORTED,
    SCRATCH,
    Figures,
    class_section,
    curve_section,
    example_section,
    result_section,
    sentence,
    worth_page,
)
from maskvit.core.arguments import make_folder, whole
from maskvit.core.config_files import apply_overrides, load_config, split_overrides
from maskvit.core.errors import add_debug, run_command
from maskvit.features import load
from maskvit.plots import page
from maskvit.training.config import check_config, experiment
from maskvit.training.parts import Parts, build_parts, learned_classes
from maskvit.training.start import start_params

ABOUT = "worth.json"  # in the folder of the runs: which checkpoints they compare
SHOWN = {False: 8, True: 3}  # examples of each kind on the page, of pictures and of pixels


def worth(
    config: str, imported: str, continued: str, seeds: int, out: Path, overrides: Sequence[tuple[str, str]] = (), command: str = ""
) -> int:
    """Run what is not finished, and write the page."""
    base = fine_tuning(config, overrides)
    found = {IMPORTED: find_checkpoint(imported), CONTINUED: find_checkpoint(continued)}
    digests = {name: manifest_digest(path) for name, path in found.items()}
    if digests[IMPORTED] == digests[CONTINUED]:
        raise ValueError(f"--imported and --continued are the same checkpoint: {found[IMPORTED]}")
    about: dict[str, Any] = dict(config=config, imported=str(found[IMPORTED]), continued=str(found[CONTINUED]), digests=digests)
    cells = make_cells(base, found)
    parts = {name: check_start(base, str(path)) for name, path in found.items()}[CONTINUED]
    make_runs(Experiment(base, cells), cells, seeds, out)  # finished runs of another config are told here
    _check_same(out, about)
    make_folder(out)
    write(out / ABOUT, json.dumps(about, indent=1))
    run_cells(Experiment(base, cells), cells, seeds, out, baseline=SCRATCH, command=command)

    runs = make_runs(Experiment(base, cells), cells, seeds, out)
    results = {(run.cell, run.seed): run.result() for run in runs}
    name = base["best"]["figure"]
    sound = {key: result["final"] for key, result in results.items() if result and not result["failed"]}
    values = {cell: {seed: final[name] for (of, seed), final in sound.items() if of == cell and name in final} for cell in cells}
    figures = Figures(name, base["best"].get("mode", "max") == "max", values, parts.total_steps)
    failed = [f"{cell} seed {seed}" for (cell, seed), result in results.items() if result and result["failed"]]
    folders = {cell: {run.seed: run.folder for run in runs if run.cell == cell and run.seed in values[cell]} for cell in cells}
    sections = [result_section(figures, failed)]
    sections.append(curve_section(figures, {cell: [read_run(path) for path in some.values()] for cell, some in folders.items()}))
    sections += _judged_sections(parts.evaluators[name.partition("/")[0]], folders)
    about["digests"] = ", ".join(f"{name} {digest}" for name, digest in digests.items())
    about |= {"seeds": seeds, "steps": parts.total_steps, "changed for scratch": cells[SCRATCH]}
    write(out / "index.html", worth_page(figures, sections, about, command))
    print(sentence(figures))
    print(f"open {out / 'index.html'}")
    return 0


def fine_tuning(config: str, overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The config of all runs. Raises ValueError unless it names the figure that runs are judged by.

    Patience and margin of `config.best` are left out: runs that end early would not have the same budget.
    """
    given = load_config(config)
    apply_overrides(given, overrides)
    base = given.copy_and_resolve_references().to_dict()
    best = base.get("best") or {}
    if not best.get("figure"):
        raise ValueError(f"{config} does not say what runs are judged by: set config.best.figure, such as accuracy/top1")
    if "init_from" not in base:
        raise ValueError(f"{config} has no block init_from: give a config of fine-tuning, such as configs/finetune/own_classes.py")
    return base | dict(best={key: value for key, value in best.items() if key in ("figure", "mode")})


def make_cells(base: Mapping[str, Any], found: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """The three cells. Without pretrained weights the rates of all blocks are equal: low ones keep what is there."""
    scratch: dict[str, Any] = {"init_from.path": ""}
    if base["optimizer"].get("layer_decay", 1.0) != 1.0:
        scratch["optimizer.layer_decay"] = 1.0
    return {
        SCRATCH: scratch,
        IMPORTED: {"init_from.path": str(found[IMPORTED]), "against": SCRATCH},
        CONTINUED: {"init_from.path": str(found[CONTINUED]), "against": IMPORTED},
    }


def check_start(base: Mapping[str, Any], path: str) -> Parts:
    """The parts of a run that begins with `path`. Raises where its data or that checkpoint do not fit, before anything is trained."""
    config = {**base, "init_from": {**base["init_from"], "path": path}}
    check_config(config)
    parts = build_parts(experiment(**config), None)
    start_params(parts.objective, 0, parts.init_from, learned_classes(parts))
    return parts


def _check_same(out: Path, about: Mapping[str, Any]) -> None:
    """Raise ValueError where the folder compares other checkpoints: their runs would be taken for these."""
    path = out / ABOUT
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text())
        digests = before["digests"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): give a new --out") from error
    for name, digest in about["digests"].items():
        if digests.get(name) != digest:
            raise ValueError(f"{out} compares another {name} checkpoint, {before.get(name)}, not {about[name]}: give a new --out")


def _judged_sections(evaluator: Any, folders: Mapping[str, Mapping[int, Path]]) -> list[page.Section]:
    """Classes, and examples of the first seed that all have; none where the task has no classes."""
    common = sorted(set.intersection(*(set(some) for some in folders.values())))
    if not has_classes(evaluator) or not common:
        return []
    judged = {cell: [judge(some[seed], evaluator) for seed in common] for cell, some in folders.items()}
    pair = {cell: folders[cell][common[0]] for cell in (IMPORTED, CONTINUED)}
    loaded = load(pair[CONTINUED])
    names, of_pixels = loaded.class_names, bool(evaluator.target)
    before, after = (judged[cell][0].right for cell in (IMPORTED, CONTINUED))
    places = [differing(*sides, SHOWN[of_pixels]) for sides in ((after, before), (before, after))]
    counts = int(np.sum(after > before)), int(np.sum(before > after))
    shown = examples(pair, evaluator, [*places[0], *places[1]])
    split = len(places[0])
    spec = loaded.model.modality(evaluator.inputs[0])
    return [
        class_section(judged, names, of_pixels),
        example_section(shown[:split], shown[split:], counts, common[0], names, spec, of_pixels),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 2 where nothing could be done."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m maskvit worth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file of the fine-tuning; --config.key=value changes a key")
    parser.add_argument("--imported", required=True, help="the checkpoint as it was imported")
    parser.add_argument("--continued", required=True, help="the run that continued its pretraining, or one of its checkpoints")
    parser.add_argument("--seeds", type=whole(), default=3, help="runs from each beginning (3)")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs and the page; the same command again goes on there")
    add_debug(parser)

    def command() -> int:
        others, overrides = split_overrides(words)
        arguments = vars(parser.parse_args(others))
        arguments.pop("debug")
        return worth(**arguments, overrides=overrides, command=" ".join(["python -m maskvit worth", *words]))

    return run_command(command, "--debug" in words)


if __name__ == "__main__":
    sys.exit(main())
