"""Figures of supervised models: against plain numpy, each example once on any number of devices, averaged weights beside the raw ones."""

from __future__ import annotations

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maskvit.core.modalities import RGB, parse_modalities
from maskvit.core.types import batch_of
from maskvit.data import SOURCES
from maskvit.data.batches import eval_batches
from maskvit.data.sources import ListSource
from maskvit.evaluators import build_evaluators
from maskvit.objectives import build_objective
from maskvit.sharding import make_mesh, replicated

SIZE, RECORDS = (16, 16), 11  # no multiple of any batch here
DECLARED = dict(
    rgb=dict(RGB, patch=8),
    ids=dict(kind="categorical", num_classes=4, patch=8, loss="cross_entropy", missing=255),
    depth=dict(channels=1, patch=8, loss="l1", mean=(2.0,), std=(1.5,), missing=0.0, metres_per_count=0.5),
    normal=dict(channels=3, patch=8, scale=1 / 255, mean=(0.5,), std=(0.5,), missing=0.0),
)
SPECS = parse_modalities(DECLARED)


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def source(request):
    rng = np.random.default_rng(0)
    records = [
        dict(
            rgb=png(rng.integers(0, 256, (*SIZE, 3), np.uint8)), label=int(rng.integers(0, 7)) if i != 4 else -1,
            ids=png(rng.choice([0, 1, 2, 3, 255], SIZE).astype(np.uint8)),
            depth=np.where(rng.random((*SIZE, 1)) < 0.2, 0, rng.uniform(0.5, 9.0, (*SIZE, 1))).astype(np.float32),
            normal=rng.integers(0, 256, (*SIZE, 3)).astype(np.float32),
        )
        for i in range(RECORDS)
    ]  # fmt: skip
    SOURCES["answers_in_memory"] = lambda modalities, split="val": ListSource(records, label_names=list("abcdefg"))
    request.addfinalizer(lambda: SOURCES.pop("answers_in_memory"))
    return records


def objective_of(task: dict[str, Any], ema: bool = False) -> Any:
    head = dict() if task["name"] == "classification" else dict(head=dict(name="linear", norm="none"))
    block = dict(name="supervised", encoder=dict(width=16, depth=1, heads=2), task=task, ema_decay=0.5 if ema else None, **head)
    return build_objective(dict(image_size=SIZE, modalities=DECLARED, objective=block))


def figures_on(devices: int, objective: Any, state: Any, batch_size: int, **block: Any) -> dict[str, Any]:
    mesh = make_mesh(jax.devices()[:devices])
    evaluators = build_evaluators(
        {"e": block | dict(batch_size=batch_size, crop=1.0)}, objective=objective, modalities=SPECS, image_size=SIZE, mesh=mesh,
        data=dict(train=dict(source="answers_in_memory")),
    )  # fmt: skip
    params, state = jax.device_put(state, replicated(mesh))
    return dict(evaluators["e"].run(params, state, lambda: None))


def answers_of(objective: Any, params: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What the model says of every record, and what is true, in one batch."""
    names = [spec.name for spec in objective.model.modalities]
    specs = {name: SPECS[name] for name in names}
    with eval_batches(SOURCES["answers_in_memory"](specs), specs, SIZE, batch_size=RECORDS, crop=1.0, inputs=("rgb",)) as batches:
        host = next(batches)
    batch = batch_of({name: jnp.asarray(value) for name, value in host.items() if isinstance(value, np.ndarray)})
    (answer,) = objective.answers(params, {}, batch).values()
    return np.asarray(answer, np.float64), host


CASES = [
    (dict(name="classification", num_classes=7), "classification", {}),
    (dict(name="segmentation", target="ids"), "segmentation", {}),
    (dict(name="regression", target="depth"), "depth", {}),
    (dict(name="regression", target="depth"), "depth", dict(options=dict(aggregation="pixels", depth_range=(0.5, 4.0), align="median"))),
    (dict(name="regression", target="depth"), "maps", {}),
    (dict(name="regression", target="normal"), "normals", {}),
]


@pytest.mark.parametrize(("task", "kind", "options"), CASES, ids=lambda value: value if isinstance(value, str) else None)
def test_figures_do_not_depend_on_devices_nor_batches(task, kind, options, source):
    objective = objective_of(task)
    state = objective.init(jax.random.key(0))
    if kind != "classification":
        options = dict(options=dict(options.get("options", {}), examples=0))  # test_stored_size.py looks at them
    one, four = (figures_on(n, objective, state, size, type=kind, **options) for n, size in ((1, 3), (4, 8)))
    assert one.keys() == four.keys()
    for name, value in one.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, four[name])
        else:
            assert f"{value:.4f}" == f"{four[name]:.4f}" and np.isfinite(value), name


def test_accuracy_and_confusion_against_numpy(source):
    objective = objective_of(dict(name="classification", num_classes=7), ema=True)
    params, state = objective.init(jax.random.key(0))
    state["ema"] = jax.tree.map(lambda x: -x, params)
    found = figures_on(1, objective, (params, state), 4, type="classification")
    for prefix, tree in (("", params), ("ema/", state["ema"])):
        logits, host = answers_of(objective, tree)
        there = host["label"] >= 0
        assert there.sum() == RECORDS - 1
        logits, label = logits[there], host["label"][there]
        order = np.argsort(-logits, axis=1)
        assert found[f"{prefix}top1"] == pytest.approx(100 * (order[:, 0] == label).mean())
        assert found[f"{prefix}top5"] == pytest.approx(100 * (order[:, :5] == label[:, None]).any(1).mean())
        shifted = logits - logits.max(1, keepdims=True)
        assert found[f"{prefix}loss"] == pytest.approx((np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(label)), label]).mean())
        assert found[f"{prefix}confusion"].dtype == np.uint8
    assert found["top1"] != found["ema/top1"] or found["loss"] != found["ema/loss"]


def test_mean_iou_against_numpy(source):
    objective = objective_of(dict(name="segmentation", target="ids"))
    params, state = objective.init(jax.random.key(1))
    logits, host = answers_of(objective, params)
    predicted, truth = logits.argmax(-1), host["ids"]
    assert (truth == -1).any()
    known = truth >= 0
    ious = [
        ((predicted == c) & (truth == c)).sum() / (((predicted == c) & known) | (truth == c)).sum() for c in range(4)
    ]  # fmt: skip
    found = figures_on(1, objective, (params, state), 4, type="segmentation")
    assert found["mean_iou"] == pytest.approx(100 * np.mean(ious))
    assert found["pixel_accuracy"] == pytest.approx(100 * (predicted == truth)[known].mean())
    assert found["classes"].ndim == 3 and found["classes"].dtype == np.uint8


def test_depth_against_numpy_in_meters(source):
    objective = objective_of(dict(name="regression", target="depth"))
    params, state = objective.init(jax.random.key(2))
    answer, host = answers_of(objective, params)
    found = figures_on(1, objective, (params, state), 4, type="depth")
    rmse, under = [], []
    for p, t in zip(answer[..., 0] * 0.5, host["depth"][..., 0] * 0.5, strict=True):
        known = np.isfinite(t)
        p, t = p[known], t[known]
        rmse.append(np.sqrt(((p - t) ** 2).mean()))
        ratio = np.maximum(np.maximum(p, 0) / t, t / np.maximum(p, 1e-6))
        under.append(100 * (ratio < 1.25).mean())
    assert found["rmse"] == pytest.approx(np.mean(rmse), rel=1e-5)
    assert found["delta_1"] == pytest.approx(np.mean(under), rel=1e-5)


@pytest.mark.parametrize(
    ("task", "block", "message"),
    [
        (dict(name="classification", num_classes=7), dict(type="segmentation"), "takes figures of the task 'segmentation', but"),
        (dict(name="regression", target="normal"), dict(type="depth"), "is for 1 channel"),
        (dict(name="regression", target="depth"), dict(type="depth", options=dict(aggregation="mean")), "aggregation is 'mean'; known"),
        (dict(name="segmentation", target="ids"), dict(type="segmentation", options=dict(scale=1)), "unknown key 'scale'"),
        (dict(name="segmentation", target="ids"), dict(type="segmentation", shown=("depth",)), "the model's inputs are"),
    ],
)
def test_mistakes_are_named(task, block, message, source):
    with pytest.raises(ValueError, match=message):
        figures_on(1, objective_of(task), ({}, {}), 4, **block)
