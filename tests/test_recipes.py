"""The shipped downstream experiments: each resolves at full size, and its smoke form trains, evaluates, keeps the best and resumes."""

from __future__ import annotations

import json
import shutil
from typing import Any

import jax
import pytest

from configs import common
from maskvit.checkpoints import find_checkpoint
from maskvit.core.durations import to_steps
from maskvit.metrics.results import read
from maskvit.objectives import build_objective
from maskvit.training import setup
from maskvit.training.config import check_config, make_schedule
from tests.runs import ROOT, get_config, make_scenes

RECIPES = [str(f.relative_to(ROOT)) for folder in ("finetune", "evaluate") for f in sorted((ROOT / "configs" / folder).glob("*.py"))]

# Parameters of whole models as the references state or imply them; the DPT head without 1,180,160 that it never uses.
PUBLISHED = {
    "multimae_b_imagenet": 86_566_888,
    "multimae_b_ade20k": 96_020_886,
    "multimae_b_nyuv2_rgb": 96_420_904,
    "multimae_b_nyuv2_depth_estimation": 105_908_353 - 1_180_160,
}
# The reference's learning rate at its peak, and its length in epochs of so many samples.
RATES = {
    "mae_b_imagenet": (2e-3, 100), "mae_l_imagenet": (4e-3, 50), "multimae_b_imagenet": (2e-3, 100), "multimae_b_ade20k": (1e-4, 64),
    "multimae_b_nyuv2_depth_estimation": (1e-4, 2000), "multimae_b_taskonomy_normal": (3e-4, 100), "mae_b_linear_probe": (6.4, 90),
    "mae_b_attentive_probe": (1.6, 90), "mae_b_ade20k_upernet": (1e-4, None), "ibot_s_ade20k_upernet": (3e-5, None),
}  # fmt: skip


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_has_its_full_size(path):
    config = get_config(path).to_dict()
    check_config(config)
    objective, name = build_objective(config), path.rpartition("/")[2].removesuffix(".py")
    params = jax.eval_shape(lambda key: objective.init(key)[0], jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count > 20_000_000 and count == PUBLISHED.get(name, count)
    assert config["best"]["figure"].partition("/")[0] in config["evaluators"]
    text = (ROOT / path).read_text()
    assert f"--config={path}" in text and "Published" in text and ("Unknown" in text or "Differs" in text)
    if name in RATES:
        rate, epochs = RATES[name]
        steps = 20_210 // config["global_batch"] if "ade20k" in name else 1000
        schedule = make_schedule(config["optimizer"]["base_lr"], config["global_batch"], steps, **config["schedule"])
        total = to_steps(config["total"], steps_per_epoch=steps, global_batch=config["global_batch"])
        assert schedule.peak == pytest.approx(rate) and total == (160_000 if epochs is None else epochs * steps)
        assert total <= schedule.total


def small(path: str, data_dir: str) -> dict[str, Any]:
    """The smoke form of a recipe on rendered scenes: their classes, their depth, and what else they hold in place of other targets."""
    config = common.smoke(get_config(path)).to_dict()
    task, target = config["objective"]["task"], config["objective"]["task"].get("target")
    source = dict(source="tfds", name="scenes", data_dir=data_dir, split="train", features={})
    if task["name"] == "classification":
        task["num_classes"] = 12
    for name, spec in config["modalities"].items():
        if spec.get("kind") == "categorical":
            spec.update(num_classes=14, missing=-1)
        elif spec["channels"] == 1:
            spec.update(missing=0.0, metres_per_count=1 / 512)
            source["features"][name] = "depth"
        elif name == target:
            spec.update(channels=3, missing=-1.0)
            source["features"][name] = "rgb"
    config["data"]["train"] = source
    for block in config["evaluators"].values():
        block.update(data_from=dict(source, split="val"))
    config["best"] = dict(config["best"])
    return config


def distinct() -> list[str]:
    """One recipe of each smoke form: those that differ in sizes, rates, positions and names of data alone are the same code."""
    forms = {}
    for path in RECIPES[::-1]:
        form = small(path, "")
        objective, target = form["objective"], form["objective"]["task"].get("target")
        for block, keys in ((form, ("schedule",)), (form["optimizer"], ("base_lr", "layer_decay", "weight_decay", "no_decay"))):
            for key in keys:
                block.pop(key, None)
        for key in ("drop_path", "positions", "train_positions", "compute_dtype"):
            objective.pop(key, None)
        form["modalities"] = {name: spec["kind"] for name, spec in form["modalities"].items() if name != target}
        del form["data"]["train"], form["evaluators"]
        forms[json.dumps(form, sort_keys=True, default=str).replace(f'"{target}"', '"target"')] = path
    return sorted(forms.values())


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.mark.usefixtures("shared_steps", "one_device")
@pytest.mark.parametrize("path", distinct())
def test_a_smoke_form_trains_evaluates_keeps_the_best_and_resumes(path, data_dir, tmp_path):
    config = small(path, data_dir)
    setup.train(str(tmp_path), **config)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    state = setup.train(str(tmp_path), **config)
    assert int(state.step) == 2 and int(state.skipped) == 0
    evaluator, _, figure = config["best"]["figure"].partition("/")  # the line of before the stop was taken again
    assert [(row["step"], row["evaluator"]) for row in read(tmp_path)] == [(2, evaluator)] and figure in read(tmp_path)[0]["figures"]
    assert find_checkpoint(tmp_path / "best").name == "2"
