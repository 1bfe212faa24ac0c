"""The loss at fixed masks: against the objective by hand, on any number of devices, whatever hides in training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.core.keys import stream_keys
from maskvit.core.modalities import parse_modalities
from maskvit.core.types import Batch
from maskvit.data import SOURCES
from maskvit.data.sources import ListSource
from maskvit.evaluators import build_evaluators
from maskvit.objectives import build_objective
from maskvit.sharding import make_mesh, replicated

SIZE, RECORDS = (16, 16), 7
MODALITIES = dict(
    rgb=dict(kind="continuous", channels=3, patch=4, loss="mse", scale=1 / 255, mean=(0.5,) * 3, std=(0.25,) * 3),
    semseg=dict(kind="categorical", num_classes=5, patch=4, loss="cross_entropy", missing=255),
)


def masked_autoencoder(**changes):
    small = dict(width=16, depth=1, heads=2)
    block = dict(
        name="multimae", encoder=small, decoder=small, num_visible=8, inputs=("rgb", "semseg"), outputs=("rgb", "semseg"),
        compute_dtype="float32",
    )  # fmt: skip
    return build_objective(dict(image_size=SIZE, modalities=MODALITIES, objective={**block, **changes}))


@pytest.fixture
def pictures(monkeypatch):
    rng = np.random.default_rng(0)
    records = [dict(rgb=rng.integers(0, 256, (*SIZE, 3), np.uint8), semseg=rng.integers(0, 5, SIZE, np.uint8)) for _ in range(RECORDS)]

    def source(modalities, *, split: str = ""):
        return ListSource([{name: record[name] for name in modalities} for record in records])

    monkeypatch.setitem(SOURCES, "records", source)
    return records


def figures_of(objective, params, devices: int = 1, batch_size: int = 4, **options) -> dict[str, float]:
    mesh = make_mesh(jax.devices()[:devices])
    built = build_evaluators(
        dict(held_out=dict(type="masked_loss", every="1 steps", batch_size=batch_size, **options)), objective=objective,
        modalities=parse_modalities(MODALITIES), image_size=SIZE, mesh=mesh, data=dict(train=dict(source="records")),
    )["held_out"]  # fmt: skip
    figures = dict(built.run(jax.device_put(params, replicated(mesh)), {}))
    assert tuple(figures) == built.names == ("total", "rgb", "semseg")
    return figures


def test_losses_of_the_objective_at_masks_of_the_record(pictures):
    """Each record by itself, and every split of the data over batches and devices."""
    objective = masked_autoencoder()
    params = objective.init(jax.random.key(0))[0]
    expected: dict[str, list[float]] = dict(rgb=[], semseg=[])
    for index, record in enumerate(pictures):
        batch = Batch({name: jnp.asarray(value)[None].astype(np.int32 if name == "semseg" else np.uint8) for name, value in record.items()})
        key = stream_keys(jax.random.fold_in(jax.random.key(0), index)[None], "masked_loss")
        metrics = objective.loss(params, {}, batch, key, jnp.zeros((), jnp.int32))[1][1]
        for name in expected:
            total, count = metrics[f"loss/{name}"]
            expected[name].append(float(total) / float(count))
    found = figures_of(objective, params)
    assert {name: found[name] for name in expected} == pytest.approx({name: np.mean(values) for name, values in expected.items()}, rel=1e-5)
    assert found["total"] == found["rgb"] + found["semseg"]
    assert figures_of(objective, params, devices=4, batch_size=8) == pytest.approx(found, rel=1e-6)
    assert figures_of(objective, params, seed=1)["rgb"] != found["rgb"]


def test_what_hides_and_weighs_in_training_changes_nothing(pictures):
    plain = masked_autoencoder()
    params = plain.init(jax.random.key(0))[0]
    guided = masked_autoencoder(
        guidance=dict(name="self_attention", query="global"), scores=dict(name="attention_high"), loss_weight=dict(tau=0.5, gamma=0.5),
        budget=dict(name="equal"),
    )  # fmt: skip
    assert figures_of(guided, params) == figures_of(plain, params)


def test_an_objective_that_hides_nothing_is_refused(pictures):
    classes = dict(name="supervised", encoder=dict(width=16, depth=1, heads=2), task=dict(name="classification", num_classes=3))
    rgb = {"rgb": MODALITIES["rgb"]}
    objective = build_objective(dict(image_size=SIZE, modalities=rgb, objective=classes))
    with pytest.raises(ValueError, match="config.objective hides none"):
        figures_of(objective, {})
