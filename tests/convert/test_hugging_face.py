"""Hugging Face's ViTs: their keys in and out, and with `transformers` at hand their outputs."""

from __future__ import annotations

import functools
import json
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import maskvit
from maskvit import convert
from maskvit.checkpoints import load_params
from maskvit.convert.reader import ConversionError, read_checkpoint
from maskvit.core.types import tree_paths

SIZES = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8, num_channels=3
)  # fmt: skip
DECODER = dict(
    decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=64, norm_pix_loss=True
)  # fmt: skip
# Of the one block of a model of width 4, in the layout of the files at Hugging Face: (name, shape) behind "encoder.layer.0.".
BLOCK = {
    **{f"attention.attention.{part}": (4, 4) for part in ("query", "key", "value")},
    "attention.output.dense": (4, 4),
    "intermediate.dense": (8, 4),
    "output.dense": (4, 8),
    "layernorm_before": (4,),
    "layernorm_after": (4,),
}
# What transformers 5 calls the same in memory.
IN_MEMORY = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


@functools.cache
def vit_keys() -> dict[str, np.ndarray]:
    """A ViTModel of one block, with its pooler."""
    rng = np.random.default_rng(0)
    shapes = {"embeddings.cls_token": (1, 1, 4), "embeddings.position_embeddings": (1, 5, 4)}
    modules = {"embeddings.patch_embeddings.projection": (4, 3, 2, 2), "layernorm": (4,), "pooler.dense": (4, 4)}
    modules |= {f"encoder.layer.0.{name}": shape for name, shape in BLOCK.items()}
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def in_memory(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {}
    for key, value in state.items():
        key = key.replace("encoder.layer.", "layers.").replace("decoder_encoder.layer.", "decoder_layers.")
        name, _, part = key.rpartition(".")
        for old, new in IN_MEMORY.items():
            if ("layers." in name) and name.endswith(old):
                name = name.removesuffix(old) + new
                break
        renamed[f"{name}.{part}" if name else part] = value
    return renamed


def test_a_small_list_of_keys(tmp_path):
    """Without transformers: where query, key and value go, and which tensors are left out."""
    state = vit_keys()
    save_file(state, tmp_path / "model.safetensors")
    convert.convert(tmp_path, tmp_path / "ours", num_heads=2)
    params, _ = load_params(tmp_path / "ours")
    block = params["encoder"]["block_00"]
    for i, part in enumerate(("query", "key", "value")):
        key = f"encoder.layer.0.attention.attention.{part}"
        np.testing.assert_array_equal(block["attn"]["qkv"]["kernel"][:, 4 * i : 4 * i + 4], state[f"{key}.weight"].T)
        np.testing.assert_array_equal(block["attn"]["qkv"]["bias"][4 * i : 4 * i + 4], state[f"{key}.bias"])
    for path, key in (
        ("attn/proj", "attention.output.dense"),
        ("mlp/fc1", "intermediate.dense"),
        ("mlp/fc2", "output.dense"),
    ):
        np.testing.assert_array_equal(tree_paths(block)[f"{path}/kernel"], state[f"encoder.layer.0.{key}.weight"].T)
    np.testing.assert_array_equal(block["norm1"]["scale"], state["encoder.layer.0.layernorm_before.weight"])
    np.testing.assert_array_equal(block["norm2"]["bias"], state["encoder.layer.0.layernorm_after.bias"])
    assert "left out  pooler.dense.weight" in (tmp_path / "ours" / "conversion.txt").read_text()
    convert.export(tmp_path / "ours", tmp_path / "back" / "model.safetensors", "huggingface")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == {key for key in state if not key.startswith("pooler")}
    joined = ("embeddings.cls_token", "embeddings.position_embeddings")  # the class token's row is added to the token
    assert all(np.array_equal(back[key], state[key]) for key in back if key not in joined)
    with pytest.raises(ConversionError, match="config.json: is there already"):
        convert.export(tmp_path / "ours", tmp_path / "back" / "other.safetensors", "huggingface")


@pytest.mark.parametrize("prefix", ["", "vit.", "module.vit."])
def test_names_of_both_generations(prefix, tmp_path):
    state = {key: value for key, value in vit_keys().items() if not key.startswith("pooler")}
    save_file({prefix + key: value for key, value in state.items()}, tmp_path / "a.safetensors")
    save_file({prefix + key: value for key, value in in_memory(state).items()}, tmp_path / "b.safetensors")
    for name in "ab":
        convert.convert(tmp_path / f"{name}.safetensors", tmp_path / name, num_heads=2)
    first, second = (tree_paths(load_params(tmp_path / name)[0]) for name in "ab")
    assert first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def test_config_json_says_heads_and_target(fixtures, tmp_path):
    convert.convert(fixtures / "mae_tiny_full.pth", tmp_path / "ours", 3, 4, target="normalized")
    convert.export(tmp_path / "ours", tmp_path / "hub" / "model.safetensors", "huggingface")
    written = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert written["model_type"] == "vit_mae" and written["norm_pix_loss"] is True and written["layer_norm_eps"] == 1e-6
    metadata = convert.convert(tmp_path / "hub", tmp_path / "again")  # the folder; no flag
    objective = metadata["config"]["objective"]
    assert objective["encoder"]["heads"] == 3 and objective["decoder"]["heads"] == 4 and objective["outputs"] == ("norm_rgb",)
    theirs = read_checkpoint(fixtures / "mae_tiny_full.pth")["model"]
    back = load_file(tmp_path / "hub" / "model.safetensors")
    np.testing.assert_array_equal(back["decoder.decoder_layers.1.layernorm_after.bias"], theirs["decoder_blocks.1.norm2.bias"])
    np.testing.assert_array_equal(back["vit.embeddings.position_embeddings"], theirs["pos_embed"])
    (tmp_path / "hub" / "config.json").write_text(json.dumps({**written, "hidden_act": "quick_gelu"}))
    with pytest.raises(ConversionError, match="config.json: hidden_act is 'quick_gelu'"):
        convert.convert(tmp_path / "hub", tmp_path / "other")


def test_what_has_no_form_there(fixtures, tmp_path):
    convert.convert(fixtures / "mae_tiny_finetuned.pth", tmp_path / "pooled", 3)
    convert.convert(fixtures / "crossmae_tiny.pth", tmp_path / "cross", 3, 4, target="raw")
    for name, message in (("pooled", "classifies the mean of its tokens"), ("cross", "has no final norm")):
        with pytest.raises(ConversionError, match=f"{message}.*no form in the layout 'huggingface'"):
            convert.export(tmp_path / name, tmp_path / "x.safetensors", "huggingface")


# ------------------------------------------------------------------------------------------ against transformers


@pytest.fixture(scope="module")
def transformers():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pytest.importorskip("torch")
    return pytest.importorskip("transformers", reason="pip install transformers")


def spread(model, seed: int = 0):
    """Random weights of a size that makes features of order 1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "decoder_pos_embed" not in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
        table = dict(model.named_parameters()).get("vit.embeddings.position_embeddings")
        if table is not None and hasattr(model, "decoder"):
            table[:, 0] = 0  # MAE's class token has no position
    return model.eval()


def saved(model, folder):
    """As a user's file: the model's own `save_pretrained`."""
    model.save_pretrained(folder)
    return folder


def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)


def encoded(folder):
    loaded = maskvit.load(folder)
    batch = loaded.model.embed(loaded.params, {"rgb": jnp.asarray(images().transpose(0, 2, 3, 1))})
    return loaded, loaded.model.encode(loaded.params, batch.tokens)


def close(ours, theirs) -> None:
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-4)


def test_features_of_a_vit(transformers, tmp_path):
    import torch

    model = spread(transformers.ViTModel(transformers.ViTConfig(**SIZES)))
    convert.convert(saved(model, tmp_path / "hub"), tmp_path / "ours")
    _, ours = encoded(tmp_path / "ours")
    theirs = model(torch.from_numpy(images())).last_hidden_state
    close(ours[:, -1], theirs[:, 0])
    close(ours[:, :-1], theirs[:, 1:])


def test_logits_of_a_classifier_and_back(transformers, tmp_path):
    import torch

    model = spread(transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, num_labels=5)))
    convert.convert(saved(model, tmp_path / "hub"), tmp_path / "ours")
    loaded, ours = encoded(tmp_path / "ours")
    theirs = model(torch.from_numpy(images())).logits
    close(loaded.model.logits(loaded.params, ours), theirs)
    convert.export(tmp_path / "ours", tmp_path / "back" / "model.safetensors", "huggingface")
    again, info = transformers.ViTForImageClassification.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    close(theirs.detach().numpy(), again.eval()(torch.from_numpy(images())).logits)


def test_features_of_a_mae(transformers, tmp_path):
    import torch

    model = spread(transformers.ViTMAEModel(transformers.ViTMAEConfig(**SIZES, **DECODER, mask_ratio=0.0)))
    convert.convert(saved(model, tmp_path / "hub"), tmp_path / "ours")
    _, ours = encoded(tmp_path / "ours")
    noise = torch.arange(16.0)[None].expand(2, -1)  # in their order
    theirs = model(torch.from_numpy(images()), noise=noise).last_hidden_state
    close(ours[:, -1], theirs[:, 0])
    close(ours[:, :-1], theirs[:, 1:])


def test_a_whole_mae_and_back(transformers, tmp_path):
    import torch

    model = spread(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SIZES, **DECODER)))
    metadata = convert.convert(saved(model, tmp_path / "hub"), tmp_path / "ours")
    assert metadata["config"]["objective"]["outputs"] == ("norm_rgb",) and metadata["source"]["family"] == "MAE"
    convert.export(tmp_path / "ours", tmp_path / "back" / "model.safetensors", "huggingface")
    again, info = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
    first, second = (m.eval()(torch.from_numpy(images()), noise=noise).logits for m in (model, again))
    close(first.detach().numpy(), second)
    keys = [re.sub(r"\d+", "0", key) for key in load_file(tmp_path / "back" / "model.safetensors")]
    assert "decoder.decoder_layers.0.attention.attention.query.weight" in keys
