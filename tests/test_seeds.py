"""Every random draw follows the run's seed: each by its name, drawn under two seeds and found different."""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MODALITIES, fresh_params, on_device, tiny_batch, tiny_objective

from maskvit.core.keys import sample_keys, step_key, stream_keys
from maskvit.core.modalities import RGB, parse_modalities
from maskvit.core.types import Batch, Record, TokenLayout
from maskvit.data import scenes
from maskvit.data.batches import train_batches
from maskvit.data.builders.folder import Folder
from maskvit.data.order import epoch_order
from maskvit.data.sources import ListSource
from maskvit.heads import HEADS
from maskvit.masking.budgets import BUDGETS
from maskvit.masking.plan import mix_with_random
from maskvit.masking.scores import SCORES
from maskvit.nn.encoder import drop_path
from maskvit.objectives import OBJECTIVES, build_objective
from maskvit.objectives.distillation import Masking, choose_hidden, split_views
from tests.runs import ROOT

SAMPLES, STEP = 16, 3
LAYOUT = TokenLayout(("rgb", "depth"), ((4, 4), (4, 4)))
ATTENTION = jnp.tile(jnp.linspace(0.1, 1.0, LAYOUT.num_tokens), (SAMPLES, 1))
RANKS_ONLY = ("attention_high", "attention_low")  # nothing is drawn
OPTIONS: dict[str, dict[str, Any]] = {"attention_stochastic": dict(alpha=0.5), "attention_hint": dict(show_max=0.8, ratio=0.5)}
RANDOM_BUDGETS = ("dirichlet", "adaptive_dirichlet", "uniform_subsets")
SMALL = dict(encoder=dict(width=32, depth=2, heads=4), decoder=dict(width=16, depth=1, heads=2))
HIGH = dict(scores=dict(name="attention_high"), budget=dict(name="equal"))
VIEWS = dict(local_crops=2, local_size=(16, 16), jitter=1.0, blur=(1.0, 1.0, 1.0), solarize=(0.5, 0.5, 0.5), grey=0.5)
PLAIN = {**VIEWS, "jitter": 0.0, "grey": 0.0, "blur": (0.0, 0.0, 0.0), "solarize": (0.0, 0.0, 0.0)}


def keys_of(seed: int):
    return sample_keys(seed, STEP, SAMPLES)


# The draws


def initial(name: str) -> Callable[[int], Any]:
    """The parameters that an objective draws: those that are the same number everywhere, and position tables, are not drawn."""
    if name == "supervised":
        return fine_tuned()
    block = dict(projection=dict(hidden=32, bottleneck=16, num_prototypes=24)) if name in ("dino", "ibot") else {}
    sizes = dict(SMALL) if not block else dict(encoder=SMALL["encoder"], **block)
    outputs = {} if block else dict(outputs=("norm_rgb",))
    config = dict(
        image_size=(16, 16), modalities=dict(rgb=MODALITIES["rgb"]), objective=dict(name=name, inputs=("rgb",), **outputs, **sizes)
    )
    if name == "multimae":
        config["objective"]["num_visible"] = 2
    return parameters_of(build_objective(config))


def parameters_of(objective: Any) -> Callable[[int], Any]:
    def draw(seed: int) -> list[np.ndarray]:
        params = fresh_params(objective, seed)
        named = jax.tree_util.tree_leaves_with_path(params)
        return [np.asarray(x) for path, x in named if np.ptp(x) and not str(path[-1].key).startswith("pos_embed")]

    return draw


def classifier(**task: Any) -> Any:
    block = dict(name="supervised", encoder=SMALL["encoder"], task=dict(name="classification", num_classes=5, **task))
    return build_objective(dict(image_size=(16, 16), modalities=dict(rgb=MODALITIES["rgb"]), objective=block))


def fine_tuned() -> Callable[[int], Any]:
    return parameters_of(classifier())


def augmented(**task: Any) -> Callable[[int], Any]:
    """What fine-tuning does to pictures on the device: one key for each part of a batch, one for each sample."""
    objective, images = classifier(**task), jax.random.normal(jax.random.key(9), (SAMPLES, 16, 16, 3))
    batch = Batch({"rgb": images}, label=jnp.arange(SAMPLES) % 5)

    def draw(seed: int) -> Any:
        keys = keys_of(seed)
        part = stream_keys(stream_keys(keys[0], "part"), "mix")
        return objective.task.augment(part, stream_keys(keys, "erase"), {"rgb": images}, batch)[0]["rgb"]

    return draw


def dropped(seed: int) -> Any:
    """What a head drops in training."""
    head = HEADS["upernet"].module(channels=3, width=8, pools=(1, 2), auxiliary_width=4, dtype=jnp.float32)
    maps = tuple(jax.random.normal(jax.random.key(i), (2, 4, 4, 8)) for i in range(4))
    variables = head.init(jax.random.key(0), maps, (8, 8))
    key = stream_keys(stream_keys(keys_of(seed)[0], "part"), "head")
    return head.apply(variables, maps, (8, 8), train=True, rngs={"dropout": key}, mutable=["statistics"])[0][0]


def scores(name: str) -> Callable[[int], Any]:
    return lambda seed: SCORES[name](stream_keys(keys_of(seed), "scores"), LAYOUT, ATTENTION, None, **OPTIONS.get(name, {}))


def budget(name: str) -> Callable[[int], Any]:
    return lambda seed: BUDGETS[name](stream_keys(keys_of(seed), "budget"), LAYOUT, 12, None, None, jnp.ones(2))


def masked(**objective: Any) -> Callable[[int], Any]:
    """The plan of a small model with given parameters: what the guidance draws shows in what is hidden, or rebuilt."""
    chosen = tiny_objective(**SMALL, **{**HIGH, **objective})

    @functools.cache
    def compiled():
        params = fresh_params(chosen)
        record = Record(jnp.arange(8), jnp.tile(jnp.array([0.0, 0, 1, 1]), (8, 1)), jnp.zeros(8, bool))
        batch = on_device(tiny_batch(8))._replace(record=record, maps=jnp.ones((8, 1, 4, 4)))
        state = chosen.init_state(params, 8)
        return jax.jit(lambda keys: chosen.plan(params, batch, keys, state, jnp.int32(STEP))[0])

    def draw(seed: int) -> Any:
        plan = compiled()(sample_keys(seed, STEP, 8))
        return plan.predicted_ids if "predicted" in objective else plan.masked

    return draw


def hidden(masking: Masking, name: str = "attention_high", **options: Any) -> Callable[[int], Any]:
    """AttMask's and iBOT's masks of a student's views."""
    rule = (SCORES[name], tuple(options.items()))
    return lambda seed: choose_hidden(masking, rule, ATTENTION, keys_of(seed), step_key(seed, STEP), LAYOUT)


@functools.cache
def pictures() -> ListSource:
    rng = np.random.default_rng(0)
    return ListSource([{"rgb": rng.integers(0, 256, (48, 48, 3), dtype=np.uint8), "label": 0} for _ in range(8)])


def loaded(key: str, **settings: Any) -> Callable[[int], Any]:
    """What the loader makes of the records, in the order of their numbers."""

    def draw(seed: int) -> np.ndarray:
        specs = parse_modalities({"rgb": {**RGB, "patch": 8}})
        with train_batches(pictures(), specs, (32, 32), seed=seed, global_batch=8, extras=("index",), **settings) as batches:
            batch = next(batches)
        return batch[key][np.argsort(batch["index"])]

    return draw


def packed(tmp: pathlib.Path) -> Callable[[int], Any]:
    """Which samples `--val_fraction` takes."""
    for i in range(20):
        (tmp / "rgb" / "all").mkdir(parents=True, exist_ok=True)
        (tmp / "rgb" / "all" / f"{i:02d}.png").write_bytes(b"")
    specs = parse_modalities({"rgb": RGB})

    def draw(seed: int) -> np.ndarray:
        folder = Folder(root=str(tmp), data_dir=str(tmp / "data"), name="x", modalities=specs, val_fraction=0.3, seed=seed)
        return np.array([task.key for task in folder.tasks["val"]])

    return draw


DRAWS: dict[str, Callable[[int], Any]] = {
    **{f"parameters of {name}": initial(name) for name in OBJECTIVES},
    **{f"scores {name}": scores(name) for name in SCORES if name not in RANKS_ONLY},
    **{f"budget {name}": budget(name) for name in RANDOM_BUDGETS},
    "the share of guided tokens": lambda seed: mix_with_random(
        stream_keys(keys_of(seed), "share"), ATTENTION, jnp.full((SAMPLES, 2), 4), LAYOUT, 0.5
    ),
    "which hidden tokens are rebuilt": masked(guidance=dict(name="self_attention"), predicted=dict(share=0.5, by="random")),
    "scores of a joint budget": masked(scores=dict(name="random"), budget=dict(name="joint")),
    "heads of self_attention": masked(guidance=dict(name="self_attention", heads="random")),
    "passes of reconstruction_error": masked(guidance=dict(name="reconstruction_error")),
    "tokens of sampled_attention": masked(guidance=dict(name="sampled_attention")),
    "predicted_attention before it is fitted": masked(guidance=dict(name="predicted_attention")),
    "average_error of unseen records": masked(guidance=dict(name="average_error")),
    "random_map": masked(guidance=dict(name="random_map")),
    "order within block_mask": masked(guidance=dict(name="block_mask")),
    "AttMask's ratio per step": hidden(Masking(ratio=0.5, ratio_var=0.4, probability=1.0, per="step")),
    "AttMask's ratio per view": hidden(Masking(ratio=0.5, ratio_var=0.4, probability=1.0, per="view")),
    "AttMask's hints": hidden(Masking(ratio=0.5, ratio_var=0.0, probability=1.0, per="view"), "attention_hint", show_max=0.8),
    "AttMask's share of hints": hidden(
        Masking(ratio=(0.5,), ratio_var=(0.4,), probability=1.0, per="step"), "attention_hint", show_max=0.8
    ),
    "iBOT's views without a mask": hidden(Masking(ratio=0.5, ratio_var=0.0, probability=0.5)),
    "iBOT's random masks": hidden(Masking(ratio=0.5, ratio_var=0.0, probability=1.0), "random"),
    "keys of the large views": lambda seed: jax.random.key_data(split_views(keys_of(seed), "global views", 2)),
    "keys of the small views": lambda seed: jax.random.key_data(split_views(keys_of(seed), "local views", 2)),
    "drop path": lambda seed: drop_path(stream_keys(keys_of(seed), "drop path"), 4, 0.5),
    "mixup and CutMix": augmented(mixup=0.8, cutmix=1.0),
    "random erasing": augmented(erasing=1.0),
    "what a head drops": dropped,
    "order of the records": lambda seed: epoch_order(seed, 0, 50),
    "order of the records in a later epoch": lambda seed: epoch_order(seed, 7, 50),
    "crops": loaded("rgb", augment=dict(flip=0.0)),
    "mirrored pictures": loaded("rgb", augment=dict(crop="center", flip=0.5)),
    "RandAugment": loaded("rgb", augment=dict(crop="center", flip=0.0, randaugment="rand-m9-mstd0.5-inc1")),
    "color jitter": loaded("rgb", augment=dict(crop="center", flip=0.0, color_jitter=dict(probability=1.0, brightness=(0.5, 1.5)))),
    "three-augment": loaded("rgb", augment=dict(crop="center", flip=0.0, three_augment=True)),
    "gray pictures": loaded("rgb", augment=dict(crop="center", flip=0.0, gray=0.5)),
    "clamped crops": loaded("rgb", augment=dict(crop="random_resized_once", flip=0.0)),
    "block masks of the loader": loaded("guidance", blocks=(0.4, 0.1)),
    "large views": loaded("global/rgb", augment=dict(views=PLAIN)),
    "small views": loaded("local/rgb", augment=dict(views=PLAIN)),
    "colors of the views": loaded("global/rgb", augment=dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, views=VIEWS)),
    "rendered scenes": lambda seed: scenes.render(seed, 0, (32, 32))["rgb"],
}


@pytest.mark.parametrize("name", DRAWS)
def test_two_seeds_draw_differently_and_one_seed_the_same(name):
    first, again, other = (jax.tree.leaves(jax.device_get(DRAWS[name](seed))) for seed in (0, 0, 1))
    assert first and len(first) == len(other)
    for one, same, another in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, another), f"{name} does not follow the seed"


def test_validation_samples_follow_the_seed(tmp_path):
    draw = packed(tmp_path)
    assert np.array_equal(draw(0), draw(0)) and not np.array_equal(draw(0), draw(1))


def test_no_draw_is_left_out():
    """Streams of the training's keys by name, and rows of tables: what is new belongs into `DRAWS`."""
    source = "\n".join(path.read_text() for path in sorted((ROOT / "maskvit").rglob("*.py")) if path.parent.name not in ("bench", "report"))
    streams = set(re.findall(r"(?<!def )(?:stream_keys|split_views)\([^()]*(?:\([^()]*\)[^()]*)*, f?\"([^\"]+)\"", source))
    assert streams == {
        "scores", "hints", "budget", "share", "predicted", "joint", "errors {i}", "heads", "sampled", "unpredicted", "unknown",
        "random map", "block mask", "drop path", "masked at all", "global views", "local views",
        "part", "mix", "erase", "head",
        "hidden",  # patches that an evaluator hides, by its own seed: figures of one picture do not depend on the run's
    }  # fmt: skip
    assert set(BUDGETS) == {*RANDOM_BUDGETS, "equal", "fixed", "joint"}
