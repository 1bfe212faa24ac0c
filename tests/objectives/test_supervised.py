"""Fine-tuning and probing: the model's answers, losses that add up, averaged weights, running statistics, and what a config may say."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MODALITIES, fresh_params, tiny_batch, tiny_config

from maskvit import convert
from maskvit.checkpoints import init_from, load_params, save_imported
from maskvit.checkpoints.manifest import CheckpointError
from maskvit.checkpoints.weights import format_report
from maskvit.core.keys import sample_keys, stream_keys
from maskvit.core.types import TrainState, batch_of, tree_paths
from maskvit.heads.values import prepare
from maskvit.objectives import build_objective
from maskvit.objectives.supervised import STATISTICS
from maskvit.training.step import gradients

ENCODER = dict(width=48, depth=2, heads=3)
CLASSES = dict(name="classification", num_classes=7)
PIXELS = dict(name="segmentation", target="semseg")
DEPTH = dict(name="regression", target="depth")
CONVNEXT = dict(name="convnext", width=64, preds_per_patch=16, depth=1)


def declared() -> dict[str, Any]:
    """The tiny modalities as targets need them: labels of every pixel, depth in units of its own."""
    modalities = copy.deepcopy(MODALITIES)
    modalities["semseg"].update(stride=1, missing=255)
    modalities["depth"].update(standardize=False, mean=(0.05,), std=(0.02,), missing=0.0)
    return modalities


def supervised(task: dict[str, Any], **objective: Any) -> Any:
    block = dict(dict(name="supervised", inputs=("rgb",), encoder=ENCODER, task=task), **objective)
    return build_objective(dict(image_size=(32, 32), modalities=declared(), objective=block))


def labeled(size: int = 8, seed: int = 0) -> Any:
    """Pictures with classes, some of them unknown, ids and depth of every pixel with holes."""
    rng = np.random.default_rng(seed)
    arrays = tiny_batch(size, seed)
    arrays["semseg"] = np.where(rng.random((size, 32, 32)) < 0.2, -1, rng.integers(0, 7, (size, 32, 32))).astype(np.int32)
    arrays["depth"][:, :5] = np.nan
    arrays["label"] = rng.integers(-1, 7, size).astype(np.int32)
    return jax.tree.map(jnp.asarray, batch_of(arrays))


WEIGHTS = (1.0, 2.0, 0.5, 1.0, 1.0, 1.0, 3.0)
BOTH = ("rgb", "semseg")
TASKS = [
    (CLASSES, dict(pool="all")),
    (dict(CLASSES, smoothing=0.1, class_weights=WEIGHTS), dict(head=dict(name="attentive", queries=4, batch_norm=False))),
    (PIXELS, dict(head=CONVNEXT)),
    (dict(DEPTH, loss="scale_and_shift_invariant"), dict(head=dict(name="linear", norm="none"), inputs=BOTH, read_from=BOTH)),
]


@pytest.mark.parametrize(("task", "options"), TASKS, ids=lambda value: value.get("name") if isinstance(value, dict) else None)
def test_parts_of_a_batch_add_up_to_the_whole(task, options):
    """The mean over all labels, however they are spread over micro-batches: loss, metrics and every gradient."""
    objective = supervised(task, **options)
    params = fresh_params(objective)
    state, batch, keys = objective.init_state(params), labeled(), sample_keys(0, 0, 8)
    whole = TrainState(jnp.int32(0), params, (), state, jnp.int32(0))
    one, two = (jax.jit(lambda b, k, n=n: gradients(whole, b, k, keys[0], objective, n))(batch, keys) for n in (1, 4))
    np.testing.assert_allclose(one[0], two[0], rtol=1e-5)
    for name, gradient in tree_paths(one[1]).items():
        np.testing.assert_allclose(gradient, tree_paths(two[1])[name], rtol=1e-3, atol=1e-6, err_msg=name)
    assert one[3].keys() == two[3].keys() and len(one[3]) == 1
    for name in one[3]:
        np.testing.assert_allclose(one[3][name], two[3][name], rtol=1e-5)


def test_a_fine_tuned_mae_answers_as_the_reference(fixtures, tmp_path):
    """The recorded classifier through the objective that would train it on: the mean of its patch tokens, a norm, a linear layer."""
    convert.convert(fixtures / "mae_tiny_finetuned.pth", tmp_path, num_heads=3)
    golden = np.load(fixtures / "mae_tiny_finetuned.npz")
    rgb = dict(channels=3, patch=8)
    block = dict(name="supervised", encoder=dict(width=48, depth=3, heads=3), positions="columns_first", task=dict(CLASSES, num_classes=5))
    objective = build_objective(dict(image_size=(32, 32), modalities=dict(rgb=rgb), objective=block))
    params, rows = init_from(fresh_params(objective), tmp_path, differences=objective.differences)
    assert {row.action for row in rows} == {"loaded"}
    images = golden["image"].transpose(0, 2, 3, 1).astype(np.float32)
    logits = objective.answers(params, {}, {"rgb": images})["logits"]
    np.testing.assert_allclose(logits, golden["finetuned_logits"], rtol=1e-4, atol=1e-5)


def test_pooling_over_all_tokens_is_multimaes():
    objective = supervised(CLASSES, pool="all")
    params, batch = fresh_params(objective), labeled()
    params["norm"] = {"scale": jnp.full(48, 1.3), "bias": jnp.full(48, -0.2)}
    model = objective.model
    values = (np.asarray(batch.values["rgb"], np.float64) / 255 - MODALITIES["rgb"]["mean"]) / MODALITIES["rgb"]["std"]
    tokens = np.asarray(model.encode(params, model.embed(params, {"rgb": jnp.asarray(values, jnp.float32)}).tokens), np.float64)
    assert tokens.shape[1] == 17  # the global token too
    mean = tokens.mean(axis=1)
    normed = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6) * 1.3 - 0.2
    expected = normed @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    np.testing.assert_allclose(objective.answers(params, {}, batch)["logits"], expected, rtol=1e-4, atol=1e-5)


def test_depth_is_answered_in_stored_units():
    objective = supervised(DEPTH, head=dict(name="linear", norm="none"))
    params, batch = fresh_params(objective), labeled()
    output, _ = objective._output(params, {}, {"rgb": prepare(objective.model, batch).values["rgb"]}, None)
    stored = objective.answers(params, {}, batch)["values"]
    assert stored.shape == (8, 32, 32, 1)
    np.testing.assert_allclose(stored, (np.asarray(output) * 0.02 + 0.05) * 65536, rtol=1e-5)


def test_averaged_weights_and_running_statistics_follow_accepted_steps_alone():
    objective = supervised(CLASSES, head=dict(name="probe"), ema_decay=0.9)
    params, batch = fresh_params(objective), labeled()
    state = objective.init_state(params)
    assert tree_paths(state["statistics"]).keys() and state["ema"]["encoder"] is not params["encoder"]
    metrics = {STATISTICS + name: (4.0 * (value + 1.0), jnp.float32(4)) for name, value in tree_paths(state["statistics"]).items()}
    moved = jax.tree.map(lambda x: x + 1.0, params)
    after = objective.after_update(state, moved, batch, sample_keys(0, 0, 8), jnp.int32(0), None, metrics, jnp.bool_(True))
    for name, value in tree_paths(after["ema"]).items():
        np.testing.assert_allclose(value, tree_paths(params)[name] + 0.1, rtol=1e-4, atol=1e-6)
    for name, value in tree_paths(after["statistics"]).items():
        np.testing.assert_allclose(value, tree_paths(state["statistics"])[name] + 1.0, rtol=1e-6)
    same = objective.after_update(state, moved, batch, sample_keys(0, 0, 8), jnp.int32(0), None, metrics, jnp.bool_(False))
    jax.tree.map(np.testing.assert_array_equal, same, state)
    loss = {"loss/classification": (jnp.ones(()), jnp.ones(()))}
    assert objective.summarize({**metrics, **loss}, jnp.int32(0)) == loss


def test_mixed_pictures_have_mixed_targets():
    """What is minimized is the cross-entropy of the mixed pictures against the mixed targets, over those that have a label."""
    objective = supervised(dict(CLASSES, mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.25))
    params, batch = fresh_params(objective), labeled()
    losses = []
    for seed in (0, 1):
        keys = sample_keys(seed, 0, 8)
        total, _ = objective.loss(params, {}, batch, keys, jnp.int32(0))
        key = stream_keys(stream_keys(keys[0], "part"), "mix")
        plain = prepare(objective.model, batch).values_of(("rgb",))
        values, targets = objective.task.augment(key, stream_keys(keys, "erase"), plain, batch)
        assert not np.array_equal(values["rgb"], plain["rgb"])
        output, targets = (np.asarray(x, np.float64) for x in (objective._output(params, {}, values, None)[0], targets))
        log_odds = output - np.log(np.exp(output).sum(axis=1, keepdims=True))
        assert float(total) == pytest.approx(-(targets * log_odds).sum(axis=1)[np.asarray(batch.label) >= 0].mean(), rel=1e-5)
        losses.append(float(total))
    assert losses[0] != losses[1]


# Beginning from other weights


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A MultiMAE as a checkpoint."""
    path = tmp_path_factory.mktemp("pretrained")
    config = tiny_config()
    save_imported(path, fresh_params(build_objective(config)), {"config": config})
    return path


def test_a_task_begins_from_any_pretrained_encoder(pretrained):
    """No list of expressions: decoders and other inputs are dropped, the head is fresh, and the report says so in a few lines."""
    objective = supervised(PIXELS, head=CONVNEXT)
    initial = fresh_params(objective, seed=1)
    params, rows = init_from(initial, pretrained, differences=objective.differences)
    stored, own = tree_paths(load_params(pretrained)[0]), tree_paths(params)
    by_action = {action: {row.path for row in rows if row.action == action} for action in ("loaded", "fresh", "dropped")}
    assert by_action["fresh"] == {name for name in own if name.startswith("convnext/")}
    assert by_action["dropped"] == stored.keys() - own.keys()
    for name in by_action["loaded"]:
        np.testing.assert_array_equal(own[name], stored[name])
    report = format_report(rows).splitlines()
    assert "dropped  outputs/...  " in "\n".join(report) and len(report) < 15


def test_what_is_missing_of_the_encoder_is_a_mistake(pretrained):
    objective = supervised(CLASSES, encoder=dict(ENCODER, depth=3))
    with pytest.raises(CheckpointError, match="encoder/block_02"):
        init_from(fresh_params(objective), pretrained, differences=objective.differences)


def test_a_head_of_the_same_shape_is_taken_over_and_another_is_fresh(tmp_path):
    first = supervised(CLASSES)
    save_imported(tmp_path, fresh_params(first), {"config": {}})
    for task, action in ((CLASSES, "loaded"), (dict(CLASSES, num_classes=3), "fresh")):
        objective = supervised(task)
        _, rows = init_from(fresh_params(objective, 1), tmp_path, differences=objective.differences)
        assert {row.action for row in rows if row.path.startswith(("head/", "norm/"))} == {action}


def test_weights_that_a_checkpoint_does_not_hold(tmp_path):
    objective = supervised(CLASSES, ema_decay=0.5)
    params = fresh_params(objective)
    save_imported(tmp_path, params, {"config": {}}, objective_state={"ema": jax.tree.map(lambda x: x + 1, params)})
    loaded, _ = init_from(params, tmp_path, weights="ema")
    np.testing.assert_array_equal(loaded["head"]["bias"], 1.0)
    with pytest.raises(CheckpointError, match="weights is 'teacher', but the checkpoint .* holds none"):
        init_from(params, tmp_path, weights="teacher")


def test_a_probe_reads_the_global_tokens_of_several_blocks():
    """Side by side, the earliest first, each through the final norm; the patches are those of the last."""
    head = dict(name="probe", source="both", batch_norm=False)
    objective = supervised(CLASSES, head=head, layers=(1, 2), final_norm=True)
    params, state = jax.jit(objective.init)(jax.random.key(0))
    kernel, bias = (np.asarray(params["probe"]["head"][name]) for name in ("kernel", "bias"))
    assert kernel.shape == (3 * 48, 7)
    first = supervised(CLASSES, head=head, encoder=dict(ENCODER, depth=1), final_norm=True)
    assert set(params["encoder"]) > set(jax.eval_shape(first.init, jax.random.key(0))[0]["encoder"])
    batch = labeled(3)
    one, two = (x.tokens(params, state, batch) for x in (first, objective))
    joined = np.concatenate([one.global_tokens[:, 0], two.global_tokens[:, 0], two.patches.mean(axis=1)], axis=1)
    np.testing.assert_allclose(objective.answers(params, state, batch)["logits"], joined @ kernel + bias, rtol=1e-4, atol=1e-5)


# Configs


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (dict(name="detection"), {}, "task.name is 'detection'; known: classification, segmentation, regression"),
        (dict(CLASSES, num_classes=1), {}, "num_classes is 1; it must be at least 2"),
        (dict(CLASSES, class_weights=(1.0, 2.0)), {}, "give a number above 0 for each of the 7 classes"),
        (dict(CLASSES, class_weights=(1.0,) * 7, mixup=0.8), {}, "use one of the two"),
        (dict(CLASSES, mixup=0.8), dict(inputs=("rgb", "semseg")), "the input 'semseg' has class ids"),
        (CLASSES, dict(head=dict(name="convnext")), "head.name is 'convnext'; for this task: linear, probe, attentive"),
        (CLASSES, dict(head=dict(name="linear", width=3)), "head has unknown key 'width'"),
        (CLASSES, dict(pool="max"), "pool is 'max'; known: global, mean, all"),
        (CLASSES, dict(drop_path=1.0), "drop_path is 1.0"),
        (CLASSES, dict(ema_decay=1.5), "ema_decay is 1.5"),
        (PIXELS, dict(head=dict(name="attentive")), "for this task: linear, convnext, segmenter, dpt, upernet"),
        (PIXELS, dict(inputs=("rgb", "semseg"), head=CONVNEXT), "the model would be shown what it must predict"),
        (dict(PIXELS, target="depth"), dict(head=CONVNEXT), "'depth' is continuous; this task predicts a categorical modality"),
        (dict(PIXELS, target="labels"), dict(head=CONVNEXT), "declared in config.modalities: rgb, depth, semseg"),
        (dict(DEPTH, loss="mse"), dict(head=CONVNEXT), "task.loss is 'mse'; known: l1, berhu"),
        (dict(DEPTH, loss="silog"), dict(head=CONVNEXT), "takes logarithms: config.modalities.depth.mean must be 0"),
        (dict(DEPTH, loss="angular"), dict(head=CONVNEXT), "is of 3 channel"),
        (PIXELS, dict(head=dict(name="dpt")), "reads 4 blocks, but the encoder has 2"),
        (PIXELS, dict(head=CONVNEXT, layers=(2, 1)), "layers is \\(2, 1\\)"),
        (CLASSES, dict(head=dict(name="attentive", queries=4), layers=(1, 2)), "layers names 2 blocks; of several blocks only the head"),
        (CLASSES, dict(head=dict(name="probe", source="mean"), layers=(1, 2)), "layers names 2 blocks; of several blocks only the head"),
        (PIXELS, dict(head=CONVNEXT, read_from=("depth",)), "read_from names 'depth', which is not one of"),
    ],
)
def test_mistakes_are_named(task, options, message):
    with pytest.raises(ValueError, match=message):
        supervised(task, **options)


def test_probes_and_dense_heads_of_full_size_have_the_right_shapes():
    """ViT-B at 224 and 512 pixels, by shapes alone."""
    rgb, ids = dict(channels=3), dict(kind="categorical", num_classes=150, stride=1, missing=255, loss="cross_entropy")
    for head, size, classes in ((dict(name="dpt", form="segmentation"), 512, 150), (dict(name="upernet"), 512, 150)):
        block = dict(name="supervised", encoder="B", task=dict(name="segmentation", target="ids"), head=head)
        objective = build_objective(dict(image_size=(size, size), modalities=dict(rgb=rgb, ids=ids), objective=block))
        params, state = jax.eval_shape(objective.init, jax.random.key(0))
        answer = jax.eval_shape(objective.answers, params, state, {"rgb": jax.ShapeDtypeStruct((2, size, size, 3), jnp.uint8)})
        assert answer["logits"].shape == (2, size, size, classes)
        assert objective.model.layers == ((3, 6, 9, 12) if head["name"] == "dpt" else (4, 6, 8, 12))
