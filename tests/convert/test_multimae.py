"""MultiMAE files to our parameters and back: key for key, bit for bit, moments included."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maskvit import convert
from maskvit.checkpoints import load_adam, load_params
from maskvit.convert import multimae
from maskvit.convert.reader import ConversionError, read_checkpoint, sha256
from maskvit.convert.rules import to_ours, to_torch
from maskvit.convert.source import Hints, Source
from maskvit.core.types import tree_paths
from maskvit.nn.backbone import count_parameters
from maskvit.objectives import build_objective
from tests.runs import ROOT


@pytest.fixture(scope="module")
def tiny(request):
    return ROOT / "tests" / "fixtures" / "multimae_tiny_public.pth"


def test_public_form(tiny, tmp_path):
    metadata = convert.convert(tiny, tmp_path / "ours", num_heads=3, decoder_num_heads=4)
    params, stored = load_params(tmp_path / "ours")
    assert stored["source"]["sha256"] == sha256(tiny) and stored["source"]["epochs_done"] is None
    assert load_adam(tmp_path / "ours") is None
    assert metadata["config"]["objective"]["encoder"] == dict(width=48, depth=3, heads=3, mlp_ratio=4.0)
    assert metadata["config"]["modalities"]["semseg"]["num_classes"] == 7 and metadata["config"]["modalities"]["semseg"]["stride"] == 4
    state = read_checkpoint(tiny)["model"]
    kernel = state["input_adapters.rgb.proj.weight"]  # (out, channel, row, column)
    np.testing.assert_array_equal(params["inputs"]["rgb"]["proj"]["kernel"].reshape(8, 8, 3, 48)[5, 2, 1], kernel[:, 1, 5, 2])
    head = state["output_adapters.semseg.out_proj.weight"].reshape(7, 2, 2, 16)  # (class, row, column, in)
    np.testing.assert_array_equal(params["outputs"]["semseg"]["head"]["kernel"].reshape(16, 2, 2, 7)[:, 1, 0, 4], head[4, 1, 0])
    bias = state["output_adapters.rgb.out_proj.bias"].reshape(3, 8, 8)
    np.testing.assert_array_equal(params["outputs"]["rgb"]["head"]["bias"].reshape(8, 8, 3)[6, 1, 2], bias[2, 6, 1])
    objective = build_objective(stored["config"])
    shapes = jax.eval_shape(lambda key: objective.init(key)[0], jax.random.key(0))
    assert {k: v.shape for k, v in tree_paths(shapes).items()} == {k: v.shape for k, v in tree_paths(params).items()}


def test_training_form_brings_moments_and_epochs(fixtures, tmp_path):
    convert.convert(fixtures / "multimae_tiny_training.pth", tmp_path / "ours", num_heads=3)
    adam = load_adam(tmp_path / "ours")
    assert int(adam["count"]) == 1 and load_params(tmp_path / "ours")[1]["source"]["epochs_done"] == 1600
    golden = np.load(fixtures / "multimae_tiny.npz")
    # After one step from zero moments, mu is 0.1 of the gradient and nu 0.05 of its square.
    kernel = adam["mu"]["encoder"]["block_01"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_allclose(kernel, 0.1 * golden["grad/encoder.1.mlp.fc1.weight"].T, rtol=1e-4, atol=1e-7)
    kernel = adam["nu"]["inputs"]["depth"]["proj"]["kernel"].reshape(8, 8, 1, 48)
    expected = 0.05 * golden["grad/input_adapters.depth.proj.weight"].transpose(2, 3, 1, 0) ** 2
    np.testing.assert_allclose(kernel, expected, rtol=1e-3, atol=1e-10)
    assert not [name for name in tree_paths(adam["mu"]) if name.endswith("pos_embed")]


def test_round_trip(tiny, tmp_path):
    convert.convert(tiny, tmp_path / "ours", 3, 4)
    convert.export(tmp_path / "ours", tmp_path / "back.safetensors")
    state, back = read_checkpoint(tiny)["model"], load_file(tmp_path / "back.safetensors")
    assert state.keys() == back.keys() and all(np.array_equal(state[k], back[k]) for k in state)
    convert.convert(tmp_path / "back.safetensors", tmp_path / "again", 3, 4)
    torch = pytest.importorskip("torch")
    convert.export(tmp_path / "again", tmp_path / "back.pth")
    loaded = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert list(loaded) == list(state) and all(np.array_equal(state[k], loaded[k].numpy()) for k in state)


def test_full_size(fixtures):
    shapes = json.loads((fixtures / "multimae_b_state_dict_shapes.json").read_text())
    rng = np.random.default_rng(0)
    state = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    config = multimae.infer_config(Source("file", state, {}, {}), Hints())
    assert config["objective"]["encoder"]["heads"] == 12 and config["objective"]["decoder"]["heads"] == 8
    assert tuple(config["image_size"]) == (224, 224) and config["objective"]["num_visible"] == 98
    rules = multimae.rules(config)
    assert [rule.keys[0] for rule in rules] == list(shapes)  # the reference's own order
    params = to_ours(rules, state, "file")
    assert count_parameters(params) == (98_569_360, 97_917_072)
    back = to_torch(rules, params, "ours")
    assert all(np.array_equal(back[key], state[key]) for key in shapes)


def tampered(change):
    state = dict(read_checkpoint(ROOT / "tests" / "fixtures" / "multimae_tiny_public.pth")["model"])
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("encoder.1.norm2.bias"), "1 tensors are missing: encoder.1.norm2.bias"),
        (lambda s: s.update({"encoder.0.gamma": np.zeros(3, np.float32)}), "not part of this model: encoder.0.gamma"),
        (
            lambda s: s.update({"encoder.0.norm1.bias": np.zeros(3, np.float32)}),
            r"another shape: encoder.0.norm1.bias \(3,\) instead of \(48,\)",
        ),
        (lambda s: s.update({"encoder.0.norm1.bias": np.zeros(48, np.int64)}), "holds int64 values"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("output_adapters")], "is MultiViT"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, tmp_path):
    save_file({k: np.ascontiguousarray(v) for k, v in tampered(change).items()}, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match=message):
        convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", 3, 4)
    assert not (tmp_path / "ours").exists()


def test_other_families_are_named(tmp_path):
    for keys, name in (
        (["cls_token", "mask_token", "decoder_pos_embed", "patch_embed.proj.weight"], "MAE"),
        (["global_tokens", "input_adapters.rgb.proj.weight"], "MultiViT"),
    ):
        save_file({key: np.zeros((1, 2), np.float32) for key in keys}, tmp_path / "x.safetensors")
        with pytest.raises(ConversionError, match=name):
            convert.convert(tmp_path / "x.safetensors", tmp_path / "ours")
        assert name in convert.inspect(tmp_path / "x.safetensors")


def test_heads_that_do_not_divide(tiny, tmp_path):
    with pytest.raises(ConversionError, match="give --num-heads"):
        convert.convert(tiny, tmp_path / "ours")
    with pytest.raises(ConversionError, match="does not divide into 5 heads"):
        convert.convert(tiny, tmp_path / "ours", 5, 4)


def test_command(tiny, tmp_path):
    command = [sys.executable, str(ROOT / "convert_torch_checkpoint.py"), "--src"]
    said = subprocess.run(
        [*command, str(tiny), "--num-heads", "3", "--decoder-num-heads", "4", "--inspect"], capture_output=True, text=True
    )
    assert said.returncode == 0 and "153,188 values of which 149,860 trained" in said.stdout and "semseg" in said.stdout
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    said = subprocess.run([*command, str(tmp_path / "page.pth"), "--dst", str(tmp_path / "x")], capture_output=True, text=True)
    assert said.returncode == 2 and said.stderr.startswith("error: ") and "Traceback" not in said.stderr


def test_non_square_grid():
    size = (24, 48)
    declared = {
        "rgb": dict(channels=3, patch=8),
        "normals": dict(channels=3, patch=8, loss="l1"),
        "semseg": dict(kind="categorical", num_classes=5, patch=8, stride=2, loss="cross_entropy", embed_dim=4),
    }
    block = dict(inputs=("rgb", "semseg", "normals"), outputs=("rgb", "norm_normals"), num_global_tokens=2, num_visible=5)
    block |= dict(encoder=dict(width=32, depth=1, heads=2, mlp_ratio=2.0), decoder=dict(width=16, depth=0, heads=1, mlp_ratio=4.0))
    config = dict(image_size=size, modalities=declared, objective=dict(name="multimae", **block))
    params = build_objective(config).init(jax.random.key(0))[0]
    state = to_torch(multimae.rules(config), params, "ours")
    inferred = multimae.infer_config(Source("file", state, {}, {}), Hints(2, 1, args={"num_encoded_tokens": 5}))
    assert tuple(inferred["image_size"]) == size and inferred["objective"]["encoder"] == block["encoder"]
    assert inferred["objective"]["inputs"] == block["inputs"] and inferred["modalities"]["semseg"]["stride"] == 2
    again = to_ours(multimae.rules(inferred), state, "file")
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True))
