"""Twenty losses of every kind of method on every kind of mesh, against one device; and checkpoints that go from mesh to mesh.

    python -m tests.meshes      eight devices that the CPU plays; the table of docs/speed.md, in about ten minutes

Ends with status 1 where losses differ by more than 1e-5. The suite runs some of its rows on four devices (test_sharding.py).
"""

from __future__ import annotations

import functools
import os
import pathlib
import sys
from typing import Any

if __name__ == "__main__":  # before JAX starts
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(pathlib.Path(__file__).parent))

import jax
import numpy as np
from tiny import GUIDED, RANDOM, tiny_batch, tiny_objective

from maskvit.core.keys import sample_keys
from maskvit.nn.backbone import frozen_mask
from maskvit.objectives import build_objective
from maskvit.optim.schedules import Cosine
from maskvit.optim.transforms import adamw
from maskvit.sharding import batch_sharding, make_mesh, parameter_shardings, place_batch, replicated
from maskvit.training.step import init_state, train_step

STEPS, BATCH, TOLERANCE = 20, 16, 1e-5
ENCODER, DECODER = dict(width=64, depth=1, heads=4), dict(width=32, depth=1, heads=4)
RGB = dict(channels=3, patch=8, scale=1 / 255, mean=(0.5,), std=(0.25,))


@functools.cache
def method(name: str) -> Any:
    """A small objective whose parameters are large enough to be spread."""
    if name in ("random", "guided"):
        masking = dict(random=RANDOM, guided=GUIDED)[name]
        return tiny_objective(outputs=("rgb", "depth"), encoder=ENCODER, decoder=DECODER, **masking)
    block: dict[str, Any] = dict(name=name, encoder=ENCODER)
    if name == "mae":
        block |= dict(decoder=dict(width=64, depth=1, heads=4))
    else:
        block |= dict(
            projection=dict(hidden=64, bottleneck=32, num_prototypes=128), scores=dict(name="attention_high"),
            masking=dict(ratio=0.3, ratio_var=0.2, probability=0.5, per="step"),
        )  # fmt: skip
    objective = build_objective(dict(image_size=(32, 32), modalities=dict(rgb=RGB), objective=block))
    return objective.resolve(lambda duration: 10)


def batch_for(objective: Any, seed: int, size: int = BATCH) -> dict[str, np.ndarray]:
    """What a loader would give it."""
    if not objective.needs.views:
        return tiny_batch(size, seed=seed)
    rng = np.random.default_rng(seed)
    sides = {"global/rgb": 32, "local/rgb": 16}
    views = {name: rng.integers(0, 256, (size, 2, side, side, 3), dtype=np.uint8) for name, side in sides.items()}
    return views | {"label": np.zeros(size, np.int32)}


class Training:
    """The train step of a method on so many devices, compiled, and a fresh state."""

    def __init__(self, name: str, devices: int, micro_batches: int = 1, **sharding: int):
        self.objective, self.mesh = method(name), make_mesh(jax.devices()[:devices], **sharding)
        shapes, _ = jax.eval_shape(self.objective.init, jax.random.key(0))
        optimizer = adamw(shapes, frozen_mask(shapes, self.objective.model), Cosine(peak=1e-4, total=1000))
        start = functools.partial(init_state, self.objective, optimizer, 0)
        self.places = parameter_shardings(jax.eval_shape(start), self.mesh)
        self.state = jax.device_put(start(), self.places)
        step = functools.partial(
            train_step, objective=self.objective, optimizer=optimizer, seed=0, micro_batches=micro_batches, mesh=self.mesh
        )
        places = dict(
            in_shardings=(self.places, batch_sharding(self.mesh)), out_shardings=(self.places, replicated(self.mesh))
        )  # fmt: skip
        self.step = jax.jit(step, donate_argnums=0, **places)

    def batch(self, seed: int) -> Any:
        return place_batch(batch_for(self.objective, seed), self.mesh)

    def losses(self, steps: range = range(STEPS)) -> np.ndarray:
        """The losses of the next steps, on the batches of these numbers."""
        found = []
        for i in steps:
            self.state, metrics = self.step(self.state, self.batch(i))
            found.append(float(metrics["loss"][0]))
        assert int(self.state.skipped) == 0
        return np.array(found)

    def masked(self) -> np.ndarray:
        """What is hidden at step 0."""
        plan = jax.jit(lambda params, batch, keys: self.objective.plan(params, batch, keys)[0].masked)
        return np.asarray(plan(self.state.params, self.batch(0), sample_keys(0, 0, BATCH)))


@functools.cache
def losses(name: str, devices: int, micro_batches: int = 1, **sharding: int) -> np.ndarray:
    return Training(name, devices, micro_batches, **sharding).losses()


MESHES: tuple[dict[str, int], ...] = (dict(), dict(fsdp=8), dict(tensor=2), dict(tensor=4), dict(fsdp=4, tensor=2), dict(fsdp=2, tensor=2))


def main() -> int:
    """The table; 1 where anything is further from one device than `TOLERANCE`."""
    columns = [f"{name}, {n} micro-batch(es)" for name in ("guided", "mae", "ibot") for n in (1, 2)]
    print("| data x fsdp x tensor | " + " | ".join(columns) + " |")
    print("|---" * 7 + "|")
    worst = 0.0
    for sharding in MESHES:
        row = []
        for name in ("guided", "mae", "ibot"):
            for micro_batches in (1, 2):
                difference = np.abs(losses(name, 8, micro_batches, **sharding) / losses(name, 1) - 1).max()
                worst = max(worst, difference)
                row.append(f"{difference:.0e}")
        print(f"| {' x '.join(str(n) for n in make_mesh(**sharding).devices.shape)} | " + " | ".join(row) + " |", flush=True)
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
