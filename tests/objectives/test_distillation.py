"""DINO, iBOT and AttMask: the order of a step, what is hidden, the teacher's state, parts of a batch, published sizes."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from maskvit import features
from maskvit.core.keys import sample_keys, step_key
from maskvit.core.types import Batch, TokenLayout, tree_paths
from maskvit.heads.network import Network
from maskvit.masking.scores import SCORES
from maskvit.nn.backbone import count_parameters, frozen_mask
from maskvit.nn.encoder import drop_path
from maskvit.objectives import build_objective
from maskvit.objectives.distillation import Masking, choose_hidden, collapse_sums, teacher_params
from maskvit.optim.schedules import Cosine
from maskvit.optim.transforms import adamw
from maskvit.training import setup
from maskvit.training.step import init_state, train_step
from tests.runs import get_config, make_scenes, on_scenes
from tests.tiny import assert_same_bits, on_device

pytestmark = pytest.mark.usefixtures("shared_steps")

RGB = dict(channels=3, patch=8, scale=1 / 255, mean=(0.5,), std=(0.25,))
SIZES = dict(encoder=dict(width=32, depth=2, heads=2), projection=dict(hidden=32, bottleneck=16, num_prototypes=24))
ATTMASK = dict(scores=dict(name="attention_high"), masking=dict(ratio=0.3, ratio_var=0.2, probability=0.5, per="step"))
GRID = TokenLayout(("rgb",), ((14, 14),))


def tiny(name: str = "ibot", **settings):
    """Image 32, patch 8 (16 tokens); ten steps an epoch and in all."""
    objective = build_objective(dict(image_size=(32, 32), modalities=dict(rgb=RGB), objective=dict(name=name, **{**SIZES, **settings})))
    return objective.resolve(lambda duration: 10)


def views(size: int = 4, seed: int = 0) -> Batch:
    """Two large and two small views of each of `size` samples."""
    rng = np.random.default_rng(seed)
    make = lambda side: rng.integers(0, 256, (size, 2, side, side, 3), dtype=np.uint8)  # noqa: E731
    return on_device({"global/rgb": make(32), "local/rgb": make(16), "label": np.zeros(size, np.int32)})


def keys_of(size: int):
    return sample_keys(0, 3, size)


# The order of a step


def test_teacher_looks_first_and_once_and_only_large_views_are_masked(monkeypatch):
    objective = tiny(**ATTMASK)
    params, state = jax.eval_shape(objective.init, jax.random.key(0))
    calls = []

    def recording(name):
        original = getattr(Network, name)

        def call(self, params, values, *arguments, **keywords):
            who = "student" if "mask_embed" in params["inputs"]["rgb"] else "teacher"
            masked = keywords.get("masked", arguments[1] if name == "embed" and len(arguments) > 1 else None)
            calls.append((who, name, values["rgb"].shape[1] if name == "embed" else values.shape[1], masked is not None))
            return original(self, params, values, *arguments, **keywords)

        monkeypatch.setattr(Network, name, call)

    for name in ("embed", "encode", "encode_with_attention"):
        recording(name)
    jax.eval_shape(lambda p, s: objective.loss(p, s, views(), keys_of(4), jnp.int32(0)), params, state)
    assert calls == [
        ("teacher", "embed", 32, False),
        ("teacher", "encode_with_attention", 16, False),
        ("student", "embed", 32, True),
        ("student", "encode", 16, False),
        ("student", "embed", 16, False),
        ("student", "encode", 4, False),
    ]


def test_masks_come_from_the_teachers_attention(monkeypatch):
    objective = tiny(scores=dict(name="attention_high"), masking=dict(ratio=0.25, ratio_var=0.0, probability=1.0))
    params, state = objective.init(jax.random.key(0))
    state["teacher"] = objective.init(jax.random.key(7))[1]["teacher"]
    seen = {}
    original = Network.embed

    def embed(self, params, values, present=None, masked=None):
        if masked is not None:
            seen["values"], seen["masked"] = values, masked
        return original(self, params, values, present, masked)

    monkeypatch.setattr(Network, "embed", embed)
    keys = keys_of(4)
    seen.update(jax.jit(lambda p, s: (objective.loss(p, s, views(), keys, jnp.int32(0)), dict(seen))[1])(params, state))

    def highest(network):
        tokens = original(objective.model, network, seen["values"])
        attention = objective.model.attention(network, tokens, slice(16, 17)).mean(axis=1)[:, 0, :16]
        return np.argsort(-np.asarray(attention), axis=1)[:, :4]

    masked = np.asarray(seen["masked"])
    assert masked.shape == (8, 16) and (masked.sum(axis=1) == 4).all()
    for row, top in zip(masked, highest(state["teacher"]), strict=True):
        assert set(np.flatnonzero(row)) == set(top)
    assert any(set(np.flatnonzero(row)) != set(top) for row, top in zip(masked, highest(teacher_params(params)), strict=True))


# What is hidden


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("which", ["high", "low"])
def test_high_and_low_hide_what_the_published_code_hides(which, ratio, fixtures):
    with np.load(fixtures / "attmask_selection.npz") as file:
        attention, expected = jnp.asarray(file["attention"]), file[f"attmask_{which}_{ratio}"]
    masking = Masking(ratio=ratio, ratio_var=0.0, probability=1.0)
    masked = choose_hidden(masking, (SCORES[f"attention_{which}"], ()), attention, keys_of(8), step_key(0, 0), GRID)
    np.testing.assert_array_equal(np.asarray(masked), expected.reshape(8, -1))
    assert (masked.sum(axis=1) == int(196 * ratio)).all()


def test_hints_are_random_tokens_of_the_top_tenth():
    masking = Masking(ratio=0.3, ratio_var=0.0, probability=1.0)
    attention = jax.random.uniform(jax.random.key(5), (64, 196))
    hidden = lambda name: np.asarray(  # noqa: E731
        choose_hidden(masking, (SCORES[name], ()), attention, keys_of(64), step_key(0, 0), GRID)
    )
    high, hint = hidden("attention_high"), hidden("attention_hint")
    shown = high & ~hint
    assert not (hint & ~high).any() and (shown.sum(axis=1) == int(0.1 * 0.3 * 196)).all()
    rank = np.argsort(np.argsort(-np.asarray(attention), axis=1), axis=1)
    assert rank[shown].max() < 19 and len(set(rank[shown])) == 19
    # As published: 0.2675 hidden on average, where without hints it is 0.2956.
    as_published = Masking(probability=1.0)
    share = jax.jit(
        jax.vmap(
            lambda step: choose_hidden(
                as_published, (SCORES["attention_hint"], ()), attention[:8], keys_of(8), step_key(0, step), GRID
            ).mean(dtype=jnp.float32)
        )
    )
    np.testing.assert_allclose(share(jnp.arange(400)).mean(), 0.2675, atol=0.012)


def test_one_ratio_for_a_step_or_one_for_each_view():
    attention = jax.random.uniform(jax.random.key(1), (64, 196))
    hide = jax.jit(
        lambda masking, step: choose_hidden(masking, (SCORES["random"], ()), attention, keys_of(64), step_key(0, step), GRID),
        static_argnums=0,
    )
    by_step = np.stack([np.asarray(hide(Masking(), jnp.int32(step))).sum(axis=1) for step in range(30)])
    assert all(len(set(row) - {0}) == 1 for row in by_step) and len(set(by_step.max(axis=1))) > 15
    assert 19 <= by_step[by_step > 0].min() and by_step.max() <= 98
    assert 0.4 < (by_step > 0).mean() < 0.6  # half of the views are masked at all
    ibot = np.asarray(hide(Masking((0.0, 0.3), (0.0, 0.2), 1.0, "view"), jnp.int32(0))).sum(axis=1)
    assert len(set(ibot)) > 15 and 0.3 < (ibot > 0).mean() < 0.7


def test_the_parts_of_a_batch_draw_the_same_ratio():
    masking, shared = Masking(), step_key(0, 11)
    whole = masking.draw(keys_of(8), shared, "ratio")
    np.testing.assert_array_equal(masking.draw(keys_of(8)[::2], shared, "ratio"), whole[:4])
    assert masking.draw(keys_of(8), shared, "hint ratio")[0] != whole[0]


def test_the_ratio_of_a_step_follows_the_seed():
    objective = tiny(**ATTMASK)
    params, state = objective.init(jax.random.key(0))
    share = jax.jit(
        lambda seed: objective.loss(
            params, state, views(), sample_keys(seed, 0, 4), jnp.int32(0), shared_key=step_key(seed, 0)
        )[1][1]["masked_share"][0]
    )  # fmt: skip
    ratios = {float(Masking().draw(keys_of(4), step_key(seed, 0), "ratio")[0]) for seed in range(3)}
    assert len(ratios) == 3 and len({float(share(seed)) for seed in range(6)}) > 3


def test_stochastic_depth_drops_more_in_later_blocks():
    branches = np.asarray(drop_path(jax.random.split(jax.random.key(0), 4000), 5, 0.4))
    assert branches.shape == (5, 2, 4000)
    np.testing.assert_allclose(branches.mean(axis=2), 1.0, atol=0.05)
    np.testing.assert_allclose((branches == 0).mean(axis=2), np.repeat(np.linspace(0, 0.4, 5)[:, None], 2, 1), atol=0.03)
    assert (branches[0] == 1).all() and (branches[4, 0] != branches[4, 1]).any()


# Training


def steps_of(objective, batch, micro_batches: int):
    """The states and the metrics after each of two steps, buffers given away as training does."""
    shapes = jax.eval_shape(lambda: objective.init(jax.random.key(0))[0])
    optimizer = adamw(
        shapes, frozen_mask(shapes, objective.model), Cosine(1e-3, 10), clip_tensor_norm=3.0,
        freeze=dict(parameters="projection/(patch_)?prototypes/.*", until=1), weight_decay=(0.04, 0.4),
    )  # fmt: skip
    step = functools.partial(train_step, objective=objective, optimizer=optimizer, seed=0, micro_batches=micro_batches)
    step = jax.jit(step, donate_argnums=0)
    state, states, all_metrics = init_state(objective, optimizer, 0), [], []
    for _ in range(2):
        state, metrics = step(state, batch, loss_limit=np.float32(np.inf))
        states.append(jax.tree.map(jnp.array, state))
        all_metrics.append({name: float(total / count) for name, (total, count) in metrics.items()})
    # A refused step leaves teacher and centers as they are.
    refused, metrics = step(state, batch, loss_limit=np.float32(-np.inf))
    assert metrics["skipped"][0] == 1
    assert_same_bits(refused, states[-1])
    return states, all_metrics


@pytest.fixture(scope="module")
def trained():
    objective = tiny(**ATTMASK)
    return objective, steps_of(objective, views(8), 1)


def test_parts_of_a_batch_add_up_to_the_whole(trained):
    objective, ((_, whole), whole_metrics) = trained
    (_, parts), parts_metrics = steps_of(objective, views(8), 2)
    for name in ("loss", "loss/global", "loss/patch", "masked_share", "grad_norm", "teacher_entropy"):
        for one, other in zip(whole_metrics, parts_metrics, strict=True):
            np.testing.assert_allclose(one[name], other[name], rtol=2e-4, err_msg=name)
    for name in ("center", "patch_center"):
        np.testing.assert_allclose(whole.objective_state[name], parts.objective_state[name], rtol=1e-3, atol=1e-5)


def test_teacher_follows_and_prototypes_wait(trained):
    objective, ((once, state), metrics) = trained
    start = objective.init(jax.random.key(0))[0]
    teacher, student = tree_paths(state.objective_state["teacher"]), tree_paths(state.params)
    assert set(student) - set(teacher) == {"inputs/rgb/mask_embed"}
    assert all(m["loss"] > 0 and m["skipped"] == 0 for m in metrics)
    first = tree_paths(start)
    name = "encoder/block_00/mlp/fc1/kernel"
    moved, followed = (np.abs(tree[name] - first[name]).max() for tree in (student, teacher))
    assert 0 < followed < 0.02 * moved
    # Step 0 left the prototypes alone, step 1 did not.
    for leaf in ("kernel", "scale"):
        name = f"projection/prototypes/{leaf}"
        np.testing.assert_array_equal(tree_paths(once.params)[name], first[name])
        assert np.abs(student[name] - first[name]).max() > 0


def test_teacher_momentum_rises_to_one():
    objective = tiny("dino", teacher_momentum=0.9).resolve(lambda duration: 100)
    params, state = objective.init(jax.random.key(0))
    state["teacher"] = jax.tree.map(jnp.zeros_like, state["teacher"])
    for step, expected in ((0, 0.9), (50, 0.95), (100, 1.0)):
        new = objective.after_update(state, params, Batch({}), keys_of(1), jnp.int32(step), {}, {})
        moved = np.asarray(new["teacher"]["global_tokens"] / params["global_tokens"])
        np.testing.assert_allclose(moved, 1 - expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_centers_follow_the_batch(momentum):
    objective = tiny("ibot", center_momentum=momentum).resolve(lambda duration: 100)
    params, state = objective.init(jax.random.key(0))
    told = {name: jax.random.normal(jax.random.key(1), (3, *state[name].shape)) for name in ("center", "patch_center")}
    state |= {name: jnp.ones_like(state[name]) for name in told}
    new = objective.after_update(state, params, Batch({}), keys_of(3), jnp.int32(0), told, {})
    for name, rows in told.items():
        np.testing.assert_allclose(new[name], momentum + (1 - momentum) * rows.mean(axis=0), rtol=1e-6, atol=1e-6)


def test_temperature_rises_by_whole_epochs():
    objective = dataclasses.replace(tiny(), steps_per_epoch=10, temperature_warmup=300)
    table = np.concatenate([np.linspace(0.04, 0.07, 30), np.full(70, 0.07)])
    at = [float(objective.temperature((0.04, 0.07), step)) for step in range(0, 1000, 10)]
    np.testing.assert_allclose(at, table, rtol=1e-6)
    assert objective.temperature((0.04, 0.07), 9) == objective.temperature((0.04, 0.07), 0)
    without = tiny("dino", temperature_warmup=0)
    np.testing.assert_allclose(without.temperature((0.04, 0.07), 0), 0.07, rtol=1e-6)


def collapse_of(objective, targets, features, step=50):
    """The signs of collapse, of sums over two halves of the views."""
    halves = [collapse_sums(targets[part::2], features[part::2]) for part in (0, 1)]
    return objective.summarize(jax.tree.map(jnp.add, *halves), jnp.int32(step))


def alarms(objective, targets, features, step=50):
    values = collapse_of(objective, targets, features, step)
    return {name.removeprefix("alarm/") for name in values if name.startswith("alarm/") and values[name][0]}


def test_collapse_is_told():
    objective = tiny("dino").resolve(lambda duration: 100)
    targets = jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (16, 24)))
    features = jax.random.normal(jax.random.key(1), (16, 32))
    healthy = collapse_of(objective, targets, features)
    assert 0.9 < healthy["feature_spread"][0] < 1.1 and 0.3 < healthy["teacher_entropy"][0] < 0.95
    assert not alarms(objective, targets, features)
    sure = jnp.eye(24)[:16]  # sure of itself, and says something else of every view
    np.testing.assert_allclose(collapse_of(objective, sure, features)["teacher_information"][0], np.log(16) / np.log(24), rtol=1e-5)
    unit = np.asarray(features) / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(healthy["feature_spread"][0], unit.std(axis=0).mean() * np.sqrt(32), rtol=1e-5)
    assert not alarms(objective, sure, features)
    assert not alarms(objective, sure[:2] * 0 + sure[0], features[:2])  # two views of one image should be told the same

    uniform, one = jnp.full((16, 24), 1 / 24), jnp.tile(sure[3], (16, 1))
    assert alarms(objective, uniform, features) == {"uniform_teacher", "same_targets"}
    assert alarms(objective, one, features) == {"same_targets"}
    assert alarms(objective, jnp.tile(targets[0], (16, 1)), features) == {"same_targets"}
    assert alarms(objective, targets, jnp.ones((16, 32))) == {"constant_features"}
    for collapsed in (uniform, one):  # an untrained network looks like this
        assert not alarms(objective, collapsed, jnp.ones((16, 32)), step=5)


# Sizes and initial values


def test_parameters_of_the_published_vit_s():
    objective = build_objective(get_config("configs/pretrain/attmask_s_100e.py").to_dict())
    shapes = jax.eval_shape(lambda: objective.init(jax.random.key(0))[0])
    head = sum(x.size for x in jax.tree.leaves(shapes["projection"]))
    assert count_parameters(shapes, objective.model) == (29_280_768, 29_280_768)
    assert head == 7_614_720 and count_parameters(shapes)[0] - head == 21_666_048
    dino = build_objective(get_config("configs/pretrain/dino_s_100e.py").to_dict())
    shapes = jax.eval_shape(lambda: dino.init(jax.random.key(0))[0])
    total, trained = count_parameters(shapes, dino.model)
    assert total - trained == 65536 and "mask_embed" not in shapes["inputs"]["rgb"]


def test_initial_values():
    objective = tiny(projection=dict(hidden=64, bottleneck=16, num_prototypes=24, num_patch_prototypes=48))
    params = tree_paths(objective.init(jax.random.key(3))[0])
    assert params["projection/patch_prototypes/kernel"].shape == (16, 48)
    assert (params["projection/prototypes/scale"] == 1).all() and not params["inputs/rgb/mask_embed"].any()
    for name in ("encoder/block_01/mlp/fc1/kernel", "encoder/block_00/attn/qkv/kernel", "projection/fc1/kernel"):
        np.testing.assert_allclose(params[name].std(), 0.02, rtol=0.1, err_msg=name)
    for name, fan_in in (("inputs/rgb/proj/kernel", 192), ("projection/prototypes/kernel", 16)):
        bound = 1 / math.sqrt(fan_in)
        assert 0.95 * bound < np.abs(params[name]).max() <= bound, name
    assert len({params[name].ravel()[0].item() for name in params if name.endswith("kernel")}) == sum(n.endswith("kernel") for n in params)


# Config and runs


@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        ("ibot", dict(masking=dict(ratio=0.9)), "ratio 0.9 -\\+ ratio_var 0.2 must be in 0 ... 1"),
        ("ibot", dict(masking=dict(per="image")), "masking.per is 'image'; known: step, view"),
        ("ibot", dict(masking=dict(share=0.3)), "config.objective.masking has unknown key 'share'"),
        ("ibot", dict(scores=dict(name="attention_hint", ratio=0.2)), "unknown key 'ratio'; known: show_max"),
        ("ibot", dict(scores=dict(name="loud")), "config.objective.scores.name is 'loud'"),
        ("ibot", dict(guidance=dict(name="block_mask"), scores=dict(name="random")), "scores is set, but guidance 'block_mask'"),
        ("ibot", dict(guidance=dict(name="self_attention")), "guidance.name is 'self_attention'; known: block_mask"),
        ("ibot", dict(projection=dict(out=3)), "projection has unknown key 'out'; known: hidden"),
        ("dino", dict(scores=dict(name="random")), "unknown key 'scores'"),
        ("dino", dict(teacher_momentum=1.0), "teacher_momentum is 1.0; it must be at least 0 and below 1"),
        ("ibot", dict(center_momentum=-0.1), "center_momentum is -0.1; it must be at least 0 and below 1"),
        ("dino", dict(teacher_temperature=(0.0, 0.07)), "teacher_temperature"),
        ("dino", dict(inputs=("thermal",)), "config.objective.inputs names 'thermal'; declared in config.modalities: rgb"),
    ],
)  # fmt: skip
def test_bad_config(name, block, message):
    with pytest.raises(ValueError, match=message):
        tiny(name, **block)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.mark.parametrize("method", ["dino", "attmask"])
def test_a_run_resumes_bit_for_bit(method, data_dir, tmp_path):
    config = common.attmask_s() if method == "attmask" else common.distillation_s("dino", epochs=100, global_batch=8)
    settings = on_scenes(common.smoke(config), data_dir).to_dict()
    settings |= dict(micro_batch=8, picture_every=0, evaluators={}, checkpoint=dict(every="7 steps", keep=1), total="7 steps")
    settings["schedule"] = dict(total_epochs=100.0, warmup_epochs=1.0)
    whole = setup.train(str(tmp_path / "whole"), **settings)
    setup.train(str(tmp_path / "stopped"), **{**settings, "total": "3 steps"})
    resumed = setup.train(str(tmp_path / "stopped"), **settings)
    for ours, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # The teacher stands for the run: it is what a checkpoint is opened for.
    loaded = features.load(tmp_path / "whole")
    shown = jnp.zeros((1, 32, 32, 3), jnp.uint8)
    for name, value in loaded.objective.predict(loaded.params, (), Batch({"rgb": shown})).items():
        theirs = loaded.objective.predict(whole.params, whole.objective_state, Batch({"rgb": shown}))[name]
        np.testing.assert_allclose(value, theirs, rtol=1e-5, atol=1e-5)
    assert set(whole.objective_state) == {"teacher", "center"} | ({"patch_center"} if method == "attmask" else set())


def test_views_are_wanted_or_refused(data_dir, tmp_path):
    settings = on_scenes(common.smoke(common.attmask_s()), data_dir).to_dict()
    settings["data"]["augment"]["views"] = {}
    with pytest.raises(ValueError, match="'ibot' learns from several views of a record: set config.data.augment.views"):
        setup.train(str(tmp_path), **settings)
    settings = on_scenes(common.smoke(common.scenes()), data_dir).to_dict()
    settings["data"]["augment"]["views"] = dict(local_crops=2)
    with pytest.raises(ValueError, match="'multimae' takes one view of a record: remove config.data.augment.views"):
        setup.train(str(tmp_path), **settings)
