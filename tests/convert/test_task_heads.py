"""Heads out of fine-tuned MultiMAE models: every key once or named, and what they compute, from the file's own names."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.convert.reader import ConversionError, read_checkpoint
from maskvit.convert.rules import key_shapes, path_shapes, to_torch
from maskvit.convert.source import Hints, Source
from maskvit.convert.task_heads import task_head, task_head_params
from maskvit.core.types import tree_paths
from maskvit.heads import HEADS, head_options
from maskvit.nn.layers import apply

RNG = np.random.default_rng(0)
WIDTH_IN, GRID = 12, (3, 4)


def draw(*shape):
    return (RNG.standard_normal(shape) / math.sqrt(max(math.prod(shape[1:]), 1))).astype(np.float32)


def source_of(tensors):
    return Source("heads.pth", dict(tensors), {name: name for name in tensors}, {})


@pytest.fixture(scope="module")
def tiny(fixtures):
    return read_checkpoint(fixtures / "heads_tiny.pth")["model"]


def imported(tensors, task, hints=None):
    source = source_of(tensors)
    head = task_head(source, task, hints or Hints())
    return head, task_head_params(source, task, head)


def initialized(head):
    """Names and shapes of the parameters that our head of these options has."""
    row = HEADS[head.name]
    assert head_options("x", dict(name=head.name, **head.options), head.width, 1)[0] == head.name
    module = row.module(channels=head.channels, **head.options)
    params = jax.eval_shape(lambda key: module.init(key, *row.example(head.width, (2, 2), 1))["params"], jax.random.key(0))
    return {f"{head.name}/{name}": x.shape for name, x in tree_paths(params).items()}


def dpt_for_classes(tiny):
    """The tensors of the recorded DPT with the other form's last layers."""
    tensors = {name: x for name, x in tiny.items() if name.startswith("output_adapters.depth.") and ".head." not in name}
    key = "output_adapters.depth.head"
    return tensors | {f"{key}.0.weight": draw(24, 24, 3, 3), f"{key}.4.weight": draw(5, 24, 1, 1), f"{key}.4.bias": draw(5)}


def segmenter():
    """A state dict in the reference's names: 5 classes, width 16, 2 blocks."""
    width, classes, key = 16, 5, "output_adapters.semseg."
    shapes = {"cls_emb": (1, classes, width), "proj_dec.weight": (width, WIDTH_IN), "proj_dec.bias": (width,)}
    shapes |= {"patch_proj.weight": (width, width), "classes_proj.weight": (width, width)}
    shapes |= {f"decoder_norm.{part}": (width,) for part in ("weight", "bias")} | {
        f"mask_norm.{part}": (classes,) for part in ("weight", "bias")
    }
    for i in range(2):
        for name, (outputs, inputs) in {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}.items():
            shapes |= {f"blocks.{i}.{name}.weight": (outputs * width, inputs * width), f"blocks.{i}.{name}.bias": (outputs * width,)}
        shapes |= {f"blocks.{i}.{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
    return {key + name: draw(*shape) for name, shape in shapes.items()}


def test_sizes_and_names(tiny):
    """What each file's head becomes is exactly what our head of these options has, and all its keys are used or named."""
    for tensors, task, keys, options in (
        (tiny, "semseg", 20, dict(width=96, preds_per_patch=16, depth=2)),
        (tiny, "depth", 82, dict(form="regression", width=24, layer_dims=(8, 16, 32, 64))),
        (dpt_for_classes(tiny), "depth", 79, dict(form="segmentation", width=24, layer_dims=(8, 16, 32, 64))),
        (segmenter(), "semseg", 33, dict(width=16, depth=2, heads=2)),
    ):
        head, params = imported(tensors, task, Hints(decoder_num_heads=2))
        used = [key for rule in head.rules for key in rule.keys] + list(head.left_out)
        theirs = [name for name in tensors if name.startswith(f"output_adapters.{task}.")]
        assert sorted(used) == sorted(theirs) and len(theirs) == keys
        assert head.options == options
        assert {name: x.shape for name, x in tree_paths(params).items()} == initialized(head) == path_shapes(head.rules)
        back = to_torch(head.rules, params, "back")
        assert back.keys() == key_shapes(head.rules).keys()
        for name, value in back.items():
            np.testing.assert_array_equal(value, tensors[name], err_msg=name)


def numpy_segmenter(state, tokens, heads):
    """Logits (b, n, classes) by the file's own names."""
    of = {name.removeprefix("output_adapters.semseg."): x.astype(np.float64) for name, x in state.items()}

    def linear(name, x):
        return x @ of[f"{name}.weight"].T + of.get(f"{name}.bias", 0.0)

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * of[f"{name}.weight"] + of[f"{name}.bias"]

    def attention(name, x):
        b, n, d = x.shape
        q, k, v = linear(f"{name}.qkv", x).reshape(b, n, 3, heads, d // heads).transpose(2, 0, 3, 1, 4)
        weights = np.exp(q @ k.swapaxes(-1, -2) / math.sqrt(d // heads))
        weights /= weights.sum(-1, keepdims=True)
        return linear(f"{name}.proj", (weights @ v).swapaxes(1, 2).reshape(b, n, d))

    def gelu(x):
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    x = linear("proj_dec", tokens)
    n = x.shape[1]
    x = np.concatenate([x, np.broadcast_to(of["cls_emb"], (len(x), *of["cls_emb"].shape[1:]))], axis=1)
    for i in range(2):
        x = x + attention(f"blocks.{i}.attn", norm(f"blocks.{i}.norm1", x))
        x = x + linear(f"blocks.{i}.mlp.fc2", gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))))
    x = norm("decoder_norm", x)
    patches, classes = linear("patch_proj", x[:, :n]), linear("classes_proj", x[:, n:])
    patches, classes = (part / np.linalg.norm(part, axis=-1, keepdims=True) for part in (patches, classes))
    return norm("mask_norm", patches @ classes.swapaxes(1, 2))


def test_segmenter_computes_the_same():
    state, tokens = segmenter(), draw(2, math.prod(GRID), WIDTH_IN)
    head, params = imported(state, "semseg", Hints(decoder_num_heads=2))
    module = HEADS["segmenter"].module(channels=head.channels, **head.options)
    params = jax.tree.map(jnp.asarray, params["segmenter"])
    # At the grid's own size nothing is resampled.
    logits = jax.jit(lambda p, x: apply(module, p, (x,), GRID))(params, jnp.asarray(tokens.reshape(2, *GRID, WIDTH_IN)))
    np.testing.assert_allclose(logits.reshape(2, -1, 5), numpy_segmenter(state, tokens, 2), rtol=1e-4, atol=1e-5)


def torch_dpt_for_classes(torch, state, maps):
    """The segmentation form with torch's functions, by the file's own names."""
    functional = torch.nn.functional
    of = {name.removeprefix("output_adapters.depth."): torch.tensor(np.asarray(x)) for name, x in state.items()}

    def conv(name, x, stride=1):
        weight = of[f"{name}.weight"]
        return functional.conv2d(x, weight, of.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def unit(name, x):
        return x + conv(f"{name}.conv2", functional.relu(conv(f"{name}.conv1", functional.relu(x))))

    def up(x):
        return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)

    levels = []
    for i, x in enumerate(maps, 1):
        x = conv(f"act_{i}_postprocess.0", x)
        if i < 3:
            name = f"act_{i}_postprocess.1"
            x = functional.conv_transpose2d(x, of[f"{name}.weight"], of[f"{name}.bias"], stride={1: 4, 2: 2}[i])
        elif i == 4:
            x = conv("act_4_postprocess.1", x, 2)
        levels.append(conv(f"scratch.layer{i}_rn", x))
    x = levels[3]
    for i in (4, 3, 2, 1):
        name = f"scratch.refinenet{i}"
        x = x if i == 4 else x + unit(f"{name}.resConfUnit1", levels[i - 1])
        x = conv(f"{name}.out_conv", up(unit(f"{name}.resConfUnit2", x)))
    return up(conv("head.4", functional.relu(conv("head.0", x)))).numpy()


def test_dpt_for_classes_computes_the_same(tiny):
    torch = pytest.importorskip("torch")
    state = dpt_for_classes(tiny)
    maps = [draw(2, 48, 4, 6) * 8 for _ in range(4)]
    expected = torch_dpt_for_classes(torch, state, [torch.tensor(x) for x in maps])
    head, params = imported(state, "depth")
    module = HEADS["dpt"].module(channels=head.channels, **head.options)
    ours = tuple(jnp.asarray(x.transpose(0, 2, 3, 1)) for x in maps)
    logits = jax.jit(lambda p, x: apply(module, p, x, (64, 96)))(jax.tree.map(jnp.asarray, params["dpt"]), ours)
    np.testing.assert_allclose(logits.transpose(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-5)


def test_heads_of_a_segmenter():
    """They leave no trace in the shapes: the flag, else 64 wide, which is said, else an error that names the flag."""
    state = segmenter()
    with pytest.raises(ConversionError, match="the Segmenter's width 16 is no multiple of 64: give --decoder-num-heads"):
        task_head(source_of(state), "semseg", Hints())
    hints = Hints()
    assert hints.segmenter_heads(768, "x") == 12
    assert hints.said == ["assumed: 12 heads in the Segmenter, as is usual at width 768; --decoder-num-heads changes it"]


DEPTH, SEMSEG = "output_adapters.depth", "output_adapters.semseg"


@pytest.mark.parametrize(
    "task,changes,message",
    [
        ("normal", {}, "has no head for the task 'normal': no key begins with 'output_adapters.normal.'"),
        ("depth", {f"{DEPTH}.act_postprocess.2.0.bias": 1.0}, "depth.act_postprocess.2.0.bias' differ, but this model has one tensor"),
        ("depth", {f"{DEPTH}.scratch.layer_rn.3.weight": 1.0}, "depth.scratch.layer4_rn.weight' and .* differ"),
        ("depth", {f"{DEPTH}.scratch.layer_rn.3.weight": None}, "1 tensors are missing: output_adapters.depth.scratch.layer_rn.3.weight"),
        ("depth", {f"{DEPTH}.head.1.weight": draw(24)}, "1 tensors are not part of this model: output_adapters.depth.head.1.weight"),
        ("semseg", {f"{SEMSEG}.blocks.1.gamma": draw(6)}, "1 tensors are not part of this model: output_adapters.semseg.blocks.1.gamma"),
        ("semseg", {f"{SEMSEG}.proj_dec.weight": draw(90, 48)}, "has 90 outputs, which are no square of places with 6 channels each"),
        ("semseg", {f"{SEMSEG}.final_layer.weight": None}, "the head of 'semseg' is none of convnext, segmenter, dpt"),
        ("semseg", {f"{SEMSEG}.proj_dec.weight": None}, "lacks 'output_adapters.semseg.proj_dec.weight'"),
    ],
)
def test_refusals(tiny, task, changes, message):
    """`changes`: a key's tensor plus a number, another tensor in its place, or None: without it."""
    tensors = dict(tiny)
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = tensors[key] + np.float32(value) if isinstance(value, float) else value
    with pytest.raises(ConversionError, match=message):
        imported(tensors, task)
