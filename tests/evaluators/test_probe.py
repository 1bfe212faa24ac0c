"""Probes on frozen features against plain numpy, on any number of devices; their errors."""

from __future__ import annotations

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maskvit.core.modalities import RGB
from maskvit.data import SOURCES
from maskvit.data.sources import ListSource
from maskvit.evaluators import build_evaluators
from maskvit.evaluators.frozen import held_out
from maskvit.heads.attentive import Probe
from maskvit.objectives import build_objective
from maskvit.sharding import make_mesh, replicated

SIZE, CLASSES = (16, 16), 3


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "png")
    return out.getvalue()


@pytest.fixture(scope="module")
def objective(request):
    def source(modalities: Any, split: str = "train", labeled: bool = True) -> ListSource:
        """Noise around a color of each class that the probes can learn in part."""
        rng = np.random.default_rng(len(split))
        colors = np.array([[120, 90, 100], [100, 120, 90], [90, 100, 120]])
        rows = []
        for i in range({"train": 70, "val": 45}[split]):
            image = np.clip(colors[i % CLASSES] + rng.normal(0, 20, 3) + rng.normal(0, 30, (*SIZE, 3)), 0, 255)
            rows.append({"rgb": png(image.astype(np.uint8))} | ({"label": i % CLASSES} if labeled else {}))
        return ListSource(rows, ("a", "b", "c"))

    SOURCES["noise"] = source
    request.addfinalizer(lambda: SOURCES.pop("noise"))
    block = dict(
        name="multimae", encoder=dict(width=64, depth=2, heads=2), decoder=dict(width=16, depth=1, heads=2), inputs=("rgb",),
        outputs=("rgb",), num_visible=2,
    )  # fmt: skip
    return build_objective(dict(image_size=SIZE, modalities=dict(rgb=dict(RGB, patch=8)), objective=block))


@pytest.fixture(scope="module")
def params(objective):
    return jax.jit(objective.init)(jax.random.key(0))[0]


def evaluator(objective: Any, devices: int = 1, **block: Any) -> Any:
    specs = {spec.name: spec for spec in objective.model.modalities}
    mesh = make_mesh(jax.devices()[:devices])
    arguments = dict(objective=objective, modalities=specs, image_size=SIZE, mesh=mesh, data=dict(train=dict(source="noise")))
    return build_evaluators({"p": dict(type="probe", crop=1.0, batch_size=16) | block}, **arguments)["p"]


def test_a_grid_of_linear_heads_against_numpy(objective, params):
    rates, decays, epochs, size = (0.001, 0.3, 100.0), (0.0, 0.02), 3, 20
    options = dict(
        heads=dict(mean=dict(name="probe", source="mean", batch_norm=False)), rates=rates, decays=decays, epochs=epochs, warmup_epochs=1,
        train_batch=size,
    )  # fmt: skip
    probe = evaluator(objective, options=options, seed=3)
    found = dict(probe.run(params, {}))
    assert set(found) == {name for name in probe.names if "top5" not in name}  # of three classes

    train, test = (probe.extractions[split](params, {}, ("mean",)) for split in ("train", "test"))
    fitted, chosen_by = held_out(np.arange(70), 0.1, 3)
    assert len(chosen_by) == 7 and sorted([*fitted, *chosen_by]) == list(range(70))
    start = Probe(CLASSES, "mean", False).init(jax.random.key(3), jnp.zeros((1, 1, 64)), jnp.zeros((1, 0, 64)))
    kernel, bias = (np.asarray(start["params"]["head"][name], np.float64) for name in ("kernel", "bias"))
    steps = len(fitted) // size
    results = {}
    for decay in decays:
        for rate in rates:
            weights, momentum = [kernel.copy(), bias.copy()], [0.0, 0.0]
            for number in range(epochs * steps):
                order = np.random.default_rng((3, number // steps)).permutation(len(fitted))
                index = fitted[order[number % steps * size :][:size]]
                x, y = train.features["mean"][index].astype(np.float64), train.labels[index]
                logits = x @ weights[0] + weights[1]
                p = np.exp(logits - logits.max(1, keepdims=True))
                p = p / p.sum(1, keepdims=True) - np.eye(CLASSES)[y]
                if number < steps:
                    factor = number / (steps - 1)
                else:
                    factor = 0.5 * (1 + np.cos(np.pi * (number - steps) / (epochs * steps - steps)))
                for i, gradient in enumerate((x.T @ p / size + decay * weights[0], p.mean(0))):
                    momentum[i] = 0.9 * momentum[i] + gradient
                    weights[i] = weights[i] - rate * size / 256 * factor * momentum[i]
            right = lambda which, index, w=weights: (which.features["mean"][index] @ w[0] + w[1]).argmax(1) == which.labels[index]  # noqa: E731
            results[decay, rate] = right(train, chosen_by).mean(), 100 * right(test, np.arange(45)).mean()
    best = max(results, key=lambda key: results[key][0])
    assert best != (0.0, 0.001) and len({result[0] for result in results.values()}) > 1  # there is something to choose
    assert (found["mean/decay"], found["mean/rate"]) == best
    assert found["mean/held_out_top1"] == pytest.approx(100 * results[best][0])
    assert found["mean/top1"] == pytest.approx(results[best][1]) and found["mean/top1"] > 50


def test_probes_of_all_kinds_do_not_depend_on_devices(objective, params, tmp_path):
    options = dict(
        heads=dict(
            linear=dict(name="probe", source="both", layers=(1, 2)), attentive=dict(name="attentive", pooling="capi", all_tokens=True)
        ),
        optimizer=dict(name="adamw", b2=0.95), rates=(0.01, 0.1), decays=(0.001,), epochs=8, train_batch=24,
    )  # fmt: skip
    found = []
    for devices in (1, 4):
        probe = evaluator(objective, devices, options=options, shares=(0.5,), cache=str(tmp_path / str(devices)))
        placed = jax.device_put(params, replicated(probe.mesh))
        found.append(dict(probe.run(placed, {})))
    assert found[0].keys() == found[1].keys() == {name for name in probe.names if "top5" not in name}
    assert {name for name in found[0] if name.startswith("share_0.5/attentive/")}
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], abs=0.01), name
    assert min(found[0]["linear/top1"], found[0]["attentive/top1"]) > 50
    joined = probe.extractions["test"](placed, {}, ("global_of_1_2",)).feature("global_of_1_2")  # from the cache
    single = probe.extractions["test"](placed, {}, ("global",)).feature("global")
    assert joined.shape == (45, 128)
    np.testing.assert_array_equal(joined[:, 64:], single)
    assert np.abs(joined[:, :64] - single).max() > 0.01


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (dict(options=dict(heads=dict(a=dict(name="dpt")))), "heads.a.name is 'dpt', which says something of every pixel"),
        (dict(options=dict(heads=dict(a=dict(name="probe", layers=(1, 3))))), r"heads.a.layers is \(1, 3\); give blocks in"),
        (dict(options=dict(heads=dict(a=dict(name="probe", layers=(1,))))), r"heads.a.layers is \(1,\); its last must be the encoder's"),
        (dict(options=dict(heads=dict(a=dict(name="svm")))), "heads.a.name is 'svm'; known:"),
        (dict(options=dict(heads=dict(a=dict(name="attentive", queries=7)))), "heads.a: the tokens' width 64 must divide by queries 7"),
        (dict(options=dict(optimizer=dict(name="lion"))), "optimizer.name is 'lion'; known: adamw, sgd, lars"),
        (dict(options=dict(optimizer=dict(name="sgd", weight_decay=0.1))), "optimizer has unknown key 'weight_decay'"),
        (dict(options=dict(rates=(0.0, 1.0))), r"rates is \(0.0, 1.0\); give numbers above 0"),
        (dict(options=dict(epochs=3, warmup_epochs=3)), "3 epochs with 3 of warm-up"),
        (dict(hold_out=1.5), "hold_out is 1.5; it must be a share"),
        (dict(shares=(1.0,)), "shares names 1.0; each must be between 0 and 1"),
        (dict(test=dict(source="noise", split="val", labeled=False)), "probe needs labels, but the test data have none"),
    ],
)
def test_mistakes_are_named(objective, block, message):
    with pytest.raises(ValueError, match=message):
        evaluator(objective, **block)
