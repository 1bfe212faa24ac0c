"""A converted checkpoint as the start of a run: other classes, other modalities, other sizes, imported optimizer."""

from __future__ import annotations

import json

import numpy as np
import pytest

from maskvit import convert
from maskvit.checkpoints import CheckpointError, load_params
from maskvit.core.types import tree_paths
from maskvit.training import setup
from tests.runs import make_scenes, small_run

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def imported(tmp_path_factory, fixtures):
    directory = tmp_path_factory.mktemp("imported")
    convert.convert(fixtures / "multimae_tiny_training.pth", directory / "ours", num_heads=3)
    return str(directory / "ours")


def matching(data_dir, imported, *outputs):
    """A run of the file's sizes with these of its four outputs (two compile in half the time), and patterns that drop the others."""
    dropped = tuple(f"outputs/{name}/.*" for name in ("rgb", "depth", "semseg", "norm_rgb") if name not in outputs)
    config = small_run(data_dir, init_from=dict(path=imported, drop=dropped), total="1 steps")
    config["objective"]["encoder"] = dict(width=48, depth=3, heads=3)
    config["objective"]["outputs"] = outputs
    config["objective"]["decoder"] = dict(width=16, depth=2, heads=4)
    for fields in config["modalities"].values():
        fields["patch"] = 8
    config["modalities"]["semseg"]["embed_dim"] = 8
    return config


def test_forty_classes(data_dir, imported, tmp_path):
    config = matching(data_dir, imported, "rgb", "semseg")
    config["modalities"]["semseg"]["num_classes"] = 14  # the file's model knows 7
    with pytest.raises(CheckpointError, match="inputs/semseg/class_embed"):
        setup.train(str(tmp_path / "a"), **config)
    config["init_from"]["fresh"] = ("inputs/semseg/class_embed", "outputs/semseg/head/.*")
    config["schedule"] = dict(total_epochs=100.0, warmup_epochs=1.0)  # first step at lr 0: parameters stay as loaded
    setup.train(str(tmp_path / "b"), **config)
    loaded, source = tree_paths(load_params(tmp_path / "b")[0]), tree_paths(load_params(imported)[0])
    assert loaded["inputs/semseg/class_embed"].shape == (14, 8)
    same = [k for k in loaded if k in source and loaded[k].shape == source[k].shape and np.array_equal(loaded[k], source[k])]
    assert len(loaded) - len(same) == 3


def test_rgb_and_depth_only(data_dir, imported, tmp_path):
    config = matching(data_dir, imported, "rgb", "depth")
    del config["modalities"]["semseg"]
    config["objective"] |= dict(inputs=("rgb", "depth"))
    with pytest.raises(CheckpointError, match="semseg"):
        setup.train(str(tmp_path / "a"), **config)
    config["init_from"]["drop"] += ("inputs/semseg/.*", "outputs/.*/modality_embed/semseg")
    assert int(setup.train(str(tmp_path / "b"), **config).step) == 1


def test_moments_and_epoch_come_along(data_dir, imported, tmp_path):
    config = matching(data_dir, imported, "rgb")
    config["objective"] |= dict(inputs=("rgb", "depth", "semseg"))
    config["data"]["train"] = dict(config["data"]["train"])
    config["modalities"]["semseg"]["num_classes"] = 14
    config["schedule"] = dict(total_epochs=1700.0, start_epochs=None, warmup_epochs=40.0)
    config["init_from"]["fresh"] = ("inputs/semseg/class_embed",)
    setup.train(str(tmp_path / "a"), **config)
    row = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[0])
    peak, place = 3.2e-3 * 8 / 256, (1600 - 40) / (1700 - 40)
    assert row["learning_rate"] == pytest.approx(0.5 * peak * (1 + np.cos(np.pi * place)), rel=1e-4)
