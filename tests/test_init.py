"""`python -m maskvit init`: what it finds in folders and prepared data, what it assumes, and that its config runs."""

from __future__ import annotations

import io
import pathlib
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from maskvit.__main__ import COMMANDS, main
from maskvit.checkpoints import load_params
from maskvit.commands.init.found import look_at
from maskvit.commands.init.recipe import recipe
from maskvit.convert import convert
from maskvit.core.config_files import apply_overrides, load_config, split_overrides
from maskvit.data.builders.__main__ import main as build
from maskvit.objectives import build_objective
from maskvit.training import setup
from maskvit.training.config import check_config, init_block
from maskvit.training.start import start_params
from tests.runs import ROOT, make_scenes

SMALL = (
    "--config.total=2 steps",
    "--config.objective.encoder={'width': 32, 'depth': 1, 'heads': 2}",
    "--config.objective.decoder={'width': 16, 'depth': 1, 'heads': 2}",
    "--config.evaluators={}",
    "--config.picture_every=0",
)


def save(path: pathlib.Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """rgb, depth in millimeters with holes, class ids with 255; two classes, train and val."""
    root, rng = tmp_path_factory.mktemp("own") / "garden", np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for i in range(count):
            name = f"{('cat', 'dog')[i % 2]}/{i}"
            save(root / split / "rgb" / f"{name}.jpg", rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
            depth = rng.integers(500, 4000, (48, 64)).astype(np.uint16)
            depth[:5] = 0
            save(root / split / "depth" / f"{name}.png", depth)
            classes = rng.integers(0, 5, (48, 64)).astype(np.uint8)
            classes[0, 0], classes[1] = 4, 255
            save(root / split / "semseg" / f"{name}.png", classes)
    return root


@pytest.fixture
def here(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def builder_arguments(said: str) -> list[str]:
    """The arguments of the builder command that was printed."""
    text = said.split("python -m maskvit data ")[1].split("python -m maskvit train")[0]
    return shlex.split(text.replace("\\\n", " "))


def test_from_a_folder_to_two_steps_of_training(folder, here, capsys, one_device):
    assert main(["init", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "samples: 16 in train, 4 in val" in said and "classes: cat, dog (2)" in said
    assert "its whole numbers are millimeters; else --modality depth,metres_per_count=" in said
    assert "the id 255 means no label; else --modality semseg,missing=None" in said
    assert "config.global_batch = 8: 2 steps an epoch with 16 records" in said and "config.optimizer.base_lr = " in said
    assert build(builder_arguments(said)) == 0

    config = load_config("garden.py")
    plain = config.to_dict()
    assert plain["modalities"]["depth"]["metres_per_count"] == 1e-3 and plain["modalities"]["depth"]["missing"] == 0
    assert plain["modalities"]["semseg"]["num_classes"] == 5 and plain["modalities"]["semseg"]["missing"] == 255
    assert plain["objective"]["inputs"] == ("rgb", "depth", "semseg") and plain["objective"]["name"] == "multimae"
    assert plain["evaluators"]["knn"]["test"]["split"] == "val"
    apply_overrides(config, split_overrides(SMALL)[1])
    state = setup.train("run", **config.to_dict())
    assert int(state.step) == 2 and int(state.skipped) == 0

    # What is packed can be looked at too, and gives the same declarations.
    packed = look_at("data/garden", "data", None, {})
    assert (
        packed.classes == 2
        and packed.commands == ()
        and packed.modalities == {name: data for name, data in look_at(str(folder), "data", None, {}).modalities.items()}
    )
    # A run can be continued on the same data: nothing starts fresh. The file that is there is kept.
    assert main(["init", str(folder), "--checkpoint", "run", "--out", "garden.py"]) == 2
    assert "garden.py is there already" in capsys.readouterr().err
    assert main(["init", str(folder), "--checkpoint", "run", "--out", "more.py"]) == 0
    more = load_config("more.py").to_dict()
    assert more["init_from"] == dict(path="run", fresh=(), drop=()) and more["objective"]["encoder"] == dict(width=32, depth=1, heads=2)
    assert 0 < more["optimizer"]["base_lr"] < plain["optimizer"]["base_lr"]
    check_config(more)


def test_class_folders_of_photos(here, capsys):
    rng = np.random.default_rng(0)
    for name, count in (("roses", 16), ("tulips", 4), ("daisies", 4)):  # names repeat, as cameras give them
        for i in range(count):
            save(here / "photos" / name / f"{i}.jpg", rng.integers(0, 255, (40, 50, 3), dtype=np.uint8))
    assert main(["init", "photos"]) == 0
    said = capsys.readouterr().out
    link = next(line.strip() for line in said.splitlines() if "ln -s" in line)
    subprocess.run(link, shell=True, check=True)
    assert build(builder_arguments(said)) == 0 and "train 22, val 2 records" in capsys.readouterr().out
    config = load_config("photos.py").to_dict()
    assert config["objective"]["name"] == "mae" and config["modalities"].keys() == {"rgb"} and "knn" in config["evaluators"]
    assert look_at("data/photos", "data", None, {}).records == {"train": 22, "val": 2}


def test_a_prepared_data_set(here, capsys):
    make_scenes(here / "scenes_data")
    assert main(["init", "scenes_data", "--out", "scenes.py"]) == 0
    config = load_config("scenes.py").to_dict()
    assert config["modalities"]["semseg"]["num_classes"] == 14 and config["modalities"]["depth"]["missing"] == 0
    assert config["data"]["train"]["data_dir"].endswith("1.0.0") and "builders" not in capsys.readouterr().out


def test_what_the_user_states_is_not_guessed(folder):
    given = {"depth": dict(metres_per_count=1 / 256, missing=None), "semseg": dict(num_classes=40, missing=None)}
    data = look_at(str(folder), "data", None, given)
    assert data.modalities["depth"]["metres_per_count"] == 1 / 256 and data.modalities["depth"]["missing"] is None
    assert data.modalities["semseg"]["num_classes"] == 40
    assert not [line for line in data.assumed if "millimeters" in line or "no label" in line or "classes, as" in line]
    assert "depth,channels=1,metres_per_count=1/256" in data.commands[-1]


def test_numbers_follow_the_number_of_records(folder):
    data = look_at(str(folder), "data", None, {})
    found = {}
    for records in (16, 1000, 50_000, 1_300_000):
        data.records["train"] = records
        config = recipe(data, None, None).config
        check_config(config)
        rate = config["optimizer"]["base_lr"] * config["global_batch"] / 256
        epochs = config["schedule"]["total_epochs"]
        found[records] = (config["global_batch"], rate)
        assert (
            config["global_batch"] <= records and config["schedule"]["warmup_epochs"] < epochs and config["total"] == f"{epochs:g} epochs"
        )
    assert [batch for batch, _ in found.values()] == [8, 16, 512, 2048]
    rates = [rate for _, rate in found.values()]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(8e-4) and rates[0] == pytest.approx(8e-4 / 16, rel=0.05)


def test_other_modalities(here):
    rng = np.random.default_rng(0)
    for i in range(4):
        save(here / "own" / "rgb" / "all" / f"{i}.png", rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        save(here / "own" / "thermal" / "all" / f"{i}.png", rng.integers(0, 60000, (64, 64)).astype(np.uint16))
        save(here / "own" / "normals" / "all" / f"{i}.png", rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        (here / "own" / "depth" / "all").mkdir(parents=True, exist_ok=True)
        np.save(here / "own" / "depth" / "all" / f"{i}.npy", rng.uniform(0.5, 9.0, (64, 64)).astype(np.float32))
    data = look_at("own", "data", "own", {})
    assert data.modalities["thermal"]["channels"] == 1 and data.modalities["thermal"]["scale"] == 1 / 65535
    assert data.modalities["normals"]["mirrored_channels"] == (0,) and data.modalities["normals"]["mean"] == (0.5,)
    assert data.modalities["depth"]["metres_per_count"] == 1 / 512 and any("its numbers are meters" in line for line in data.assumed)
    objective = build_objective(recipe(data, None, None).config)
    assert objective.model.inputs == ("rgb", "depth", "normals", "thermal")
    assert build(shlex.split(data.commands[-1].replace("\\\n", " ").removeprefix("python -m maskvit data "))) == 0


def test_names_of_files_are_text(here, capsys):
    """Escape codes, quotes and line ends in names neither reach the terminal nor end the file's docstring."""
    for name in ("a\x1b[31m", 'b"""', "c\nd"):
        save(here / "odd" / "rgb" / "all" / f"{name}.png", np.zeros((32, 32, 3), np.uint8))
        (here / "odd" / "rgb" / "all" / f"{name}.heic").write_bytes(b"")
    assert main(["init", "odd"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "3 passed over" in said
    assert load_config("odd.py").image_size == (32, 32)


def test_mistakes_are_one_line(here, folder, capsys):
    (here / "empty").mkdir()
    (here / "text" / "rgb" / "all").mkdir(parents=True)
    (here / "text" / "rgb" / "all" / "a.png").write_text("no picture")
    save(here / "tiny" / "rgb" / "all" / "a.png", np.zeros((4, 4, 3), np.uint8))
    save(here / "tiny" / "rgb" / "all" / "b.png", np.zeros((4, 4, 3), np.uint8))
    for arguments, message in (
        (["nowhere"], "there is no folder nowhere"),
        (["empty"], "holds no folder with pictures"),
        (["text"], "no file of"),
        (["tiny"], "give --image_size"),
        ([str(folder), "--out", "nowhere/x.py"], "the folder nowhere does not exist"),
        ([str(folder), "--out", "empty"], "which is a folder"),
        ([str(folder), "--name", "a b"], "--name is 'a b'"),
        ([str(folder), "--modality", "thermal,channels=1"], "--modality names 'thermal'"),
        ([str(folder), "--modality", "depth,unit=3"], "'unit=3' is not FIELD=VALUE"),
        ([str(folder), "--checkpoint", "nowhere"], "nowhere"),
        ([str(folder), "--image_size", "50"], "not at least 2 patches"),
    ):
        assert main(["init", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert not list(here.glob("*.py"))


def test_the_list_of_commands(capsys):
    assert main([]) == 0 and main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"python -m maskvit {name} {usage}" in said and what in said for name, (_, what, usage) in COMMANDS.items())
    assert main(["initialize"]) == 2 and "has no command 'initialize'" in capsys.readouterr().err


def test_it_starts_as_a_module(here):
    child = subprocess.run([sys.executable, "-m", "maskvit", "init", "nowhere"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert child.returncode == 2 and child.stderr == "error: there is no folder nowhere\n"


def test_a_converted_checkpoint_is_continued_on_other_data(folder, here, capsys):
    """Other classes and no third modality: what does not fit starts fresh or is left out, and the rest is loaded."""
    convert(ROOT / "assets" / "multimae_scenes.pth", here / "imported")
    assert main(["init", str(folder), "--checkpoint", "imported"]) == 0
    config = load_config("garden.py").to_dict()
    assert config["modalities"]["rgb"]["patch"] == 8 and config["objective"]["encoder"]["width"] == 128
    assert config["init_from"]["drop"] == () and all("semseg" in pattern for pattern in config["init_from"]["fresh"])
    params, _ = start_params(build_objective(config), 0, init_block(**config["init_from"]))
    stored, _ = load_params(here / "imported")
    name = "block_00"
    np.testing.assert_array_equal(params["encoder"][name]["attn"]["qkv"]["kernel"], stored["encoder"][name]["attn"]["qkv"]["kernel"])

    for split in ("train", "val"):
        shutil.copytree(folder / split / "rgb", here / "photos" / split / "rgb")
    assert main(["init", "photos", "--checkpoint", "imported"]) == 0
    config = load_config("photos.py").to_dict()
    assert config["objective"]["inputs"] == ("rgb",) and config["init_from"]["drop"]
    start_params(build_objective(config), 0, init_block(**config["init_from"]))
    assert "a tenth of that from a checkpoint" in capsys.readouterr().out


def test_pictures_of_a_public_data_set(here, capsys, one_device):
    """A TFDS builder of others: no metadata, a picture under its own name, a label."""

    class Flowers(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name, VERSION = "flowers", tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(20), "test": self._generate_examples(4)}

        def _generate_examples(self, count):
            for i in range(count):
                out = io.BytesIO()
                Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(out, "png")
                yield i, {"image": out.getvalue(), "label": i % 3}

    Flowers(data_dir=str(here / "tfds"), file_format="array_record").download_and_prepare()
    assert main(["init", "tfds", "--out", "flowers.py"]) == 0
    config = load_config("flowers.py").to_dict()
    assert config["data"]["train"]["features"] == {"rgb": "image"} and config["evaluators"]["knn"]["test"]["split"] == "test"
    apply_overrides(changed := load_config("flowers.py"), split_overrides(SMALL)[1])
    assert int(setup.train("run", **changed.to_dict()).step) == 2
