"""A step of fine-tuning as MAE's script takes it, in torch: gradients and updates of every layer of the recorded classifier."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskvit import convert
from maskvit.checkpoints import load_params
from maskvit.convert.reader import read_checkpoint
from maskvit.core.keys import sample_keys
from maskvit.core.types import TrainState, batch_of, tree_paths
from maskvit.nn.backbone import frozen_mask
from maskvit.objectives import build_objective
from maskvit.optim import build_optimizer
from maskvit.training.step import gradients, train_step

torch = pytest.importorskip("torch")

DEPTH, HEADS, CLASSES, DECAY, RATE = 3, 3, 5, 0.65, 1e-2
LABELS = np.array([4, 0, 2, 1, 3, 3, 0, 2])


def forward(state, images):
    """The ViT of MAE's fine-tuning: class token in front, the mean of the patch tokens, fc_norm, head."""
    functional = torch.nn.functional
    norm = lambda x, name: functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)  # noqa: E731
    linear = lambda x, name: functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
    x = functional.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    for i in range(DEPTH):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + linear(attended.transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        x = x + linear(functional.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
    return linear(norm(x[:, 1:].mean(1), "fc_norm"), "head")


def scale(name: str) -> float:
    """MAE's rule: tokens, positions and patches are layer 0, block i is layer i + 1, all else is the last."""
    layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else DEPTH + 1
    return DECAY ** (DEPTH + 1 - (0 if name.startswith(("cls_token", "pos_embed", "patch_embed")) else layer))


def as_ours(state, path):
    """Tensors under the reference's names as a tree under ours, by the converter."""
    torch.save({"model": {name: x.detach().clone() for name, x in state.items()}}, path / "model.pth")
    convert.convert(path / "model.pth", path / "ours", num_heads=HEADS)
    return tree_paths(load_params(path / "ours")[0])


def test_gradients_and_updates_of_every_layer(fixtures, tmp_path):
    images = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32)
    stored = read_checkpoint(fixtures / "mae_tiny_finetuned.pth")["model"]
    state = {name: torch.tensor(np.asarray(x)).requires_grad_() for name, x in stored.items()}
    before = as_ours(state, tmp_path)
    loss = torch.nn.functional.cross_entropy(forward(state, torch.tensor(images)), torch.tensor(LABELS), label_smoothing=0.1)
    loss.backward()
    (tmp_path / "gradients").mkdir(), (tmp_path / "after").mkdir()
    expected_gradients = as_ours({name: x.grad for name, x in state.items()}, tmp_path / "gradients")
    decayed = lambda name, x: x.ndim > 1 and name not in ("cls_token", "pos_embed")  # noqa: E731
    groups = [dict(params=[x], lr=RATE * scale(n), weight_decay=0.05 if decayed(n, x) else 0.0) for n, x in state.items()]
    torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8).step()
    expected = as_ours(state, tmp_path / "after")

    block = dict(
        name="supervised", encoder=dict(width=48, depth=DEPTH, heads=HEADS), positions="columns_first", train_positions=True,
        task=dict(name="classification", num_classes=CLASSES, smoothing=0.1),
    )  # fmt: skip
    objective = build_objective(dict(image_size=(32, 32), modalities=dict(rgb=dict(channels=3, patch=8)), objective=block))
    params = jax.tree.map(jnp.asarray, load_params(tmp_path / "ours")[0])
    no_decay = (".*bias", r".*norm\w*/scale", "global_tokens", ".*pos_embed")
    fixed = frozen_mask(params, objective.model)
    assert not any(jax.tree.leaves(fixed))
    optimizer = build_optimizer(
        params, fixed, lambda step: jnp.float32(RATE), b1=0.9, b2=0.999, weight_decay=0.05, no_decay=no_decay, layer_decay=DECAY
    )
    start = TrainState(jnp.int32(0), params, optimizer.tx.init(params), {}, jnp.int32(0))
    batch = batch_of(dict(rgb=jnp.asarray(images.transpose(0, 2, 3, 1)), label=jnp.asarray(LABELS, jnp.int32)))
    our_loss, grads, _, _ = gradients(start, batch, sample_keys(0, 0, 8), jax.random.key(0), objective, 1)
    assert float(our_loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    found_gradients = tree_paths(grads)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in found_gradients.items():
        if name == "global_tokens":  # the class token and its position are one parameter here: the gradients of both are this one
            gradient = 2 * gradient
        np.testing.assert_allclose(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5, err_msg=name)

    after, _ = train_step(start, batch, objective=objective, optimizer=optimizer, seed=0)
    for name, value in tree_paths(after.params).items():
        if name == "global_tokens":  # two parameters move there, each by the rate
            continue
        told = np.abs(expected_gradients[name]) > 1e-6  # Adam's first step of a gradient that is rounding is a step of noise
        assert told.any() and np.abs(value - before[name])[told].max() > 1e-4
        np.testing.assert_allclose(value[told], expected[name][told], rtol=0, atol=2e-5, err_msg=name)
