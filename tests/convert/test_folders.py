"""Folders for transformers and timm: their libraries load them, and say what the checkpoint says."""

from __future__ import annotations

import functools
import importlib.util
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import maskvit
from maskvit import convert
from maskvit.checkpoints import load_origin, save_imported
from maskvit.commands import convert as command
from maskvit.convert.export import FOLDERS
from maskvit.convert.reader import ConversionError
from maskvit.core.modalities import RGB
from maskvit.objectives import build_objective

NAMES = ["ant", "bee", "cow"]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def config_of(size=(32, 24), **objective):
    """A small ViT with statistics of its own."""
    block = dict(encoder=dict(width=24, depth=2, heads=3, mlp_ratio=8 / 3), num_global_tokens=1, **objective)
    return dict(image_size=size, modalities=dict(rgb=dict(RGB, patch=8, mean=MEAN, std=STD)), objective=block)


CLASSES = dict(name="supervised", task=dict(name="classification", num_classes=3))
DECODER = dict(width=16, depth=2, heads=4)


@functools.cache
def params_of(text):
    params = build_objective(json.loads(text)).init(jax.random.key(0))[0]
    rng = np.random.default_rng(0)
    trained = lambda path, x: x if "pos_embed" in str(path) else x + 0.2 * rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    return jax.device_get(jax.tree_util.tree_map_with_path(trained, params))


def saved(folder, config, **metadata):
    save_imported(folder, params_of(json.dumps(config)), {"config": config, **metadata})
    return maskvit.load(folder)


def pictures(size=(32, 24)) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, *size, 3), np.uint8)


def normalized(torch, size=(32, 24)):
    """What timm's and transformers' own preparation makes of `pictures`."""
    values = (pictures(size) / 255 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(values.transpose(0, 3, 1, 2).astype(np.float32))


def tokens_of(loaded):
    """Encoded and normed tokens, the class token last."""
    values = jnp.asarray((pictures(loaded.model.image_size) / 255 - np.array(MEAN)) / np.array(STD), jnp.float32)
    return np.asarray(loaded.model.encode(loaded.params, loaded.model.embed(loaded.params, {"rgb": values}).tokens))


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-4)


def softmax(logits):
    return jax.nn.softmax(jnp.asarray(logits.detach().numpy()))


# ------------------------------------------------------------------------------------------ transformers


@pytest.fixture(scope="module")
def transformers():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pytest.importorskip("torch")
    return pytest.importorskip("transformers", reason="pip install transformers")


def test_a_classifier_as_transformers_loads_it(transformers, tmp_path):
    """From files of pictures to probabilities, by their image processor and their model, with our names of the classes."""
    loaded = saved(tmp_path / "run", config_of(**CLASSES, pool="global"), label_names=NAMES, licence="CC-BY-NC 4.0")
    assert command.main(["--src", str(tmp_path / "run"), "--dst", str(tmp_path / "hub"), "--to", "huggingface"]) == 0
    files = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "conversion.txt"}
    assert {file.name for file in (tmp_path / "hub").iterdir()} == files
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hub")
    model, info = transformers.ViTForImageClassification.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.id2label == dict(enumerate(NAMES)) and model.config.label2id == {"ant": 0, "bee": 1, "cow": 2}
    given = processor(images=[Image.fromarray(picture) for picture in pictures()], return_tensors="pt")
    expected = loaded.predict(pictures())["probabilities"]
    np.testing.assert_allclose(softmax(model.eval()(**given).logits), expected, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "hub", add_pooling_layer=False)
    close(tokens_of(loaded)[:, -1], encoder.eval()(**given).last_hidden_state[:, 0])


def test_a_mae_as_transformers_loads_it(transformers, tmp_path):
    """Whole, and its encoder by the model card's line."""
    import torch

    block = dict(name="mae", inputs=("rgb",), outputs=("norm_rgb",), decoder=dict(DECODER))
    loaded = saved(tmp_path / "run", config_of((32, 32), **block))
    convert.export(tmp_path / "run", tmp_path / "hub", "huggingface")
    whole, info = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and whole.config.norm_pix_loss
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "hub", mask_ratio=0.0).eval()
    theirs = encoder(normalized(torch, (32, 32)), noise=torch.arange(16.0)[None].expand(2, -1)).last_hidden_state
    close(tokens_of(loaded), torch.roll(theirs, -1, dims=1))
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "an encoder with MAE's decoder" in text and "mask_ratio=0.0" in text and "pipeline_tag: image-feature-extraction" in text


# ------------------------------------------------------------------------------------------ timm


@pytest.fixture(scope="module")
def timm():
    pytest.importorskip("torch")
    if importlib.util.find_spec("timm") is None:
        pytest.skip("pip install timm")
    return pytest.importorskip("timm")


TIMM = {
    "mean of patches": dict(CLASSES, pool="mean"),
    "class token": dict(CLASSES, pool="global"),
    "encoder": dict(name="multimae", inputs=("rgb",), outputs=(), num_visible=3, final_norm=True),
    "without a norm": dict(name="multimae", inputs=("rgb",), outputs=(), num_visible=3),
}


@pytest.mark.parametrize("form", TIMM)
def test_a_model_as_timm_loads_it(form, timm, tmp_path):
    import torch

    loaded = saved(tmp_path / "run", config_of(**TIMM[form]))
    convert.export(tmp_path / "run", tmp_path / "folder", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    given = normalized(torch)
    if "task" in TIMM[form]:
        np.testing.assert_allclose(softmax(model(given)), loaded.predict(pictures())["probabilities"], atol=1e-5)
    else:
        close(tokens_of(loaded), torch.roll(model.forward_features(given), -1, dims=1))
    prepared = timm.data.resolve_model_data_config(model)
    assert prepared["input_size"] == (3, 32, 24)
    np.testing.assert_allclose((prepared["mean"], prepared["std"]), (MEAN, STD), rtol=1e-6)


def test_what_timm_reads(tmp_path):
    """Without timm: the config says the sizes of the weights, in units of pictures that run from 0 to 1."""
    config = config_of(**CLASSES)
    config["modalities"]["rgb"].update(scale=1.0, mean=(128.0,), std=(51.0,))
    saved(tmp_path / "run", config, label_names=NAMES, licence="MIT")
    convert.export(tmp_path / "run", tmp_path / "folder", "timm")
    found = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (found["architecture"], found["num_classes"], found["label_names"]) == ("vit_base_patch16_224", 3, NAMES)
    arguments, prepared = found["model_args"], found["pretrained_cfg"]
    assert (arguments["embed_dim"], arguments["depth"], arguments["global_pool"], arguments["fc_norm"]) == (24, 2, "avg", True)
    assert int(24 * arguments["mlp_ratio"]) == 64 and arguments["img_size"] == [32, 24]
    np.testing.assert_allclose((prepared["mean"], prepared["std"]), ([128 / 255] * 3, [0.2] * 3))
    assert prepared["license"] == "mit" and prepared["input_size"] == [3, 32, 24]
    again = convert.convert(tmp_path / "folder", tmp_path / "again")["config"]  # the folder comes back as it went
    assert again["objective"]["encoder"]["heads"] == 3 and again["image_size"] == (32, 24)
    assert again["modalities"]["rgb"]["scale"] == 1.0


# ------------------------------------------------------------------------------------------ the card, and mistakes


def test_a_card_says_what_the_checkpoint_records(tmp_path):
    config = config_of(**CLASSES)
    source = dict(file="vit.pth", sha256="ab12", family="ViT", epochs_done=100)
    saved(tmp_path / "imported", config, source=source, licence="CC-BY-NC 4.0")
    run = dict(config, global_batch=64, total="100 epochs", optimizer=dict(base_lr=1e-3), init_from=dict(path="checkpoints/mae_b"))
    run["data"] = dict(train=dict(name="pets"))
    saved(tmp_path / "run", run, data=dict(records=3680))
    saved(tmp_path / "odd", config, licence='House "A"')
    cards = {}
    for name in ("imported", "run", "odd"):
        convert.export(tmp_path / name, tmp_path / f"{name}_timm", "timm")
        cards[name] = (tmp_path / f"{name}_timm" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in cards["imported"] and "Not for commercial use." in cards["imported"]
    assert "- converted from `vit.pth` (SHA-256 ab12), ViT\n- epochs before that: 100" in cards["imported"]
    assert "license:" not in cards["run"] and "the licence of those weights holds on" in cards["run"]
    assert "- data: pets, 3,680 records" in cards["run"] and "- length of the run: 100 epochs, 64 samples a step" in cards["run"]
    assert "of the task classification" in cards["run"] and 'timm.create_model("local-dir:run_timm"' in cards["run"]
    assert "license: other\nlicense_name: \"House 'A'\"" in cards["odd"]
    assert "The checkpoint records nothing of it." in cards["odd"]


def test_the_licence_goes_through_a_run_into_its_card_and_its_files(tmp_path):
    config, source = config_of(**CLASSES), dict(file="vit.pth", sha256="ab12", family="ViT", epochs_done=100)
    saved(tmp_path / "imported", config, source=source, licence="CC-BY-NC 4.0")
    run = dict(config, global_batch=64, total="100 epochs", optimizer=dict(base_lr=1e-3), init_from=dict(path="imported"))
    saved(tmp_path / "run", run, **load_origin(tmp_path / "imported"))
    convert.export(tmp_path / "run", tmp_path / "folder", "timm")
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card and "Not for commercial use." in card
    assert "CC-BY-NC 4.0, as the checkpoint records it of the weights that it started from." in card
    assert "- started from the weights in `imported`\n- these weights were converted from `vit.pth` (SHA-256 ab12), ViT\n" in card
    assert "- converted from" not in card
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["pretrained_cfg"]["license"] == "cc-by-nc-4.0"
    # A file of ours notes it, and it comes back.
    assert convert.convert(tmp_path / "folder", tmp_path / "again")["licence"] == "CC-BY-NC 4.0"
    saved(tmp_path / "free", config)
    convert.export(tmp_path / "free", tmp_path / "free.safetensors", "timm")
    assert convert.convert(tmp_path / "free.safetensors", tmp_path / "free_again")["licence"] is None


def test_folders_that_cannot_be(tmp_path, capsys):
    assert command.FOLDERS == FOLDERS
    saved(tmp_path / "run", config_of(**CLASSES))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("kept")
    with pytest.raises(ConversionError, match="full: is there already; give a new folder"):
        convert.export(tmp_path / "run", tmp_path / "full", "timm")
    with pytest.raises(ConversionError, match="a folder is written for timm and huggingface"):
        convert.export(tmp_path / "run", tmp_path / "new", "mae")
    assert command.main(["--src", str(tmp_path / "run"), "--dst", str(tmp_path / "new"), "--to", "mae"]) == 2
    assert "a folder is written for timm and huggingface" in capsys.readouterr().err and not (tmp_path / "new").exists()
    with pytest.raises(ConversionError, match="classifies the mean of its tokens.*--to timm has both"):
        convert.export(tmp_path / "run", tmp_path / "new", "huggingface")
    saved(tmp_path / "mae", config_of(name="mae", inputs=("rgb",), outputs=("norm_rgb",), decoder=dict(DECODER)))
    with pytest.raises(ConversionError, match="is of pictures of 32 x 24, and a MAE at Hugging Face of square ones"):
        convert.export(tmp_path / "mae", tmp_path / "new", "huggingface")
    assert not (tmp_path / "new").exists()
