"""A checkpoint whose files match their manifest, and whose metadata are nonsense: one CheckpointError, whoever opens it."""

from __future__ import annotations

import copy
import json
import shutil

import jax
import numpy as np
import pytest

import maskvit
from maskvit.checkpoints import CheckpointError, save_imported, write_manifest
from maskvit.commands.maps import open_network
from maskvit.convert.export import export
from tests.tiny import tiny_config, tiny_objective

FACTS = dict(steps_per_epoch=5, config=dict(tiny_config(), global_batch=8, total="2 steps"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound")
    params = jax.eval_shape(tiny_objective().init, jax.random.key(0))[0]
    save_imported(path, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params), json.loads(json.dumps(FACTS)))
    maskvit.load(path)
    return path


def with_metadata(sound, path, text):
    shutil.copytree(sound, path)
    (path / "0" / "metadata" / "metadata").write_text(text)
    write_manifest(path / "0")
    return path


def changed(key, value):
    """The metadata as text, with one dotted key set; without it where the value is `...`."""
    metadata = copy.deepcopy({"format": 1, **FACTS})
    *parents, last = key.split(".")
    block = metadata
    for parent in parents:
        block = block[parent]
    if value is ...:
        del block[last]
    else:
        block[last] = value
    return json.dumps(metadata)


NOWHERE = [
    ("[]", "not a table"),
    ("", "JSON"),
    ('{"format": 1, "config": ' + "[" * 100_000 + "]" * 100_000 + "}", "Recursion"),
    (changed("format", 99), "written by a newer maskvit"),
    (changed("format", ...), "format"),
    (changed("config", []), "config is no table"),
]
OF_THE_MODEL = [
    ("steps_per_epoch", 0, "steps_per_epoch is 0"),
    ("steps_per_epoch", "x", "steps_per_epoch is 'x'"),
    ("config.global_batch", 0, "config.global_batch is 0"),
    ("config.global_batch", ..., "lacks 'global_batch'"),
    ("config.total", [], "duration"),
    ("config.modalities", None, "cannot be used"),
    ("config.modalities", {}, "cannot be used"),
    ("config.image_size", "x", "cannot be used"),
    ("config.image_size", [32], "cannot be used"),
    ("config.objective", "multimae", "cannot be used"),
    ("config.objective.name", [], "config.objective.name is"),
    ("config.objective.name", ..., "config.objective.name is"),
    ("config.objective.inputs", "rgb", "cannot be used"),
    ("config.objective.inputs", [[]], "cannot be used"),
    ("config.objective.encoder.depth", 10**9, "depth is 1000000000"),
    ("config.objective.encoder.heads", 0, "heads is 0"),
    ("config.objective.num_global_tokens", -1, "cannot be used"),
]


@pytest.mark.parametrize(("text", "told"), NOWHERE + [(changed(key, value), told) for key, value, told in OF_THE_MODEL])
def test_loading(sound, tmp_path, text, told):
    path = with_metadata(sound, tmp_path / "copy", text)
    with pytest.raises(CheckpointError, match=told) as raised:
        maskvit.load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("config.objective.encoder", []), ("config.modalities", {}), ("config.image_size", None), ("config.objective.name", ...)],
)
def test_exporting(sound, tmp_path, key, value):
    with pytest.raises(CheckpointError, match="the config inside the checkpoint"):
        export(
            with_metadata(sound, tmp_path / "copy", changed(key, value)),
            tmp_path / "x.safetensors",
            "multimae" if value is not ... else "ibot",
        )


RESNET = dict(modalities=dict(rgb=tiny_config()["modalities"]["rgb"]), classifier=dict(depths=[1, 1, 1, 1], num_classes=3))


@pytest.mark.parametrize("block", [{}, [], {"depths": 3, "num_classes": 3}, {"depths": [10**9, 1, 1, 1], "num_classes": 3}])
def test_a_network_for_guidance(tmp_path, block):
    params = {f"stage_{stage}": {"block_00": {"kernel": np.zeros(1, np.float32)}} for stage in range(1, 5)}
    save_imported(tmp_path / "resnet", params, {"config": json.loads(json.dumps({**RESNET, "classifier": block}))})
    with pytest.raises(CheckpointError, match="the config inside the checkpoint"):
        open_network(str(tmp_path / "resnet"), RESNET["modalities"])
