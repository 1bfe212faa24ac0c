"""`maskvit.load` of fine-tuned models: what they say of pictures, with which weights, and configs that are not those of their heads."""

from __future__ import annotations

import copy
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maskvit
from maskvit import convert
from maskvit.checkpoints import CheckpointError, find_checkpoint, save_imported
from maskvit.checkpoints.manifest import write_best
from maskvit.core.types import tree_paths
from maskvit.objectives import build_objective
from tests.tiny import MODALITIES, fresh_params, tiny_batch, tiny_config

CLASSES = dict(name="classification", num_classes=7)
UPERNET = dict(name="upernet", width=8, pools=(1, 2), auxiliary_width=4)


def fine_tuned(task: dict[str, Any], **objective: Any) -> dict[str, Any]:
    """The config of a tiny fine-tuned model, as a checkpoint holds it."""
    modalities = copy.deepcopy(MODALITIES)
    modalities["semseg"].update(stride=1)
    modalities["depth"].update(standardize=False, mean=(0.05,), std=(0.02,), metres_per_count=0.001)
    block = dict(dict(name="supervised", inputs=("rgb",), encoder=dict(width=48, depth=2, heads=3), task=task), **objective)
    return json.loads(json.dumps(dict(image_size=(32, 32), modalities=modalities, objective=block)))


def saved(path: Any, config: dict[str, Any], **metadata: Any) -> tuple[Any, Any, Any]:
    """(objective, parameters, state) of a checkpoint written to `path`. Running statistics and averages are no longer the first ones."""
    objective = build_objective(config)
    params = fresh_params(objective, seed=4)
    state = objective.init_state(params)
    state = {name: jax.tree.map(lambda x, n=name: x * 1.5 + (0.25 if n == "statistics" else 0.0), part) for name, part in state.items()}
    save_imported(path, params, {"config": config, **metadata}, objective_state=state)
    return objective, params, state


def softmax(logits: Any) -> np.ndarray:
    x = np.exp(np.asarray(logits, np.float64))
    return x / x.sum(axis=-1, keepdims=True)


NAMES = ["ant", "bee", "cow", "dog", "eel", "fox", "gnu"]


@pytest.mark.parametrize("weights", ["params", "ema"])
def test_probabilities_of_named_classes(tmp_path, weights):
    """With running statistics, in one of two sets of weights."""
    config = fine_tuned(CLASSES, head=dict(name="probe", source="mean"), ema_decay=0.9)
    objective, params, state = saved(tmp_path, config, label_names=NAMES)
    pictures = tiny_batch(3)["rgb"]
    loaded = maskvit.load(tmp_path, weights)
    found = loaded.predict(pictures)
    kept = {"statistics": state["statistics"]}
    expected = softmax(objective.answers(state["ema"] if weights == "ema" else params, kept, {"rgb": jnp.asarray(pictures)})["logits"])
    assert found.keys() == {"classes", "probabilities"} and found["classes"] == tuple(NAMES)
    np.testing.assert_allclose(found["probabilities"], expected, rtol=1e-4, atol=1e-6)
    assert np.abs(expected - expected[:, :1]).max() > 1e-4  # and not one seventh everywhere
    fresh = softmax(objective.answers(params, objective.init_state(params), {"rgb": jnp.asarray(pictures)})["logits"])
    assert np.abs(found["probabilities"] - fresh).max() > 1e-4


def test_ids_of_pixels_of_a_model_with_several_inputs(tmp_path):
    """A dense head with running statistics; all inputs, or one alone; classes without names have numbers."""
    config = fine_tuned(
        dict(name="segmentation", target="semseg"), head=dict(name="linear", norm="batch"), inputs=("rgb", "depth"), read_from=("rgb",)
    )
    objective, params, state = saved(tmp_path, config)
    loaded, batch = maskvit.load(tmp_path), tiny_batch(2)
    assert loaded.state.keys() == {"statistics"} == state.keys()
    both = {name: batch[name] for name in ("depth", "rgb")}  # their order is the model's
    for given, names in ((both, ("rgb", "depth")), (batch["rgb"], ("rgb",))):
        logits = objective.answers(params, state, {name: jnp.asarray(batch[name]) for name in names}, names)["logits"]
        found = loaded.predict(given)
        assert found["classes"] == tuple("0123456") and found["ids"].dtype == np.int32
        np.testing.assert_array_equal(found["ids"], np.asarray(logits).argmax(-1))
    saved(tmp_path / "named", config, label_names=NAMES)
    assert maskvit.load(tmp_path / "named").predict(both)["classes"] == tuple(NAMES)
    with pytest.raises(ValueError, match="the head reads the tokens of 'rgb', but the model was shown depth alone"):
        loaded.predict({"depth": batch["depth"]})
    with pytest.raises(ValueError, match="images name 'semseg'; the model's inputs are rgb, depth"):
        loaded.predict({"semseg": batch["semseg"]})
    with pytest.raises(ValueError, match="images are empty"):
        loaded.predict({})
    with pytest.raises(ValueError, match=r"has shape \(2, 32, 32, 1\); it must be \(batch, height, width, 3\)"):
        loaded.predict({"rgb": batch["depth"]})


def test_depth_in_stored_units_and_in_meters(tmp_path):
    objective, params, _ = saved(tmp_path, fine_tuned(dict(name="regression", target="depth"), head=dict(name="linear", norm="none")))
    pictures = tiny_batch(2)["rgb"]
    found = maskvit.load(tmp_path).predict(pictures)
    values = np.asarray(objective.answers(params, {}, {"rgb": jnp.asarray(pictures)})["values"])
    np.testing.assert_allclose(found["values"], values, rtol=1e-5)
    np.testing.assert_allclose(found["meters"], found["values"] * 0.001, rtol=1e-6)


def test_the_best_checkpoint_of_a_run(tmp_path):
    """WORKDIR/best, and the newest beside it."""
    config = fine_tuned(CLASSES)
    objective, _, _ = saved(tmp_path / "checkpoints", config)
    better = fresh_params(objective, seed=5)
    save_imported(tmp_path / "other", better, {"config": config})
    (tmp_path / "other" / "0").rename(tmp_path / "checkpoints" / "7")
    for step in (0, 7):
        write_best(tmp_path / "checkpoints", step)
        best = maskvit.load(tmp_path / "best")
        assert find_checkpoint(tmp_path / "best").name == str(step)
        np.testing.assert_array_equal(best.params["head"]["kernel"], fresh_params(objective, 5 if step else 4)["head"]["kernel"])


def test_weights_and_answers_that_are_not_there(tmp_path):
    saved(tmp_path / "tuned", fine_tuned(CLASSES))
    with pytest.raises(CheckpointError, match="weights is 'ema', but the checkpoint .* holds none"):
        maskvit.load(tmp_path / "tuned", "ema")
    with pytest.raises(ValueError, match="weights is 'best'; known: params, ema"):
        maskvit.load(tmp_path / "tuned", "best")
    config = tiny_config()
    save_imported(tmp_path / "pretrained", fresh_params(build_objective(config)), {"config": config})
    loaded = maskvit.load(tmp_path / "pretrained")
    assert loaded.class_names == ()
    with pytest.raises(ValueError, match="of the objective 'multimae', which has no task: fine-tune it first"):
        loaded.predict(tiny_batch(1)["rgb"])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """name -> (config, parameters and running statistics of zeros) of fine-tuned models."""
    pixels, found = dict(name="segmentation", target="semseg"), {}
    for name, config in {
        "linear": fine_tuned(CLASSES),
        "convnext": fine_tuned(pixels, head=dict(name="convnext", width=64, preds_per_patch=16, depth=1)),
        "upernet": fine_tuned(pixels, head=UPERNET, encoder=dict(width=48, depth=4, heads=3)),
    }.items():
        objective = build_objective(config)
        shapes = jax.eval_shape(objective.init, jax.random.key(0))
        found[name] = config, *jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return found


HUGE = 10**9
HOSTILE = [
    ("linear", "objective.task", None, "config.objective.task is None"),
    ("linear", "objective.task", {"name": "classification"}, "lacks the key 'num_classes'"),
    ("linear", "objective.task.num_classes", 2**20, r"head/bias has shape \(7,\), expected \(1048576,\)"),
    ("linear", "objective.task.num_classes", HUGE, "num_classes is 1000000000"),
    ("linear", "objective.task.num_classes", "7", "num_classes is '7'"),
    ("linear", "objective.head", {"name": "attentive", "queries": HUGE}, "must divide by queries 1000000000"),
    ("linear", "objective.head", {"name": "probe"}, "its parameters are not those of the config inside it: head/bias"),
    ("linear", "objective.head", {"name": ["linear"]}, r"config.objective.head.name is \['linear'\]"),
    ("linear", "objective.head", 3, "config.objective.head is 3"),
    ("linear", "objective.pool", "median", "config.objective.pool is 'median'"),
    ("linear", "objective.encoder.depth", 1000, "encoder.depth is 1000, but the parameters stored are those of 2"),
    ("convnext", "objective.head.depth", 1000, "head.depth is 1000, but the parameters stored are those of 1"),
    ("convnext", "objective.head.depth", "1", "head.depth is '1', but the parameters stored are those of 1"),
    ("convnext", "objective.head", {"name": "segmenter", "depth": 1000}, "head.depth is 1000, but the parameters stored are those of 0"),
    ("convnext", "objective.head.width", 2**15, "convnext/block_00/dwconv/"),
    ("convnext", "objective.head.width", 64 * HUGE, "config.objective.head.width 64000000000"),
    ("convnext", "objective.task.target", "rgb", "is also one of config.objective.inputs|predicts a categorical"),
    ("convnext", "objective.task.target", "gone", "task.target is 'gone'"),
    ("convnext", "modalities.semseg.num_classes", HUGE, "convnext/head/"),
    ("convnext", "objective.layers", [1, HUGE], "config.objective.layers"),
    ("convnext", "objective.read_from", ["depth"], "read_from names 'depth'"),
    ("upernet", "objective.head.pools", list(range(1, 2000)), "head.pools is .*, but the parameters stored are those of"),
    ("upernet", "objective.head.pools", [HUGE], "head.pools is .*, but the parameters stored are those of"),
    ("upernet", "objective.head.pools", "12", "head.pools is"),
]


@pytest.mark.parametrize(("model", "key", "value", "expected"), HOSTILE)
def test_hostile_configs_of_fine_tuned_models_are_one_line(tuned, monkeypatch, model, key, value, expected):
    """Nothing is built from sizes that are not stored: each of these ends at once."""
    config, params, state = tuned[model]
    node = config = copy.deepcopy(config)
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = value
    monkeypatch.setattr("maskvit.features.load_params", lambda path: (params, {"config": config}))
    monkeypatch.setattr("maskvit.features.load_statistics", lambda path: state.get("statistics", {}))
    with pytest.raises(CheckpointError, match=expected) as raised:
        maskvit.load("nowhere")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000


def test_the_models_that_the_hostile_configs_are_made_of_are_sound(tuned, monkeypatch):
    for config, params, state in tuned.values():
        monkeypatch.setattr("maskvit.features.load_params", lambda path, p=params, c=config: (p, {"config": c}))
        monkeypatch.setattr("maskvit.features.load_statistics", lambda path, s=state: s.get("statistics", {}))
        assert maskvit.load("nowhere").objective.task
    # The last one keeps statistics: none of them may be another, or missing.
    assert tree_paths(state["statistics"])
    for wrong in ({}, jax.tree.map(lambda x: x[:1], state["statistics"])):
        monkeypatch.setattr("maskvit.features.load_statistics", lambda path, w=wrong: w)
        with pytest.raises(CheckpointError, match="not those of the config inside it: statistics/"):
            maskvit.load("nowhere")


def test_an_imported_classifier_answers_too(fixtures, tmp_path):
    """A ViT that came with its classifier: MAE's recorded one says what it said there."""
    convert.convert(fixtures / "mae_tiny_finetuned.pth", tmp_path, num_heads=3)
    loaded, golden = maskvit.load(tmp_path), np.load(fixtures / "mae_tiny_finetuned.npz")
    spec = loaded.model.modality("rgb")
    stored = (golden["image"].transpose(0, 2, 3, 1) * np.array(spec.std) + np.array(spec.mean)) / spec.scale
    found = loaded.predict(stored.astype(np.float32))
    odds = np.exp(golden["finetuned_logits"])
    np.testing.assert_allclose(found["probabilities"], odds / odds.sum(axis=1, keepdims=True), rtol=1e-4, atol=1e-6)
    assert found["classes"] == ("0", "1", "2", "3", "4") == loaded.class_names
