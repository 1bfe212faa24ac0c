"""`python -m maskvit maps`: a map per record, a stopped run goes on to the same bytes, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maskvit.checkpoints import load_params, save_imported
from maskvit.commands import maps as command
from maskvit.convert import resnet
from maskvit.convert.rules import key_shapes, to_ours
from maskvit.core.errors import run_command
from maskvit.core.modalities import DEPTH, RGB, SEMSEG, Modality, parse_modalities
from maskvit.core.types import Batch
from maskvit.data import codec
from maskvit.data.batches import eval_batches, train_batches
from maskvit.data.builders import prepare
from maskvit.data.builders.records import RecordBuilder
from maskvit.data.maps import MapSet
from maskvit.data.sources import TfdsSource
from maskvit.features import load
from maskvit.guidance.attention import self_attention
from maskvit.guidance.discovery import attention_map
from maskvit.guidance.gradcam import resnet_gradcam
from maskvit.guidance.tokencut import tokencut_map
from maskvit.nn.resnet import resnet_of
from maskvit.objectives import build_objective
from tests.runs import get_config

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
RECORDS = 21
MODEL = dict(
    image_size=[32, 32],
    modalities=dict(rgb=dict(RGB, patch=8), depth=dict(DEPTH, patch=8, missing=0.0), semseg=dict(SEMSEG, patch=8, num_classes=14)),
    objective=dict(
        name="multimae", inputs=["rgb", "depth", "semseg"], outputs=["rgb"],
        encoder=dict(width=48, depth=2, heads=3), decoder=dict(width=16, depth=1, heads=2),
    ),
)  # fmt: skip


def start(settings: dict) -> int:
    """The command, on a config as data."""
    return run_command(lambda: command.run(settings))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("made") / "small"
    params, _ = jax.jit(build_objective({**MODEL, "objective": {**MODEL["objective"], "num_visible": 5}}).init)(jax.random.key(3))
    save_imported(directory, jax.device_get(params), {"config": MODEL, "source": {"file": "x.pth"}, "licence": "CC-BY-NC 4.0"})
    return str(directory)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("data")
    prepare("scenes", str(directory), num_train=RECORDS, num_val=3, size=48)
    return str(directory)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(command, "PART_RECORDS", 8)


def config(checkpoint: str, data_dir: str, place: pathlib.Path, **changes) -> dict:
    return (
        dict(
            data=dict(source="tfds", name="scenes", data_dir=data_dir, split="train"),
            modalities=dict(rgb={}, depth={}),
            model=dict(checkpoint=checkpoint),
            source=dict(name="self_attention", query="mean"),
            out=dict(data_dir=str(place), name="maps"),
            image_size=32,
            batch_size=4,
        )
        | changes
    )


def files(directory: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def source_of(checkpoint: str, data_dir: str) -> tuple[TfdsSource, dict]:
    specs = {spec.name: spec for spec in load(checkpoint).model.modalities}
    return TfdsSource(specs, data_dir=data_dir, name="scenes"), specs


def test_maps_are_the_attention_on_whole_pictures(checkpoint, data_dir, tmp_path, capsys):
    assert start(config(checkpoint, data_dir, tmp_path)) == 0
    assert f"maps: {RECORDS} of {RECORDS} maps" in capsys.readouterr().out and not (tmp_path / "maps.parts").exists()
    source, specs = source_of(checkpoint, data_dir)
    opened = MapSet(str(tmp_path / "maps"), source, ("rgb", "depth"), (4, 4))
    loaded = load(checkpoint)
    with eval_batches(source, specs, (32, 32), batch_size=RECORDS, crop=None) as batches:
        batch = next(batches)
    prepared = loaded.objective.prepare(Batch({name: jnp.asarray(batch[name]) for name in ("rgb", "depth")}))
    tokens = loaded.model.embed(loaded.params, prepared.values_of(("rgb", "depth")), prepared.present)
    scores = np.asarray(self_attention(loaded.model, loaded.params, tokens, query="mean")).reshape(RECORDS, 2, 4, 4)
    for index in range(RECORDS):
        stored = opened.cropped(index, f"train/{index:06d}", (0, 0, 1, 1), False)
        here = scores[index, 0]
        assert stored[0].min() == 0 and stored[0].max() == 1
        np.testing.assert_allclose(stored[0], (here - here.min()) / (here.max() - here.min()), atol=0.51 / 255)
        measured = np.asarray(prepared.present[index, 16:]).reshape(4, 4)  # the sky has no depth
        here = scores[index, 1][measured]
        assert (stored[1][~measured] == 0).all()
        np.testing.assert_allclose(stored[1][measured], (here - here.min()) / (here.max() - here.min()), atol=0.51 / 255)


def test_manifest_says_what_the_maps_were_made_from(checkpoint, data_dir, tmp_path):
    directory = command.make_maps(**config(checkpoint, data_dir, tmp_path))
    manifest = json.loads((pathlib.Path(directory) / "metadata.json").read_text())["recipe"]
    assert manifest["source"] == {"name": "self_attention", "query": "mean"}
    assert manifest["data"] == {"name": "scenes/1.0.0", "split": "train", "records": RECORDS}
    assert manifest["checkpoint"]["name"] == "small" and len(manifest["checkpoint"]["parameters_sha256"]) == 64
    assert manifest["checkpoint"]["source"] == {"file": "x.pth"} and manifest["checkpoint"]["licence"] == "CC-BY-NC 4.0"
    assert manifest["modalities"] == ["rgb", "depth"] and manifest["maps"] == 2 and manifest["grid"] == [4, 4]
    assert manifest["without_map"] == 0 and len(manifest["ids_sha256"]) == 64
    assert manifest["program"].startswith("maskvit ") and len(manifest["date"]) == 10


def test_training_reads_them(checkpoint, data_dir, tmp_path):
    command.make_maps(**config(checkpoint, data_dir, tmp_path))
    source, specs = source_of(checkpoint, data_dir)
    settings = dict(seed=0, global_batch=8, inputs=("rgb", "depth"), maps=str(tmp_path / "maps"))
    with train_batches(source, specs, (32, 32), **settings) as batches:
        guidance = next(batches)["guidance"]
    assert guidance.shape == (8, 2, 4, 4) and 0 <= guidance.min() and guidance.max() <= 1 and guidance.std() > 0.05
    validation = TfdsSource(specs, data_dir=data_dir, name="scenes", split="val")
    with pytest.raises(ValueError, match="made from another split: 'train', config.data.train is 'val'"):
        train_batches(validation, specs, (32, 32), **settings | {"global_batch": 2})


def test_a_stopped_run_goes_on_to_the_same_bytes(checkpoint, data_dir, tmp_path, monkeypatch, capsys):
    whole = files(pathlib.Path(command.make_maps(**config(checkpoint, data_dir, tmp_path / "whole"))))
    parts = tmp_path / "stopped" / "maps.parts"
    write = command.Parts.write

    def stop(self, number, *part):
        if number == 2:
            (self.directory / "part_000002.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        write(self, number, *part)

    monkeypatch.setattr(command.Parts, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        command.make_maps(**config(checkpoint, data_dir, tmp_path / "stopped"))
    monkeypatch.setattr(command.Parts, "write", write)
    assert len(list(parts.glob("*.npz"))) == 2
    for changes, key in ((dict(source=dict(name="self_attention", query="global")), "source"), (dict(image_size=64), "image_size")):
        with pytest.raises(
            ValueError, match=rf"maps.parts holds parts of a stopped run made with {key} = .*finish it with its own settings"
        ):
            command.make_maps(**config(checkpoint, data_dir, tmp_path / "stopped", **changes))
    capsys.readouterr()
    directory = command.make_maps(**config(checkpoint, data_dir, tmp_path / "stopped"))
    assert f"going on after 16 of {RECORDS} maps" in capsys.readouterr().out
    assert files(pathlib.Path(directory)) == whole and not parts.exists()


def test_a_finished_set_is_found_or_refused(checkpoint, data_dir, tmp_path, capsys):
    directory = command.make_maps(**config(checkpoint, data_dir, tmp_path))
    before = files(pathlib.Path(directory))
    assert command.make_maps(**config(checkpoint, data_dir, tmp_path)) == directory
    assert "maps: found in" in capsys.readouterr().out and files(pathlib.Path(directory)) == before
    assert start(config(checkpoint, data_dir, tmp_path, modalities=dict(rgb={}))) == 2
    assert "holds maps made with modalities = ['rgb', 'depth'], asked for is ['rgb']" in capsys.readouterr().err


def test_maps_at_another_grid(checkpoint, data_dir, tmp_path):
    fine = command.make_maps(**config(checkpoint, data_dir, tmp_path, out=dict(data_dir=str(tmp_path), name="fine", grid=(8, 8))))
    assert json.loads((pathlib.Path(fine) / "metadata.json").read_text())["recipe"]["grid"] == [8, 8]
    large = config(checkpoint, data_dir, tmp_path, image_size=(64, 48), out=dict(data_dir=str(tmp_path), name="large"))
    assert json.loads((pathlib.Path(command.make_maps(**large)) / "metadata.json").read_text())["recipe"]["grid"] == [8, 6]


class Pictures(RecordBuilder, skip_registration=True):
    """Pictures, one of them damaged and one without depth."""

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index in range(6):
            out = io.BytesIO()
            Image.fromarray(np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(out, "png")
            depth = codec.encode_array(np.full((32, 32), 400 + index, np.uint16))
            yield index, {"id": f"p{index}", "rgb": out.getvalue()[: 50 if index == 2 else None], "depth": b"" if index == 4 else depth}


def test_records_without_a_map(checkpoint, tmp_path, capsys):
    Pictures(
        data_dir=str(tmp_path), name="pictures", modalities={"rgb": {}, "depth": {}}, may_lack=("depth",), label_names=(), recipe={}
    ).prepare()
    settings = config(checkpoint, str(tmp_path), tmp_path, data=dict(source="tfds", name="pictures", data_dir=str(tmp_path)))
    directory = command.make_maps(**settings)
    assert "2 records have no map: they could not be read or lack rgb or depth" in capsys.readouterr().out
    assert json.loads((pathlib.Path(directory) / "metadata.json").read_text())["recipe"]["without_map"] == 2
    specs = {spec.name: spec for spec in load(checkpoint).model.modalities if spec.name != "semseg"}
    source = TfdsSource(specs, data_dir=str(tmp_path), name="pictures")
    with pytest.raises(RuntimeError, match="no map is stored for record 'p4'"):
        with train_batches(source, specs, (32, 32), seed=0, global_batch=6, maps=directory) as batches:
            next(batches)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(source=dict(name="saliency")), "config.source.name is 'saliency'; known: self_attention"),
        (dict(source=dict(name="self_attention", head=1)), "config.source has unknown key 'head'; known: query, block, heads"),
        (dict(source=dict(name="self_attention", block=2)), "config.source.block is 2; the encoder has blocks 0 ... 1"),
        (dict(source=dict(name="self_attention", heads=(3,))), r"config.source.heads is \(3,\); the encoder has heads 0 ... 2"),
        (dict(source=dict(name="self_attention", heads="random")), "config.source.heads is 'random'; it must be several values"),
        (
            dict(modalities=dict(normals={})),
            "config.modalities names 'normals', which is no input of the checkpoint; its inputs: rgb, depth",
        ),
        (dict(modalities=dict(rgb=dict(patch=4))), "config.modalities.rgb has the key 'patch'; the checkpoint says what 'rgb' is"),
        (dict(modalities={}), "config.modalities is empty"),
        (dict(image_size=36), "image height 36 is not a multiple of modality 'rgb''s patch 8"),
        (dict(batch_size=6), "config.batch_size is 6; it must be a multiple of the 4 devices"),
        (dict(model=dict(path="x")), "config.model has unknown key 'path'; known: checkpoint"),
        (dict(model=dict(checkpoint="nowhere")), "nowhere"),
        (dict(data=dict(name="nothing", data_dir="nowhere")), "no prepared data set 'nothing'"),
        (dict(batches=3), "config has unknown key 'batches'"),
    ],
)
def test_refusals(checkpoint, data_dir, tmp_path, capsys, changes, text):
    assert start(config(checkpoint, data_dir, tmp_path, **changes)) == 2
    said = capsys.readouterr().err
    assert re.search(text, said), said
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_give_the_source():
    block = {**MODEL["objective"], "num_visible": 5, "num_global_tokens": 0}
    objective = command.use_inputs(build_objective({**MODEL, "objective": block}), {"rgb": {}})
    with pytest.raises(ValueError, match="config.source.query is 'global', but the model has no global token: set it to 'mean'"):
        command.check_source(objective, "self_attention", {})


# --- other sources, other networks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> str:
    """A plain ViT as its import leaves it."""
    directory = tmp_path_factory.mktemp("made") / "vit"
    block = dict(name="multimae", inputs=["rgb"], outputs=[], encoder=MODEL["objective"]["encoder"], num_visible=3, final_norm=True)
    described = dict(image_size=[32, 32], modalities=dict(rgb=dict(RGB, patch=8)), objective=block)
    params, _ = jax.jit(build_objective(described).init)(jax.random.key(3))
    save_imported(directory, jax.device_get(params), {"config": described, "source": {"file": "vit.pth"}, "licence": None})
    return str(directory)


@pytest.fixture(scope="module")
def resnet_checkpoint(tmp_path_factory) -> str:
    """A small ResNet as its import leaves it, with weights that see something."""
    directory = tmp_path_factory.mktemp("made") / "resnet"
    described = dict(
        image_size=(64, 64), modalities=dict(rgb=RGB), classifier=dict(name="resnet", depths=(1, 1, 1, 1), num_classes=5, width=4)
    )
    rng = np.random.default_rng(0)
    rules = resnet.rules(described)
    scale = lambda shape: np.sqrt(2 / max(1, np.prod(shape[1:])))  # noqa: E731
    state = {key: (scale(shape) * rng.standard_normal(shape)).astype(np.float32) for key, shape in key_shapes(rules).items()}
    save_imported(directory, to_ours(rules, state, "x"), {"config": described, "source": {"file": "resnet.pth"}, "licence": None})
    return str(directory)


def stored(directory: str) -> np.ndarray:
    """uint8 "records m gh gw"."""
    source = TfdsSource({"map": Modality("map")}, data_dir=directory, split="maps")
    return np.stack([codec.decode(source[index]["map"]) for index in range(len(source))])


def pictures(data_dir: str, size: int) -> np.ndarray:
    spec = parse_modalities(dict(rgb=dict(RGB, patch=8)))
    source = TfdsSource(spec, data_dir=data_dir, name="scenes")
    with eval_batches(source, spec, (size, size), batch_size=RECORDS, crop=None) as batches:
        return next(batches)["rgb"]


@pytest.mark.parametrize(
    "source", [dict(name="dino_attention", mass=0.6), dict(name="dino_attention", head=1), dict(name="tokencut", tau=0.9, value="mask")]
)
def test_object_discovery_with_a_plain_vit(vit, data_dir, tmp_path, source):
    settings = config(vit, data_dir, tmp_path, modalities=dict(rgb={}), image_size=64, source=source)
    maps = stored(command.make_maps(**settings))
    loaded = load(vit)
    prepared = loaded.objective.prepare(Batch({"rgb": jnp.asarray(pictures(data_dir, 64))}))
    tokens = loaded.model.embed(loaded.params, prepared.values_of(("rgb",)))
    arguments = {key: value for key, value in source.items() if key != "name"}
    function = {"dino_attention": attention_map, "tokencut": tokencut_map}[source["name"]]
    wanted = np.asarray(jax.jit(lambda params: function(loaded.model, params, tokens, **arguments))(loaded.params))
    assert maps.shape == (RECORDS, 1, 8, 8)
    different = np.abs(maps[:, 0] / 255 - wanted) > 0.51 / 255
    assert different.mean() < 0.02  # a cosine that lies on the threshold may fall on either side of it


@pytest.mark.parametrize(("stage", "grid"), [(4, (2, 2)), (3, (4, 4))])
def test_gradcam_of_a_resnet(resnet_checkpoint, data_dir, tmp_path, stage, grid):
    source = dict(name="gradcam", stage=stage)
    settings = config(resnet_checkpoint, data_dir, tmp_path, modalities=dict(rgb={}), image_size=64, source=source)
    directory = command.make_maps(**settings)
    params, metadata = load_params(resnet_checkpoint)
    network = resnet_of(metadata["config"])
    wanted = resnet_gradcam(network, params, network.prepare(jnp.asarray(pictures(data_dir, 64))), stage=stage)
    assert wanted.shape == (RECORDS, *grid) and wanted.std() > 0
    np.testing.assert_allclose(stored(directory)[:, 0] / 255, wanted, atol=0.52 / 255)
    manifest = json.loads((pathlib.Path(directory) / "metadata.json").read_text())["recipe"]
    assert manifest["checkpoint"]["source"] == {"file": "resnet.pth"} and manifest["grid"] == list(grid)


@pytest.mark.parametrize(
    ("network", "source", "text"),
    [
        ("resnet", dict(name="tokencut"), "config.source.name is 'tokencut', which reads a ViT, but .* is a ResNet; it can give: gradcam"),
        ("resnet", dict(name="gradcam", stage=2), "config.source 'gradcam' cannot be had from .*: Grad-CAM's stage is 2; known: 3, 4"),
        ("resnet", dict(name="gradcam", classes=1), "config.source has unknown key 'classes'; known: stage"),
        ("vit", dict(name="gradcam"), "config.source 'gradcam' cannot be had from .*: Grad-CAM needs a classifier"),
        ("vit", dict(name="gradcam", stage=3), "config.source has unknown key 'stage'; known: none"),
        ("vit", dict(name="dino_attention", head=3), "cannot be had from .*: head is 3; the encoder has heads 0 ... 2"),
        ("vit", dict(name="dino_attention", modality="depth"), "modality 'depth' is none of the inputs rgb"),
        ("vit", dict(name="tokencut", features="values"), "cannot be had from .*: TokenCut's features are 'values'; known: keys"),
        ("vit", dict(name="tokencut", tau=1.0), "TokenCut's tau is 1.0"),
    ],
)
def test_networks_that_cannot_give_a_source(vit, resnet_checkpoint, data_dir, tmp_path, capsys, network, source, text):
    checkpoint = {"vit": vit, "resnet": resnet_checkpoint}[network]
    assert start(config(checkpoint, data_dir, tmp_path, modalities=dict(rgb={}), image_size=64, source=source)) == 2
    said = capsys.readouterr().err
    assert re.search(text, said), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "guidance").glob("*.py")), ids=lambda path: path.name)
def test_shipped_configs(vit, resnet_checkpoint, data_dir, tmp_path, path):
    shipped = get_config(str(path)).to_dict()
    assert f"--config {path.relative_to(ROOT)}" in path.read_text()
    shipped["data"].update(name="scenes", data_dir=data_dir)
    shipped["model"]["checkpoint"] = resnet_checkpoint if shipped["source"]["name"] == "gradcam" else vit
    shipped["out"]["data_dir"] = str(tmp_path)
    grid = tuple(side // 16 for side in (64, 64)) if "grid" not in shipped["out"] else shipped["out"]["grid"]
    maps = stored(command.make_maps(**shipped | dict(image_size=64, batch_size=4, workers=0)))
    assert maps.shape[:2] == (RECORDS, 1) and (maps.shape[2:] == grid or shipped["source"]["name"] != "gradcam")


def test_values_outside_the_range_are_refused(checkpoint, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.MAP_SOURCES, "self_attention", lambda objective, params, batch: 2 * jnp.ones((4, 1, 4, 4)))
    monkeypatch.setattr(command, "check_source", lambda *_: None)
    assert start(config(checkpoint, data_dir, tmp_path, source=dict(name="self_attention"))) == 2
    assert "config.source gave record 'train/000000' values from 2.0 to 2.0, not within 0 ... 1" in capsys.readouterr().err


def test_the_command_itself(checkpoint, data_dir, tmp_path):
    file = tmp_path / "x.py"
    settings = config(checkpoint, data_dir, tmp_path)
    file.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({settings!r})\n")
    run = [sys.executable, "-m", "maskvit", "maps", f"--config={file}"]
    child = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    assert f"maps {RECORDS} records written to" in child.stdout
    child = subprocess.run([*run, "--config.batch_size=6"], capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), check=False)
    assert child.returncode == 2 and "error: config.batch_size is 6" in child.stderr
