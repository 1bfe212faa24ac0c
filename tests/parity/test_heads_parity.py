"""The heads of fine-tuned MultiMAE models against numbers recorded from the PyTorch reference (no torch here)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.convert.reader import read_checkpoint
from maskvit.convert.source import Hints, Source
from maskvit.convert.task_heads import task_head, task_head_params
from maskvit.heads import HEADS
from maskvit.nn.layers import apply_with_statistics

FORWARD = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def golden(fixtures):
    with np.load(fixtures / "heads_tiny.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def source(fixtures):
    tensors = read_checkpoint(fixtures / "heads_tiny.pth")["model"]
    return Source("heads_tiny.pth", tensors, {name: name for name in tensors}, {})


def predict(source, task, tokens, size):
    """(head, its result on these tokens of a grid of 4 x 4, the global token last)."""
    head = task_head(source, task, Hints())
    module = HEADS[head.name].module(channels=head.channels, **head.options)
    maps = tuple(jnp.asarray(x[:, :16].reshape(2, 4, 4, 48)) for x in tokens)
    params = jax.tree.map(jnp.asarray, task_head_params(source, task, head)[head.name])
    run = jax.jit(lambda params, maps: apply_with_statistics(module, params, {}, maps, size, train=False)[0])
    return head, run(params, maps)


def test_convnext(source, golden):
    head, logits = predict(source, "semseg", [golden["encoder_tokens_last"]], (32, 32))
    assert (head.name, head.channels, head.width) == ("convnext", 5, 48) and not head.left_out
    assert head.options == dict(width=96, preds_per_patch=16, depth=2)
    np.testing.assert_allclose(logits.transpose(0, 3, 1, 2), golden["convnext_logits"], **FORWARD)


def test_dpt(source, golden):
    head, depth = predict(source, "depth", [golden[f"encoder_tokens_hook{i}"] for i in range(4)], (64, 64))
    assert (head.name, head.channels, head.width) == ("dpt", 1, 48)
    assert head.options == dict(form="regression", width=24, layer_dims=(8, 16, 32, 64))
    np.testing.assert_allclose(depth.transpose(0, 3, 1, 2), golden["dpt_depth"], **FORWARD)
    units = {f"output_adapters.depth.scratch.refinenet4.resConfUnit1.conv{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    assert set(head.left_out) == units
