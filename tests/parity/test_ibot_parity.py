"""iBOT against numbers recorded from the PyTorch reference: teacher, student, both losses, centers, gradients (no torch here)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.convert.reader import read_checkpoint
from maskvit.core.keys import sample_keys
from maskvit.core.types import batch_of, tree_paths
from maskvit.heads.values import prepare
from maskvit.nn.backbone import frozen_mask
from maskvit.objectives import build_objective
from maskvit.objectives.distillation import teacher_params, views_of

FORWARD = dict(rtol=1e-4, atol=1e-5)
GRADIENT = dict(rtol=1e-3, atol=1e-5)
EPOCHS, EPOCH_STEPS = 100, 10
OBJECTIVE = build_objective(
    dict(
        image_size=(32, 32),
        modalities=dict(rgb=dict(channels=3, patch=8)),  # the recorded images are model values
        objective=dict(
            name="ibot",
            encoder=dict(width=48, depth=3, heads=3),
            projection=dict(hidden=40, bottleneck=16, num_prototypes=24),
            guidance=dict(name="block_mask", ratio=0.3, ratio_var=0.2),  # masks come with the batch, as the recorded ones do
            teacher_temperature=(0.04, 0.07),
            patch_temperature=(0.04, 0.07),
            temperature_warmup="30 epochs",
            drop_path=0.0,
        ),
    )
).resolve({"1 epochs": EPOCH_STEPS, "100 percent": EPOCHS * EPOCH_STEPS, "30 epochs": 30 * EPOCH_STEPS}.get)
MODEL = OBJECTIVE.model


def ours(state: dict[str, np.ndarray]) -> dict:
    """Tensors under the reference's names (of parameters or of gradients) as our tree."""
    state = {key.removeprefix("module."): np.asarray(value) for key, value in state.items()}
    get = lambda key: state.pop(key)  # noqa: E731
    linear = lambda key: {"kernel": get(f"{key}.weight").T, "bias": get(f"{key}.bias")}  # noqa: E731
    norm = lambda key: {"scale": get(f"{key}.weight"), "bias": get(f"{key}.bias")}  # noqa: E731
    table = get("backbone.pos_embed")[0]
    kernel = get("backbone.patch_embed.proj.weight")
    rgb = {
        "proj": {"kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0]), "bias": get("backbone.patch_embed.proj.bias")},
        "learned_pos_embed": table[1:].reshape(4, 4, -1),
    }
    if "backbone.masked_embed" in state:
        rgb["mask_embed"] = get("backbone.masked_embed")[0]
    blocks = {}
    for i in range(3):
        name = f"backbone.blocks.{i}"
        blocks[f"block_{i:02d}"] = {
            "norm1": norm(f"{name}.norm1"),
            "attn": {"qkv": linear(f"{name}.attn.qkv"), "proj": linear(f"{name}.attn.proj")},
            "norm2": norm(f"{name}.norm2"),
            "mlp": {"fc1": linear(f"{name}.mlp.fc1"), "fc2": linear(f"{name}.mlp.fc2")},
        }
    tree = {
        "inputs": {"rgb": rgb},
        "outputs": {},
        "global_tokens": get("backbone.cls_token")[0],
        "global_pos_embed": table[:1],
        "encoder": blocks,
        "norm": norm("backbone.norm"),
        "projection": {
            "fc1": linear("head.mlp.0"),
            "fc2": linear("head.mlp.2"),
            "fc3": linear("head.mlp.4"),
            "prototypes": {"kernel": get("head.last_layer.weight_v").T, "scale": get("head.last_layer.weight_g")[:, 0]},
        },
    }
    tied = {key for key in state if key.startswith("head.last_layer2")}
    assert set(state) == tied
    return jax.tree.map(jnp.asarray, tree)


@pytest.fixture(scope="module")
def golden(fixtures):
    with np.load(fixtures / "ibot_tiny.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def checkpoint(fixtures):
    return read_checkpoint(fixtures / "ibot_tiny.pth")


@pytest.fixture(scope="module")
def params(checkpoint):
    return ours(checkpoint["student"])


@pytest.fixture(scope="module")
def teacher(checkpoint):
    return ours(checkpoint["teacher"])


@pytest.fixture(scope="module")
def batch(golden):
    stacked = lambda name: np.stack([golden[f"{name}_0"], golden[f"{name}_1"]], axis=1)  # noqa: E731
    images = {f"{kind}/rgb": stacked(kind).transpose(0, 1, 3, 4, 2) for kind in ("global", "local")}
    return batch_of(jax.tree.map(jnp.asarray, images | {"guidance": stacked("masked").astype(np.float32)}))


@pytest.fixture(scope="module")
def start(teacher):
    zeros = jnp.zeros(24)
    return {"teacher": teacher, "center": zeros, "patch_center": zeros}


def recorded(golden, name: str) -> np.ndarray:
    """Rows recorded view by view, as ours: the views of an image side by side."""
    rows = golden[name]
    return rows.reshape(2, 3, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


def test_the_model_has_the_files_parameters(params, teacher):
    shapes = lambda tree: {name: x.shape for name, x in tree_paths(tree).items()}  # noqa: E731
    fresh, state = jax.eval_shape(OBJECTIVE.init, jax.random.key(0))
    assert shapes(fresh) == shapes(params)
    assert shapes(state["teacher"]) == shapes(teacher) == shapes(teacher_params(params))
    assert not any(jax.tree.leaves(frozen_mask(params, MODEL)))


def test_teacher_outputs_and_attention_come_from_one_pass(teacher, batch, golden):
    prepared = prepare(MODEL, views_of(batch, "global"))
    tokens = MODEL.embed(teacher, prepared.values_of(("rgb",)))
    encoded, weights = jax.jit(lambda p, t: MODEL.encode_with_attention(p, t, slice(None)))(teacher, tokens.tokens)
    np.testing.assert_allclose(encoded, MODEL.encode(teacher, tokens.tokens), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(MODEL.project(teacher, encoded[:, 16]), recorded(golden, "teacher_cls"), **FORWARD)
    np.testing.assert_allclose(MODEL.project(teacher, encoded[:, :16], patches=True), recorded(golden, "teacher_patch"), **FORWARD)
    # The reference has its class token first.
    attention = np.roll(recorded(golden, "teacher_attention"), -1, axis=(2, 3))
    np.testing.assert_allclose(weights, attention, **FORWARD)
    seen = OBJECTIVE.teacher_pass(teacher, prepared)
    np.testing.assert_allclose(seen.attention, attention[:, :, -1, :16].mean(axis=1), **FORWARD)
    np.testing.assert_allclose(seen.encoded, encoded, **FORWARD)


def test_student_outputs(params, batch, golden):
    large = prepare(MODEL, views_of(batch, "global"))
    masked = batch.maps.reshape(6, 16) > 0.5
    encoded = MODEL.encode(params, MODEL.embed(params, large.values, masked=masked).tokens)
    np.testing.assert_allclose(MODEL.project(params, encoded[:, 16]), recorded(golden, "student_cls"), **FORWARD)
    np.testing.assert_allclose(MODEL.project(params, encoded[:, :16], patches=True), recorded(golden, "student_patch"), **FORWARD)
    small = prepare(MODEL, views_of(batch, "local"))
    crops = MODEL.encode(params, MODEL.embed(params, small.values).tokens)
    assert crops.shape[1] == 5
    np.testing.assert_allclose(MODEL.project(params, crops[:, -1]), recorded(golden, "student_local_cls"), **FORWARD)


@pytest.fixture(scope="module")
def evaluate(params, batch):
    """(state, step) -> ((loss, (observed, metrics)), gradients)."""
    grad = jax.jit(jax.value_and_grad(lambda p, state, step: OBJECTIVE.loss(p, state, batch, sample_keys(0, 0, 3), step), has_aux=True))
    return lambda state, step: grad(params, state, jnp.int32(step))


def test_losses_and_centers_over_two_steps(evaluate, params, batch, start, golden):
    state = start
    for number in range(2):
        step = int(golden[f"step{number}_epoch"]) * EPOCH_STEPS
        (loss, (observed, metrics)), _ = evaluate(state, step)
        for name, theirs in (("global", "cls"), ("patch", "patch")):
            total, count = metrics[f"loss/{name}"]
            np.testing.assert_allclose(total / count, golden[f"step{number}_{theirs}"], **FORWARD)
        np.testing.assert_allclose(loss, golden[f"step{number}_loss"], **FORWARD)
        after = OBJECTIVE.after_update(state, params, batch, sample_keys(0, 0, 3), jnp.int32(step), observed, metrics)
        np.testing.assert_allclose(after["center"], golden[f"step{number}_center"][0], **FORWARD)
        np.testing.assert_allclose(after["patch_center"], golden[f"step{number}_center2"][0, 0], **FORWARD)
        # The second recorded step has the networks' outputs of the first.
        state = dict(after, teacher=start["teacher"])


def test_gradients_of_every_parameter(evaluate, start, golden):
    gradients = tree_paths(evaluate(start, 0)[1])
    expected = tree_paths(ours({key.removeprefix("grad/"): value for key, value in golden.items() if key.startswith("grad/")}))
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], **GRADIENT, err_msg=name)
