"""Grad-CAM of a ResNet and of a ViT against the same networks written in torch with its own gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from maskvit import convert
from maskvit.checkpoints import load_params
from maskvit.convert.reader import ConversionError
from maskvit.guidance.gradcam import class_activation, resnet_gradcam, vit_gradcam
from maskvit.nn.resnet import resnet_of
from tests.tiny import tiny_objective

DEPTHS, STEM, CLASSES = (1, 2, 1, 1), 4, 6


def resnet_state(seed: int = 0) -> dict[str, np.ndarray]:
    """A small bottleneck ResNet under torchvision's names, batch norms with statistics that matter."""
    rng = np.random.default_rng(seed)
    state: dict[str, np.ndarray] = {}

    def convolution(key: str, norm: str, channels_in: int, channels_out: int, side: int) -> None:
        scale = (2 / (channels_in * side**2)) ** 0.5
        state[f"{key}.weight"] = scale * rng.standard_normal((channels_out, channels_in, side, side))
        for part, low, high in (("weight", 0.5, 1.5), ("bias", -0.3, 0.3), ("running_mean", -0.3, 0.3), ("running_var", 0.5, 2.0)):
            state[f"{norm}.{part}"] = rng.uniform(low, high, channels_out)
        state[f"{norm}.num_batches_tracked"] = np.array(7)

    convolution("conv1", "bn1", 3, STEM, 7)
    channels = STEM
    for stage, depth in enumerate(DEPTHS):
        narrow = STEM * 2**stage
        for i in range(depth):
            at = f"layer{stage + 1}.{i}"
            for n, (c, k, side) in enumerate(((channels, narrow, 1), (narrow, narrow, 3), (narrow, 4 * narrow, 1)), 1):
                convolution(f"{at}.conv{n}", f"{at}.bn{n}", c, k, side)
            if not i:
                convolution(f"{at}.downsample.0", f"{at}.downsample.1", channels, 4 * narrow, 1)
            channels = 4 * narrow
    state |= {"fc.weight": rng.standard_normal((CLASSES, channels)), "fc.bias": rng.standard_normal(CLASSES)}
    return {key: value if value.dtype.kind == "i" else value.astype(np.float32) for key, value in state.items()}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """(network, parameters, state dict)"""
    folder, state = tmp_path_factory.mktemp("resnet"), resnet_state()
    save_file(state, folder / "x.safetensors")
    convert.convert(folder / "x.safetensors", folder / "ours")
    params, metadata = load_params(folder / "ours")
    assert metadata["source"]["family"] == "ResNet"
    return resnet_of(metadata["config"]), jax.tree.map(jnp.asarray, params), state


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)


def torch_gradcam(state, values, stage, classes):
    """(maps, logits): torchvision's forward pass with unfolded batch norms, and Grad-CAM by torch's gradients."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    w = {key: torch.from_numpy(np.array(value)) for key, value in state.items()}

    def convolution(x, key, norm, stride=1):
        kernel = w[f"{key}.weight"]
        x = functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        parts = (w[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, *parts, training=False, eps=1e-5)

    x = convolution(torch.from_numpy(np.array(values)).permute(0, 3, 1, 2), "conv1", "bn1", 2).relu()
    x = functional.max_pool2d(x, 3, 2, 1)
    for s, depth in enumerate(DEPTHS, 1):
        for i in range(depth):
            at, stride = f"layer{s}.{i}", 2 if s > 1 and not i else 1
            y = convolution(x, f"{at}.conv1", f"{at}.bn1").relu()
            y = convolution(y, f"{at}.conv2", f"{at}.bn2", stride).relu()
            y = convolution(y, f"{at}.conv3", f"{at}.bn3")
            x = (y + (convolution(x, f"{at}.downsample.0", f"{at}.downsample.1", stride) if not i else x)).relu()
        if s == stage:
            x = activation = x.detach().requires_grad_()
    logits = x.mean(dim=(2, 3)) @ w["fc.weight"].T + w["fc.bias"]
    chosen = logits.argmax(1) if classes is None else torch.tensor(classes)
    logits.gather(1, chosen[:, None]).sum().backward()
    maps = (activation.grad.mean(dim=(2, 3), keepdim=True) * activation).sum(1).relu().detach()
    return (maps / maps.amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)).numpy(), logits.detach().numpy()


@pytest.mark.parametrize("stage", [3, 4])
@pytest.mark.parametrize("classes", [None, [0, 5, 2]])
def test_resnet_as_in_torch(stage, classes, resnet, pictures):
    network, params, state = resnet
    values = network.prepare(jnp.asarray(pictures))
    expected, logits = torch_gradcam(state, values, stage, classes)
    np.testing.assert_allclose(network.logits(params, network.features(params, values)), logits, rtol=1e-4, atol=1e-4)
    given = None if classes is None else jnp.asarray(classes)
    maps = jax.jit(lambda p, v: resnet_gradcam(network, p, v, stage, given))(params, values)
    assert maps.shape == expected.shape == ((3, 4, 4) if stage == 3 else (3, 2, 2))
    np.testing.assert_allclose(maps, expected, atol=1e-4)
    assert 0 <= maps.min() and maps.max() <= 1


def test_resnet_files_that_are_not_whole(tmp_path):
    for change, message in (
        ({"layer2.0.bn2.running_var": None}, "missing: layer2.0.bn2.running_var"),
        ({"layer1.0.conv2.weight": None, "layer1.0.bn2.weight": None}, "missing: layer1.0.conv2.bias, layer1.0.conv2.weight"),
        ({"layer4.0.se.weight": np.zeros(3, np.float32)}, "not part of this model: layer4.0.se.weight"),
        ({"layer4.0.extra.weight": np.zeros((3, 3, 1, 1), np.float32)}, "'layer4.0.extra' is not part of a ResNet"),
        ({"bn1.bias": np.zeros(9, np.float32)}, "'bn1' does not fit 'conv1'"),
        ({"fc.weight": np.zeros((CLASSES, 9), np.float32)}, "another shape: fc.weight"),
        ({"conv1.weight": np.zeros((STEM, 1, 7, 7), np.float32)}, "no classifier of rgb"),
    ):
        save_file({k: v for k, v in (resnet_state() | change).items() if v is not None}, tmp_path / "x.safetensors")
        with pytest.raises(ConversionError, match=message):
            convert.convert(tmp_path / "x.safetensors", tmp_path / "ours")
    save_file(resnet_state(), tmp_path / "x.safetensors")
    assert "classifier  {'name': 'resnet', 'depths': (1, 2, 1, 1)" in convert.inspect(tmp_path / "x.safetensors")
    convert.convert(tmp_path / "x.safetensors", tmp_path / "ours")
    with pytest.raises(ConversionError, match="is a classifier"):
        convert.export(tmp_path / "ours", tmp_path / "y.safetensors")


def test_stages(resnet, pictures):
    network, params, _ = resnet
    with pytest.raises(ValueError, match="stage is 2; known: 3, 4"):
        resnet_gradcam(network, params, network.prepare(jnp.asarray(pictures)), 2)


# ------------------------------------------------------------------------------------------ a fine-tuned ViT


def vit(pool: str):
    model = tiny_objective(inputs=("rgb",), outputs=(), num_visible=4, final_norm=True, num_classes=5, pool=pool).model
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), model.init(jax.random.key(0)))
    return model, params, model.embed(params, {"rgb": jax.random.normal(jax.random.key(1), (3, 32, 32, 3))})


def torch_vit_gradcam(model, params, batch, classes):
    """Grad-CAM of our own parameters by torch's gradients, on the patch tokens behind the last block's first norm."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    w = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), params)
    linear = lambda p, x: x @ p["kernel"] + p["bias"]  # noqa: E731
    norm = lambda p, x: functional.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], 1e-6)  # noqa: E731
    x = torch.cat([torch.from_numpy(np.array(batch.tokens)), w["global_tokens"].expand(3, -1, -1)], 1)
    for i in range(2):
        at = w["encoder"][f"block_{i:02d}"]
        h = norm(at["norm1"], x).detach()
        if i == 1:
            h = activation = h.requires_grad_()
        q, k, v = (part.reshape(3, 17, 3, 16).transpose(1, 2) for part in linear(at["attn"]["qkv"], h).chunk(3, -1))
        h = ((q @ k.transpose(-1, -2) / 4).softmax(-1) @ v).transpose(1, 2).reshape(3, 17, 48)
        x = x + linear(at["attn"]["proj"], h)
        x = x + linear(at["mlp"]["fc2"], functional.gelu(linear(at["mlp"]["fc1"], norm(at["norm2"], x))))
    pooled = norm(w["norm"], x[:, -1] if model.pool == "global" else x[:, :-1].mean(1))
    logits = linear(w["head"], pooled)
    chosen = logits.argmax(1) if classes is None else torch.tensor(classes)
    logits.gather(1, chosen[:, None]).sum().backward()
    patches, gradient = activation[:, :16], activation.grad[:, :16]
    maps = (patches * gradient.mean(1, keepdim=True)).sum(-1).relu().detach()
    return (maps / maps.amax(1, keepdim=True).clamp_min(1e-30)).reshape(3, 4, 4).numpy()


@pytest.mark.parametrize("pool", ["global", "mean"])
@pytest.mark.parametrize("classes", [None, [4, 0, 2]])
def test_vit_as_in_torch(pool, classes):
    model, params, batch = vit(pool)
    given = None if classes is None else jnp.asarray(classes)
    maps = vit_gradcam(model, params, batch, given)
    np.testing.assert_allclose(maps, torch_vit_gradcam(model, params, batch, classes), atol=1e-4)
    assert maps.max() == 1


def test_models_without_a_classifier():
    model = tiny_objective().model
    params = model.init(jax.random.key(0))
    batch = model.embed(params, {"rgb": jnp.zeros((1, 32, 32, 3))})
    with pytest.raises(ValueError, match="num_classes is 0"):
        vit_gradcam(model, params, batch)
    both = dataclasses.replace(model, heads=(("head", (("num_classes", 3),)),))
    batch = both.embed(params, {"rgb": jnp.zeros((1, 32, 32, 3)), "depth": jnp.zeros((1, 32, 32, 1))})
    with pytest.raises(ValueError, match="reads one input, but this model has rgb, depth"):
        vit_gradcam(both, params, batch)


def test_what_speaks_against_the_class_is_zero():
    activation = jnp.array([[[[1.0], [2.0]], [[4.0], [0.0]]]])
    maps = class_activation(activation, lambda x: jnp.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3))], axis=1))
    np.testing.assert_allclose(maps[0], [[0.25, 0.5], [1.0, 0.0]])
    maps = class_activation(activation, lambda x: jnp.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3))], axis=1), jnp.array([1]))
    np.testing.assert_array_equal(maps, jnp.zeros((1, 2, 2)))
