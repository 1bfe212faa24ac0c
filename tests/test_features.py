"""`maskvit.load` and `python -m maskvit features`: a checkpoint and a folder in, features with ids out."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import maskvit
from maskvit import convert
from maskvit.checkpoints import CheckpointError, load_epochs_done, load_params, load_teacher, save_imported
from maskvit.core.modalities import DEPTH, RGB
from maskvit.core.types import Batch
from maskvit.features import extract, find_pictures, main
from maskvit.objectives import build_objective

# As a converter writes it: nothing of masking, and lists where the config had tuples.
CONFIG = dict(
    image_size=[32, 32],
    modalities=dict(rgb=dict(RGB, patch=8), depth=dict(DEPTH, patch=8)),
    objective=dict(
        name="multimae", inputs=["rgb", "depth"], outputs=["rgb", "depth"],
        encoder=dict(width=48, depth=2, heads=2), decoder=dict(width=16, depth=1, heads=2),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("imported")
    config = {**CONFIG, "objective": {**CONFIG["objective"], "num_visible": 5}}
    params, _ = jax.jit(build_objective(config).init)(jax.random.key(3))
    save_imported(directory, jax.device_get(params), {"config": CONFIG, "source": {"file": "x.pth"}, "licence": "none"})
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    (root / "deeper").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("b.png", (40, 60)), ("a.JPG", (64, 33)), ("deeper/c.webp", (32, 32)), ("grey.png", (50, 50, 0))):
        pixels = rng.integers(0, 256, (*size[:2], 3), dtype=np.uint8)
        Image.fromarray(pixels[..., 0] if len(size) == 3 else pixels).save(root / name)
    (root / "notes.txt").write_text("not a picture")
    return root


def test_load_opens_what_conversion_wrote(checkpoint):
    loaded = maskvit.load(checkpoint)
    assert loaded.model is loaded.objective.model
    assert loaded.config == json.loads(json.dumps(CONFIG))
    assert loaded.objective.num_visible == 5  # a sixth of 32
    assert loaded.metadata["source"] == {"file": "x.pth"}
    expected, _ = jax.jit(loaded.objective.init)(jax.random.key(3))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), loaded.params, expected))


def test_parameters_of_another_model_are_refused(checkpoint, tmp_path):
    wider = {**CONFIG, "objective": {**CONFIG["objective"], "encoder": dict(width=96, depth=2, heads=2)}}
    params = jax.device_get(maskvit.load(checkpoint).params)
    save_imported(tmp_path / "other", params, {"config": wider})
    with pytest.raises(CheckpointError, match="are not those of the config inside it: the positions of inputs/"):
        maskvit.load(tmp_path / "other")
    save_imported(tmp_path / "nothing", params, {"config": {}})
    with pytest.raises(CheckpointError, match="lacks 'modalities'"):
        maskvit.load(tmp_path / "nothing")


def nested(levels):
    value = {}
    for _ in range(levels):
        value = {"a": value}
    return value


HUGE = 10**9
# (dotted key, value, part of the message) of configs that somebody may have put into a checkpoint.
HOSTILE = [
    ("objective.encoder.depth", HUGE, "encoder.depth is 1000000000"),
    ("objective.encoder.depth", 1000, "encoder.depth is 1000, but the parameters stored are those of 2"),
    ("objective.encoder.depth", "2", "encoder.depth is '2'; it must be a whole number"),
    ("objective.encoder.depth", True, "encoder.depth is True; it must be a whole number"),
    ("objective.encoder.depth", float("nan"), "encoder.depth is nan; it must be a whole number"),
    ("objective.encoder.width", 0, "encoder.width is 0"),
    ("objective.encoder.width", 65536, "positions of inputs/"),
    ("objective.encoder.heads", 5, "must divide by its 5 heads"),
    ("objective.encoder.heads", 0, "encoder.heads is 0"),
    ("objective.encoder.mlp_ratio", float("inf"), "encoder.mlp_ratio is inf"),
    ("objective.encoder", [1, 2], "config.objective.encoder is [1, 2]"),
    ("objective.encoder", "XXL", "config.objective.encoder is 'XXL'"),
    ("objective.decoder", dict(depth=1000), "decoder.depth is 1000, but the parameters stored are those of"),
    ("objective.decoder", dict(width=65536, depth=1, heads=1), "positions of outputs/"),
    ("objective.decoder", "small", "config.objective.decoder is 'small'"),
    ("objective.name", "x" * 10**6, "config.objective.name is 'xxx"),
    ("objective.name", ["multimae"], "config.objective.name is ['multimae']"),
    ("objective.name", None, "config.objective.name is None"),
    ("objective.inputs", ["rgb"] * 10**5, "config.objective.inputs is ['rgb', 'rgb'"),
    ("objective.inputs", [["rgb"]], "config.objective.inputs is [['rgb']]"),
    ("objective.inputs", 7, "config.objective.inputs is 7"),
    ("objective.outputs", ["rgb"] * 10**4, "config.objective.outputs is ['rgb', 'rgb'"),
    ("objective.num_global_tokens", HUGE, "its parameters are not those"),
    ("objective.num_global_tokens", -1, ""),
    ("objective.num_classes", 10**30, ""),
    ("objective.guided_share", dict(share=[0, "1"]), ""),
    ("objective.unknown", nested(200), "unknown key 'unknown'"),
    ("objective.scores", nested(200), "config.objective.scores lacks the key 'name'"),
    ("objective.scores", dict(name={}), "config.objective.scores.name is {}"),
    ("objective", [], "config.objective is []"),
    ("objective", {}, "config.objective.name is None"),
    ("image_size", 0, "config.image_size is 0"),
    ("image_size", [65536, 65536], "positions of inputs/"),
    ("image_size", [-32, 32], "config.image_size is"),
    ("image_size", "32", "config.image_size is '32'"),
    ("image_size", None, "config.image_size is None"),
    ("modalities", [], "config.modalities is []"),
    ("modalities", {}, ""),
    ("modalities", {"rgb": 5}, "config.modalities.rgb is 5"),
    ("modalities.rgb.patch", 0, "config.modalities.rgb.patch is 0"),
    ("modalities.rgb.patch", "8", "config.modalities.rgb.patch is '8'"),
    ("modalities.rgb.patch", 1, "positions of inputs/rgb"),
    ("modalities.rgb.stride", 3, "multiple of its stride"),
    ("modalities.rgb.std", [0.0, 0.0, 0.0], "config.modalities.rgb.std"),
    ("modalities.rgb.channels", 10**7, "config.modalities.rgb.channels"),
    ("modalities.rgb.kind", ["x"], "config.modalities.rgb.kind"),
    ("global_batch", 0, "config.global_batch is 0; it must be a whole number above 0"),
    ("global_batch", "8", "config.global_batch is '8'"),
    ("total", None, "is no duration"),
    ("total", {"a": 1}, "is no duration"),
]


@pytest.mark.parametrize(("key", "value", "expected"), HOSTILE)
def test_hostile_configs_inside_a_checkpoint_are_one_line(checkpoint, monkeypatch, key, value, expected):
    """Nothing is built from sizes that are not stored: each of these ends at once."""
    params, metadata = load_params(checkpoint)
    config = json.loads(json.dumps({**metadata["config"], "total": "10 steps", "global_batch": 8}))
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value
    monkeypatch.setattr("maskvit.features.load_params", lambda path: (params, {"config": config, "steps_per_epoch": 5}))
    with pytest.raises(CheckpointError) as raised:
        maskvit.load(checkpoint)
    assert expected in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 1000


def test_a_teacher_of_another_shape_is_refused(fixtures, tmp_path, monkeypatch):
    convert.convert(fixtures / "ibot_tiny.pth", tmp_path / "ours", num_heads=3, model="both")
    teacher = load_teacher(tmp_path / "ours")
    assert maskvit.load(tmp_path / "ours").objective.model.projection
    teacher["norm"]["scale"] = teacher["norm"]["scale"][:-1]
    monkeypatch.setattr("maskvit.features.load_teacher", lambda path: teacher)
    with pytest.raises(CheckpointError, match="not those of the config inside it: norm/scale has shape"):
        maskvit.load(tmp_path / "ours")


@pytest.mark.parametrize("epochs", ["many", -1, float("nan"), [3], 10**400])
def test_epochs_done_are_a_number(tmp_path, epochs):
    save_imported(tmp_path, {"a": np.zeros(2)}, {"source": {"epochs_done": epochs}})
    with pytest.raises(CheckpointError, match="epochs_done = .* no number of epochs"):
        load_epochs_done(tmp_path)


def test_the_config_that_the_hostile_ones_are_made_of_is_sound(checkpoint, monkeypatch):
    params, metadata = load_params(checkpoint)
    config = {**metadata["config"], "total": "10 steps", "global_batch": 8}
    monkeypatch.setattr("maskvit.features.load_params", lambda path: (params, {"config": config, "steps_per_epoch": 5}))
    assert maskvit.load(checkpoint).objective.num_visible == 5


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_folder_becomes_ids_and_features(checkpoint, folder, tmp_path, capsys, suffix):
    out = tmp_path / f"features{suffix}"
    feature = "mean" if suffix == ".npz" else "global"
    arguments = ["--checkpoint", str(checkpoint), "--images", str(folder), "--out", str(out), "--feature", feature]
    assert main([*arguments, "--batch_size", "3"]) == 0
    assert "4 x 48 features" in capsys.readouterr().out
    if suffix == ".npz":
        with np.load(out) as file:
            ids, features = file["ids"].tolist(), file["features"]
            assert json.loads(str(file["about"]))["feature"] == "mean"
    else:
        from safetensors import safe_open

        with safe_open(out, "np") as file:
            ids, features = json.loads(file.metadata()["ids"]), file.get_tensor("features")
    assert ids == ["a.JPG", "b.png", "deeper/c.webp", "grey.png"]
    assert features.shape == (4, 48) and features.dtype == np.float32

    # Against the objective itself, on a picture that needs no resize.
    loaded = maskvit.load(checkpoint)
    whole = [Image.open(folder / "deeper" / "c.webp").convert("RGB")]
    expected = loaded.objective.predict(loaded.params, (), Batch({"rgb": jnp.stack([np.asarray(image) for image in whole])}))[feature]
    [(_, _, uncropped)] = extract(loaded, [folder / "deeper" / "c.webp"], crop=1.0)
    np.testing.assert_allclose(uncropped[feature], expected, rtol=1e-5, atol=1e-5)


def test_damaged_files_are_named_and_the_exit_status_tells(checkpoint, folder, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    whole = (folder / "b.png").read_bytes()
    (pictures / "good.png").write_bytes(whole)
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "page.jpg").write_text("<html>not found</html>")
    out = tmp_path / "f.npz"
    assert main(["--checkpoint", str(checkpoint), "--images", str(pictures), "--out", str(out)]) == 1
    errors = capsys.readouterr().err
    assert "2 file(s) left out" in errors and "cut.png: modality 'rgb': truncated" in errors and "page.jpg: is a web page" in errors
    with np.load(out) as file:
        assert file["ids"].tolist() == ["good.png"] and file["features"].shape == (1, 48)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--out": "features.csv"}, "its suffix says the format: .npz or .safetensors"),
        ({"--out": "nowhere/features.npz"}, "the folder nowhere does not exist"),
        ({"--images": "nowhere"}, "which is no folder"),
        ({"--checkpoint": "nowhere"}, "it does not exist"),
    ],
)
def test_mistakes_end_with_one_line(checkpoint, folder, tmp_path, capsys, changed, message):
    arguments = {"--checkpoint": str(checkpoint), "--images": str(folder), "--out": str(tmp_path / "f.npz")} | changed
    assert main([part for pair in arguments.items() for part in pair]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_pictures_are_turned_upright_and_what_is_passed_over_or_dropped_is_told(checkpoint, tmp_path, capsys, caplog):
    pictures, out = tmp_path / "pictures", tmp_path / "f.npz"
    (pictures / ".ipynb_checkpoints").mkdir(parents=True)
    upright = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(upright).save(pictures / "upright.png")
    Image.fromarray(np.rot90(upright)).save(pictures / "phone.png", exif=exif)
    Image.fromarray(upright).convert("RGBA").save(pictures / "alpha.png")
    Image.fromarray(upright).save(pictures / ".ipynb_checkpoints" / "copy.png")
    Image.fromarray(upright[:1, :1]).save(pictures / "dot.png")
    (pictures / "x.heic").write_bytes(b"x")
    assert main(["--checkpoint", str(checkpoint), "--images", str(pictures), "--out", str(out)]) == 1
    with np.load(out) as file:
        assert file["ids"].tolist() == ["alpha.png", "phone.png", "upright.png"]
        np.testing.assert_array_equal(file["features"][1], file["features"][2])
        np.testing.assert_array_equal(file["features"][0], file["features"][2])
    assert "dot.png: modality 'rgb': is 1 x 1 pixels; at least 8 x 8" in capsys.readouterr().err
    for told in ("passed over 1: x.heic", "passed over 1: .ipynb_checkpoints (hidden)", "1 of 4 pictures have an alpha channel"):
        assert told in caplog.text


def test_finding_pictures(folder, tmp_path):
    assert [p.name for p in find_pictures([folder / "grey.png", folder])] == ["grey.png", "a.JPG", "b.png", "c.webp"]
    (tmp_path / "x.heic").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"no images below(.|\n)*passed over 1: x.heic \(.heic is not read"):
        find_pictures([tmp_path])
