"""A MultiMAE small enough to compile in seconds, and synthetic batches for it."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskvit.core.types import Batch, Params, TrainState, batch_of, tree_paths
from maskvit.objectives import build_objective
from maskvit.objectives.masked import MaskedAutoencoder

MODALITIES: dict[str, dict[str, Any]] = {
    "rgb": dict(channels=3, patch=8, loss="mse", scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "depth": dict(channels=1, patch=8, loss="l1", scale=1 / 65536, standardize=True),
    "semseg": dict(kind="categorical", num_classes=7, patch=8, stride=4, loss="cross_entropy", embed_dim=8),
}
RANDOM = dict(scores=dict(name="random"))
GUIDED = dict(scores=dict(name="attention_high"), guidance=dict(name="self_attention", query="mean"))


def tiny_config(modalities: dict[str, dict[str, Any]] | None = None, **objective: Any) -> dict[str, Any]:
    """Image 32, patch 8 (48 tokens), width 48; `objective` overrides that block."""
    block: dict[str, Any] = dict(
        name="multimae",
        inputs=("rgb", "depth", "semseg"),
        outputs=("rgb", "depth", "semseg", "norm_rgb"),
        encoder=dict(width=48, depth=2, heads=3),
        decoder=dict(width=16, depth=1, heads=4),
        num_visible=12,
    )
    return dict(image_size=(32, 32), modalities=copy.deepcopy(modalities or MODALITIES), objective={**block, **objective})


def tiny_objective(modalities: dict[str, dict[str, Any]] | None = None, **objective: Any) -> MaskedAutoencoder:
    """The objective of `tiny_config`."""
    return build_objective(tiny_config(modalities, **objective))


def fresh_params(objective: Any, seed: int = 0) -> Params:
    """Initial parameters. Not compiled as a whole: the same few operations on the same shapes serve every objective of a test process."""
    return objective.init(jax.random.key(seed))[0]


def tiny_batch(size: int = 8, seed: int = 0, image: tuple[int, int] = (32, 32), present: bool = False) -> dict[str, np.ndarray]:
    """Smooth pictures, depth in counts and class maps as a loader delivers them. `present`: half the samples lack something."""
    rng = np.random.default_rng(seed)
    rows, columns = (np.linspace(0, 1, side) for side in image)
    angle, shift = rng.uniform(0, 6.3, (2, size, 1, 1, 4))
    ramp = np.cos(angle) * rows[None, :, None, None] + np.sin(angle) * columns[None, None, :, None]
    maps = np.sin(4 * ramp + shift) + 0.1 * rng.standard_normal((size, *image, 4))
    batch = {
        "rgb": np.clip(127 + 80 * maps[..., :3], 0, 255).astype(np.uint8),
        "depth": (3000 + 900 * maps[..., 3:]).astype(np.float32),
        "semseg": np.clip(np.round(3 + 2 * maps[:, 2::4, 2::4, 0]), 0, 6).astype(np.int32),
    }
    if present:
        pattern = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1], [1, 0, 0], [0, 1, 0], [1, 1, 1]], bool)
        batch["present"] = np.resize(pattern, (size, 3))
    return batch


def on_device(batch: dict[str, np.ndarray]) -> Batch:
    """What a loader delivers as a batch of device arrays."""
    return batch_of(jax.tree.map(jnp.asarray, batch))


def assert_same_bits(ours: TrainState, theirs: TrainState) -> None:
    """Parameters, moments and what the objective keeps are equal bit for bit: also in the sign of a zero, and in what is no number."""
    for part in ("params", "opt_state", "objective_state"):
        one, two = (tree_paths(getattr(state, part)) for state in (ours, theirs))
        assert one.keys() == two.keys()
        different = [name for name in one if np.asarray(one[name]).tobytes() != np.asarray(two[name]).tobytes()]
        assert not different, f"{part}: {different}"


def counting(function: Any) -> tuple[Any, list[int]]:
    """`function` and a list that grows by one entry each time it is traced."""
    traces: list[int] = []

    def counted(*arguments: Any, **keywords: Any) -> Any:
        traces.append(1)
        return function(*arguments, **keywords)

    return counted, traces
