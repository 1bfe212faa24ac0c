"""Multinomial logistic regression on frozen features by L-BFGS, its regularization chosen on held-out training data.

Protocols: DINOv2 and DINOv3 (45 strengths from 1e-6 to 1e5), Darcet et al., "CAPI", 2025 (8 strengths), both by cuML, of whose objective
this is: |W|^2 / 2 + C sum of losses, biases free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from maskvit.evaluators.features import BASELINES, Examples, check_features
from maskvit.evaluators.frozen import Figures, Frozen
from maskvit.evaluators.reading import local
from maskvit.losses.classes import cross_entropy
from maskvit.metrics import classification
from maskvit.metrics.accumulate import added
from maskvit.sharding import batch_sharding, replicated, sample_devices

WHERE = "config.evaluators options"
STRENGTHS = tuple(float(10**x) for x in np.linspace(-6, 5, 8))  # CAPI's
CHUNK = 8192  # examples whose scores are held at a time on each device
MEMORY = 10  # steps that L-BFGS remembers
PATIENCE = 5  # steps in a row without a lower loss, which float32 then cannot tell apart


class Scaler:
    """Subtracts the mean and divides by the deviation of each feature over the examples it is made of (scikit-learn's StandardScaler)."""

    def __init__(self, features: Num[np.ndarray, "n d"], on: bool = True):
        mean, deviation = np.zeros(features.shape[1]), np.ones(features.shape[1])
        if on:
            mean = features.mean(axis=0, dtype=np.float64)
            squares = sum(np.square(part.astype(np.float64) - mean).sum(axis=0) for part in _parts(features))
            deviation = np.sqrt(np.asarray(squares) / len(features))
        self.mean, self.deviation = mean.astype(np.float32), np.where(deviation > 0, deviation, 1.0).astype(np.float32)

    def __call__(self, features: Num[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        """Scaled, float32."""
        return (np.asarray(features, np.float32) - self.mean) / self.deviation


def _parts(array: Shaped[np.ndarray, "n d"]) -> Iterator[Shaped[np.ndarray, "m d"]]:
    for first in range(0, len(array), CHUNK):
        yield array[first : first + CHUNK]


class Regression:
    """Logistic regression of one set of examples, for several strengths.

    Args:
      features, labels: of the examples; they lie on the devices, a part on each.
      num_classes: labels are below it.
      iterations: at most so many steps of L-BFGS.
      tolerance: it ends where no slope of the mean loss is steeper, or the loss falls no more.
    """

    def __init__(
        self, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], num_classes: int, mesh: Mesh, iterations: int,
        tolerance: float,
    ):  # fmt: skip
        devices = sample_devices(mesh)
        rows = min(CHUNK, -(-len(labels) // devices)) * devices
        missing = -len(labels) % rows
        # Columns of examples: chunk after chunk is read, and the rows of each are spread over the devices.
        x = np.pad(features, ((0, missing), (0, 0))).reshape(rows, -1, features.shape[1])
        self._x, self._labels, self._form = jax.device_put(x, batch_sharding(mesh)), labels.astype(np.int32), (rows, missing)
        self._shape = features.shape[1], num_classes
        self._mesh, self._iterations, self._tolerance = mesh, iterations, tolerance
        self._fit = jax.jit(self._minimize, out_shardings=replicated(mesh))

    def __call__(self, strength: float, start: Any = None, left_out: Bool[np.ndarray, " n"] | None = None) -> Any:
        """The weights {"kernel" "d k", "bias" "k"} of strength C.

        `start`: those to begin from, by default 0. `left_out`: True for examples that are not fitted; the program is the same with any.
        """
        labels = self._labels if left_out is None else np.where(left_out, -1, self._labels)
        rows, missing = self._form
        y = jax.device_put(np.pad(labels, (0, missing), constant_values=-1).reshape(rows, -1), batch_sharding(self._mesh))
        count = max(int((labels >= 0).sum()), 1)
        zeros = {"kernel": np.zeros(self._shape, np.float32), "bias": np.zeros(self._shape[1], np.float32)}
        start = jax.device_put(zeros, replicated(self._mesh)) if start is None else start
        return self._fit(start, self._x, y, jnp.float32(1.0 / (strength * count)), jnp.float32(count))

    def _minimize(
        self, weights: Any, x: Float[Array, "r c d"], y: Int[Array, "r c"], decay: Float[Array, ""], count: Float[Array, ""]
    ) -> Any:
        def loss(weights: Any) -> Float[Array, ""]:
            @jax.checkpoint
            def of_chunk(total: Float[Array, ""], place: Int[Array, ""]) -> tuple[Float[Array, ""], None]:
                features, labels = (jax.lax.dynamic_index_in_dim(array, place, 1, keepdims=False) for array in (x, y))
                return total + cross_entropy(scores(weights, features), labels)[0].sum(), None

            total, _ = jax.lax.scan(of_chunk, jnp.zeros(()), jnp.arange(x.shape[1]))
            return total / count + 0.5 * decay * jnp.square(weights["kernel"]).sum()

        optimizer = optax.lbfgs(memory_size=MEMORY)
        value_and_grad = optax.value_and_grad_from_state(loss)

        def step(carry: Any) -> Any:
            weights, state, least, stalled = carry
            value, slope = value_and_grad(weights, state=state)
            updates, state = optimizer.update(slope, state, weights, value=value, grad=slope, value_fn=loss)
            return optax.apply_updates(weights, updates), state, jnp.minimum(value, least), jnp.where(value < least, 0, stalled + 1)

        def goes_on(carry: Any) -> Any:
            count, slope = (optax.tree.get(carry[1], name) for name in ("count", "grad"))
            steepest = jnp.max(jnp.array([jnp.abs(part).max() for part in jax.tree.leaves(slope)]))
            return (count == 0) | ((count < self._iterations) & (steepest > self._tolerance) & (carry[3] < PATIENCE))

        start = weights, optimizer.init(weights), jnp.float32(jnp.inf), jnp.int32(0)
        return jax.lax.while_loop(goes_on, step, start)[0]


def scores(weights: Any, features: Float[Array, "n d"]) -> Float[Array, "n k"]:
    """Class scores before the softmax."""
    return jnp.matmul(features, weights["kernel"], precision="highest") + weights["bias"]


class Logistic(Frozen):
    """Logistic regression on pooled features.

    Figures of each feature: "<feature>/top1", "top5", "mean_class", "loss" on the test data of the regression that is fitted anew to all
    training examples with the best strength; that strength as "c", and its "held_out_top1".

    Options:
      features: of "mean", "global" and "both", and of "mean_colour" and "raw_pixels" of the first input shown, which need no model;
        by default "mean" and, where there is a global token, "global".
      strengths: values of C to choose from, by accuracy on what is held out; of equal ones the least.
      standardize: whether each feature is scaled by its mean and deviation over the training examples.
      iterations, tolerance: L-BFGS ends after so many steps, or where no slope of the mean loss is steeper.
    """

    what = "logistic regression"

    @staticmethod
    def read_options(
        *,
        features: Sequence[str] | None = None,
        strengths: Sequence[float] = STRENGTHS,
        standardize: bool = False,
        iterations: int = 1000,
        tolerance: float = 1e-6,
    ) -> dict[str, Any]:
        """What `options` may hold."""
        check_strengths(strengths, iterations)
        return dict(
            features=features, strengths=tuple(sorted(map(float, strengths))), standardize=standardize, iterations=iterations,
            tolerance=tolerance,
        )  # fmt: skip

    def prepare(self) -> None:
        """Check the features."""
        names = self.options["features"] or (("mean", "global") if self.objective.model.num_global_tokens else ("mean",))
        check_features(self.what, self.objective, names, self.norm, ("mean", "global", "both", *BASELINES))
        shown = self.extractions["train"].inputs[0]
        if set(names) & set(BASELINES) and self.objective.model.modality(shown).kind != "continuous":
            raise ValueError(f"{self.what} of pixels needs pixels, but the first input {shown!r} has class ids: leave out {BASELINES}")
        self.options["features"] = tuple(names)
        self._count = jax.jit(lambda weights, x, y: classification.counts(scores(weights, x), y), out_shardings=replicated(self.mesh))
        parts = {"mean", "global"} if "both" in names else set()
        self.kinds = tuple(kind for kind in ("mean", "global", *BASELINES) if kind in names or kind in parts)
        self.given = tuple(f"{name}/{figure}" for name in names for figure in ("top1", "top5", "mean_class", "loss", "held_out_top1", "c"))

    def fit(
        self, train: Examples, test: Examples, fitted: Int[np.ndarray, " k"], chosen_by: Int[np.ndarray, " m"], num_classes: int,
        between: Callable[[], None],
    ) -> Figures:  # fmt: skip
        """The figures of each feature."""
        settings = num_classes, self.mesh, self.options["iterations"], self.options["tolerance"]
        everything = np.sort(np.concatenate([fitted, chosen_by]))
        for name in self.options["features"]:
            x, y = train.feature(name), np.asarray(train.labels)
            scaler = Scaler(x[fitted], self.options["standardize"])
            regression = Regression(scaler(x[fitted]), y[fitted], *settings)
            weights, best = None, (-1.0, 0.0)
            for strength in self.options["strengths"]:
                between()
                weights = regression(strength, weights)  # from the next weaker one's, which are near
                top1 = classification.summarize(self._sums(weights, scaler(x[chosen_by]), y[chosen_by]))["top1"]
                best = max(best, (top1, -strength))
            del regression  # its examples leave the devices
            scaler = Scaler(x[everything], self.options["standardize"])
            weights = Regression(scaler(x[everything]), y[everything], *settings)(-best[1])
            for figure, value in classification.summarize(self._sums(weights, scaler(test.feature(name)), np.asarray(test.labels))).items():
                yield f"{name}/{figure}", value
            yield f"{name}/held_out_top1", best[0]
            yield f"{name}/c", -best[1]

    def _sums(self, weights: Any, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> Any:
        """The sums of a regression over examples."""
        size, total = min(CHUNK, len(labels)), None
        for x, y in zip(_parts(features), np.split(labels, range(CHUNK, len(labels), CHUNK)), strict=True):
            x, y = np.pad(x, ((0, size - len(x)), (0, 0))), np.pad(y.astype(np.int32), (0, size - len(y)), constant_values=-1)
            total = added(total, local(self._count(weights, *(jax.device_put(part, replicated(self.mesh)) for part in (x, y)))))
        return total


def check_strengths(strengths: Sequence[float], iterations: int) -> None:
    """Raise ValueError unless all are above 0."""
    if not strengths or not min(strengths) > 0:
        raise ValueError(f"{WHERE}.strengths is {tuple(strengths)}; give numbers above 0")
    if iterations < 1:
        raise ValueError(f"{WHERE}.iterations is {iterations}; it must be at least 1")
