"""Runs that fine-tune: from a pretrained run to figures of the task, killed and resumed; and data that do not fit the task."""

from __future__ import annotations

import json
import shutil
from typing import Any

import jax
import numpy as np
import pytest

import maskvit
from maskvit import convert
from maskvit.checkpoints import load_objective_state, load_params, save_imported
from maskvit.core.modalities import parse_modalities
from maskvit.core.types import tree_paths
from maskvit.data import open_source
from maskvit.data.batches import train_batches
from maskvit.data.scenes import CLASS_NAMES, KIND_NAMES
from maskvit.data.sources import ListSource
from maskvit.evaluators import reading
from maskvit.objectives import build_objective
from maskvit.training import parts, setup
from tests.runs import make_scenes, same_params, small_run
from tests.tiny import fresh_params

pytestmark = pytest.mark.usefixtures("shared_steps", "one_device")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"))


def fine_tuning(data_dir: str, **changes: Any) -> dict[str, Any]:
    """Everything at once that keeps something from step to step: averaged weights, running statistics, mixing, stochastic depth."""
    base = small_run(data_dir)
    return base | dict(
        total="4 steps", checkpoint=dict(every="2 steps", keep=9), micro_batch=4, log_every=1,
        modalities=dict(rgb=base["modalities"]["rgb"]),
        objective=dict(
            name="supervised", encoder=base["objective"]["encoder"], head=dict(name="probe", source="mean"), drop_path=0.1, ema_decay=0.9,
            task=dict(name="classification", num_classes=12, mixup=0.8, cutmix=1.0, smoothing=0.1),
        ),
        optimizer=dict(base_lr=0.03, layer_decay=0.75, b2=0.999),
        evaluators=dict(accuracy=dict(type="classification", every="2 steps", batch_size=5)),
    ) | changes  # fmt: skip


def test_a_run_that_fine_tunes_is_resumed_bit_for_bit(data_dir, tmp_path):
    setup.train(str(tmp_path / "pretrained"), **small_run(data_dir, total="1 steps", checkpoint=dict(every="1 steps", keep=1)))
    config = fine_tuning(data_dir, init_from=dict(path=str(tmp_path / "pretrained")))
    setup.train(str(tmp_path / "whole"), **config)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "4")
    setup.train(str(tmp_path / "stopped"), **config)
    assert same_params(tmp_path / "whole", tmp_path / "stopped")
    one, two = (tree_paths(load_objective_state(tmp_path / name)) for name in ("whole", "stopped"))
    assert {name.partition("/")[0] for name in one} == {"ema", "statistics"}
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)
    rows = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    figures = [row for row in rows if "accuracy/top1" in row]
    assert [row["step"] for row in figures] == [2, 4] and "accuracy/ema/top5" in figures[0]
    assert (tmp_path / "stopped" / "pictures" / "accuracy_confusion_00000004.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_classes=10), "num_classes is 10, but the data have 12 classes .* Set it to 12"),
        (dict(num_classes=1000), "num_classes is 1000, but the data have 12 classes"),
    ],
)
def test_classes_that_are_not_the_datas(changes, message, data_dir, tmp_path):
    config = fine_tuning(data_dir)
    config["objective"]["task"] |= changes
    with pytest.raises(ValueError, match=message):
        setup.train(str(tmp_path), **config)


def test_the_licence_of_the_weights_that_a_run_starts_from(data_dir, tmp_path, caplog):
    """It stands in the run's checkpoints and in the card of its folder for timm, also where what it started from is gone."""
    config = fine_tuning(data_dir, total="1 steps", checkpoint=dict(every="1 steps", keep=9), evaluators={})
    config["objective"] |= dict(head=dict(name="linear"), pool="mean", ema_decay=None, drop_path=0.0)
    pretrained = {key: small_run(data_dir)[key] for key in ("modalities", "image_size", "objective")}
    source = dict(file="public.pth", sha256="ab12", family="MultiMAE")
    params = jax.device_get(fresh_params(build_objective(pretrained)))
    save_imported(tmp_path / "imported", params, dict(config=pretrained, source=source, licence="CC-BY-NC 4.0"))
    config["init_from"] = dict(path=str(tmp_path / "imported"))
    with caplog.at_level("INFO", "maskvit"):
        setup.train(str(tmp_path / "run"), **config)
    assert "licence     CC-BY-NC 4.0" in caplog.text
    shutil.rmtree(tmp_path / "imported")
    resumed = setup.setup(config | dict(total="1 steps"), str(tmp_path / "run"))
    resumed.closing.close()
    for metadata in (load_params(tmp_path / "run")[1], resumed.metadata):
        assert metadata["licence"] == "CC-BY-NC 4.0" and metadata["started_from"]["source"] == source
    convert.export(tmp_path / "run", tmp_path / "folder", "timm")
    assert "license: cc-by-nc-4.0" in (tmp_path / "folder" / "README.md").read_text()


class Renamed:
    """A source whose first class of pictures and second of pixels have other names."""

    def __init__(self, source):
        self.source = source
        self.label_names = ("other", *source.label_names[1:])
        self.pixel_classes = {key: (names[0], "other", *names[2:]) for key, names in source.pixel_classes.items()}

    def __getattr__(self, name):
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]


def test_a_run_keeps_the_names_of_its_classes(data_dir, tmp_path, monkeypatch):
    """Its checkpoints name them; it is neither resumed nor evaluated on others, nor is its head taken over for others."""
    config = fine_tuning(data_dir, total="1 steps", evaluators={}, checkpoint=dict(every="1 steps", keep=1))
    setup.train(str(tmp_path / "run"), **config)
    names = load_params(tmp_path / "run")[1]["label_names"]
    assert names == list(KIND_NAMES) and maskvit.load(tmp_path / "run").class_names == KIND_NAMES

    again = config | dict(init_from=dict(path=str(tmp_path / "run")))
    setup.setup(again, str(tmp_path / "same")).closing.close()
    evaluated = config | dict(evaluators=dict(accuracy=dict(type="classification", batch_size=4)))
    monkeypatch.setattr(reading, "open_source", lambda *args, **kwargs: Renamed(open_source(*args, **kwargs)))
    with pytest.raises(ValueError, match=f"config.evaluators.accuracy: class 0 of its data is 'other', but the run learns '{names[0]}'"):
        setup.setup(evaluated, str(tmp_path / "evaluated"))
    monkeypatch.setattr(parts, "open_source", lambda *args, **kwargs: Renamed(open_source(*args, **kwargs)))
    with pytest.raises(ValueError, match=f"class 0 of the data is 'other'; it was '{names[0]}' when the checkpoint was written"):
        setup.setup(config | dict(total="2 steps"), str(tmp_path / "run"))
    with pytest.raises(ValueError, match=rf"its class 0 is '{names[0]}', and that of the data 'other': .*fresh = \('probe/\.\*',\)"):
        setup.setup(again, str(tmp_path / "other"))
    again["init_from"]["fresh"] = ("probe/.*",)
    setup.setup(again, str(tmp_path / "fresh")).closing.close()


def test_a_run_keeps_the_names_of_its_pixel_classes(data_dir, tmp_path, monkeypatch):
    specs = small_run(data_dir)["modalities"]
    objective = dict(name="supervised", encoder=dict(width=24, depth=1, heads=2), head=dict(name="linear", norm="none"))
    config = fine_tuning(
        data_dir, modalities=dict(rgb=specs["rgb"], semseg=dict(specs["semseg"], patch=8, stride=1)),
        objective=objective | dict(task=dict(name="segmentation", target="semseg")),
        evaluators=dict(miou=dict(type="segmentation", batch_size=4)),
    )  # fmt: skip
    run = setup.setup(config, str(tmp_path / "run"))
    run.closing.close()
    assert run.metadata["label_names"] == list(CLASS_NAMES)
    monkeypatch.setattr(reading, "open_source", lambda *args, **kwargs: Renamed(open_source(*args, **kwargs)))
    with pytest.raises(ValueError, match="config.evaluators.miou: class 1 of its data is 'other', but the run learns 'ground'"):
        setup.setup(config, str(tmp_path / "evaluated"))


def test_data_without_labels(data_dir, tmp_path):
    config = fine_tuning(data_dir)
    config["data"]["train"]["label"] = None
    with pytest.raises(ValueError, match="needs labels, but the data have none"):
        setup.train(str(tmp_path), **config)


def test_labels_out_of_range_are_bad_records():
    """Of data that name no classes: they are replaced like other bad records, and too many of them end the run."""
    picture = np.zeros((8, 8, 3), np.uint8)
    source = ListSource([dict(rgb=picture, label=7 if i % 2 else 1) for i in range(40)])
    specs = parse_modalities(dict(rgb=dict(patch=8)))
    with train_batches(source, specs, (8, 8), seed=0, global_batch=8, num_classes=5) as batches:
        with pytest.raises(RuntimeError, match="label 7 is none of the 5 classes of config.objective.task.num_classes"):
            for _ in range(20):
                assert (next(batches)["label"] == 1).all()
