"""Every subset of the inputs is evaluated as by an evaluator of its own."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from maskvit.core.modalities import RGB, parse_modalities
from maskvit.data import SOURCES
from maskvit.data.sources import ListSource
from maskvit.evaluators import build_evaluators
from maskvit.evaluators.subsets import subsets
from maskvit.objectives import build_objective
from maskvit.plots.tables import table_picture
from maskvit.sharding import make_mesh

DECLARED = dict(
    rgb=dict(RGB, patch=8),
    depth=dict(channels=1, patch=8, loss="l1", mean=(2.0,), std=(1.5,), missing=0.0),
    ids=dict(kind="categorical", num_classes=3, patch=8, loss="cross_entropy", missing=255),
)


@pytest.fixture
def built(monkeypatch):
    rng = np.random.default_rng(0)
    records = [
        dict(
            rgb=rng.integers(0, 256, (16, 16, 3)).astype(np.float32), depth=rng.uniform(1, 5, (16, 16, 1)).astype(np.float32), label=i % 3,
            ids=rng.integers(0, 3, (16, 16, 1)),
        )
        for i in range(9)
    ]  # fmt: skip
    monkeypatch.setitem(SOURCES, "two_inputs", lambda modalities, split="val": ListSource(records, "abc"))

    def build(task: dict[str, Any], **block: Any) -> tuple[Any, Any]:
        head = dict(name="linear", norm="none") if task["name"] == "segmentation" else dict()
        config = dict(
            name="supervised", inputs=("rgb", "depth"), encoder=dict(width=16, depth=1, heads=2), task=task, head=head,
        )  # fmt: skip
        objective = build_objective(dict(image_size=16, modalities=DECLARED, objective=config))
        evaluators = build_evaluators(
            {"e": dict(type=task["name"], crop=1.0, batch_size=4) | block}, objective=objective, modalities=parse_modalities(DECLARED),
            image_size=(16, 16), mesh=make_mesh(jax.devices()[:1]), data=dict(train=dict(source="two_inputs")),
        )  # fmt: skip
        return evaluators["e"], objective

    return build


def test_each_subset_has_the_figures_of_its_own_evaluator(built):
    task = dict(name="classification", num_classes=3)
    together, objective = built(task, subsets=True)
    params = jax.jit(objective.init)(jax.random.key(0))[0]
    found = dict(together.run(params, {}, lambda: None))
    table = found.pop("subsets")
    assert table.dtype == np.uint8 and set(found) == {name for name in together.names if "top5" not in name}
    assert {name.split("/")[0] for name in found} == {"rgb", "depth", "rgb+depth"}
    alone = dict(built(task, shown=("depth",))[0].run(params, {}, lambda: None))
    assert found["depth/loss"] == alone["loss"] != found["rgb/loss"]
    assert set(together.protocol()["subsets"]) == {"rgb", "depth", "rgb+depth"}


def test_what_a_dense_head_reads_is_always_shown(built):
    together, _ = built(dict(name="segmentation", target="ids"), subsets=True)
    assert set(together.protocol()["subsets"]) == {"rgb", "rgb+depth"}


def test_mistakes_are_named(built):
    with pytest.raises(ValueError, match="config.evaluators.e.subsets is 'all'; it must be True or False"):
        built(dict(name="classification", num_classes=3), subsets="all")
    with pytest.raises(ValueError, match="subsets of 7 inputs are 127: name at most 6"):
        subsets(tuple("abcdefg"))
    with pytest.raises(ValueError, match="row 'a' has 1 numbers under 2 columns"):
        table_picture(["x", "y"], [("a", [1.0])])
