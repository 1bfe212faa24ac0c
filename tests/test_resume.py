"""A run that the first version of maskvit left behind is resumed by this one, and computes what that version computed."""

from __future__ import annotations

import json
import shutil
import tarfile

import jax
import numpy as np
import pytest

from maskvit.checkpoints import find_checkpoint, verify
from maskvit.core.types import tree_paths
from maskvit.training import setup
from tests.runs import make_scenes


@pytest.fixture
def old_run(tmp_path, fixtures):
    """The workdir of a run stopped after step 2 of 3, its config, and the parameters that its own version had after step 3."""
    workdir = tmp_path / "run"
    with tarfile.open(fixtures / "run_of_first_version.tar.xz") as archive:
        archive.extractall(workdir, filter="data")
    config = json.loads((workdir / "checkpoints" / "2" / "metadata" / "metadata").read_text())["config"]
    config["image_size"] = tuple(config["image_size"])  # JSON has lists
    config["data"]["train"]["data_dir"] = make_scenes(tmp_path / "data")
    return workdir, config, dict(np.load(workdir / "step_3.npz"))


def test_a_run_of_the_first_version_is_resumed(old_run, caplog):
    workdir, config, expected = old_run
    assert verify(find_checkpoint(workdir)) == []
    with caplog.at_level("INFO"):
        state = setup.train(str(workdir), **config)
    assert int(state.step) == 3 and any("not compared" in record.message for record in caplog.records)
    found = jax.tree.map(np.asarray, tree_paths(state.params))
    assert found.keys() == expected.keys()
    # Equal to the last bit where sums are taken in the same order, which differs between processors; the step moves them by 5e-5.
    for name, value in found.items():
        if name.endswith(("qkv/bias", "kv/bias")):
            # A bias that all keys share has a true gradient of zero: Adam turns its rounding, another on every processor, into steps.
            parts = len(value) // 3 if "qkv" in name else len(value) // 2
            keys = slice(parts, 2 * parts) if "qkv" in name else slice(0, parts)
            np.testing.assert_allclose(value[keys], expected[name][keys], rtol=0, atol=5e-5, err_msg=name)
            value, expected[name] = np.delete(value, keys), np.delete(expected[name], keys)
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=2e-7, err_msg=name)

    # What this version wrote says what the old one did not: the same data elsewhere are accepted, a longer ramp is not.
    moved = workdir.parent / "moved"
    shutil.move(config["data"]["train"]["data_dir"], moved)
    config["data"]["train"]["data_dir"] = str(moved)
    assert int(setup.train(str(workdir), **config).step) == 3
    with pytest.raises(ValueError, match="objective.guided_share.ramp is 5 steps; it was 3"):
        setup.train(str(workdir), **{**config, "total": "5 steps"})
    shutil.rmtree(moved)
    config["data"]["train"]["data_dir"] = make_scenes(moved, seed=1)
    with pytest.raises(ValueError, match="config.data.train.data_dir names other data"):
        setup.train(str(workdir), **config)
