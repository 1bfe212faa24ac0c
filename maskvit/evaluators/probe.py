"""Probes: heads on frozen features, a grid of rates and decays trained together by gradient descent, the best one chosen and tested.

Protocols of this kind: Zhou et al., "iBOT", 2022 (45 rates at once), Oquab et al., "DINOv2", 2024 (13), Darcet et al., "CAPI", 2025 (30 of
each kind, chosen on a tenth of the training data). They augment the training images; here all features are taken once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from maskvit.core.configuration import check_arguments, look_up
from maskvit.evaluators.features import BLOCKS, Examples
from maskvit.evaluators.frozen import Figures, Frozen
from maskvit.evaluators.reading import local
from maskvit.heads import HEADS, check_layers, check_pooled_layers, head_options
from maskvit.losses.classes import cross_entropy
from maskvit.metrics import classification
from maskvit.metrics.accumulate import added
from maskvit.nn.layers import apply_with_statistics
from maskvit.optim import OPTIMIZERS, SCHEDULES, build_optimizer
from maskvit.sharding import batch_sharding, replicated, sample_devices

WHERE = "config.evaluators options"
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)  # DINOv2's, per 256 images
PER_IMAGES = 256
NO_DECAY = (r".*bias",)
BETWEEN = 50  # steps after which a run looks whether it is to stop


class Trained(NamedTuple):
    """Heads of one decay, stacked by rate: parameters, running statistics, optimizer state."""

    params: Any
    statistics: Any
    opt_state: Any


class Head(NamedTuple):
    """A head on the features of examples; `reads_tokens`: all of them, else pooled ones, `global_kind` the name of the global one."""

    module: Any
    reads_tokens: bool
    num_global_tokens: int
    global_kind: str = "global"

    def arguments(self, examples: Examples, index: Int[np.ndarray, " b"]) -> tuple[np.ndarray, np.ndarray]:
        """(Patch tokens "b n d", global tokens "b g d") of some examples; of pooled features one of each, their mean and the first."""
        if self.reads_tokens:
            tokens = np.asarray(examples.features["tokens"][index])
            patches = tokens.shape[1] - self.num_global_tokens
            return tokens[:, :patches], tokens[:, patches:]
        mean = np.asarray(examples.features["mean"][index])[:, None]
        kind = self.global_kind
        return mean, np.asarray(examples.features[kind][index])[:, None] if kind in examples.features else mean[:, :0]


class Probe(Frozen):
    """Heads of `maskvit.heads.HEADS` that read pooled tokens, trained on cached features.

    Figures of each head: "<head>/top1", "top5", "mean_class", "loss" on the test data; "held_out_top1", "rate" and "decay" of the chosen.

    Options:
      heads: by name blocks as `config.objective.head`: dict(name="probe", source="mean"), dict(name="attentive", pooling="capi"), ...; by
        default linear layers behind a batch normalization without scale and bias, on "mean" and, where there is one, "global". A "probe"
        may name `layers`, blocks counted from 1, whose global tokens it reads side by side. Attentive ones need all tokens of all
        examples, in memory or, with `cache`, on disk.
      optimizer: dict(name="sgd", "lars" or "adamw", ...), as `config.optimizer`.
      rates: learning rates per 256 images of a batch; `decays`: weight decays; of kernels, not of biases. The grid is their product.
      epochs, warmup_epochs: of the training examples; what does not fill the last batch of an epoch is left out.
      schedule: a row of `maskvit.optim.SCHEDULES`.
      train_batch: examples per step; all of them where there are fewer.
    """

    what = "probe"

    @staticmethod
    def read_options(
        *,
        heads: Mapping[str, Mapping[str, Any]] | None = None,
        optimizer: Mapping[str, Any] | None = None,
        rates: Sequence[float] = RATES,
        decays: Sequence[float] = (0.0,),
        epochs: int = 10,
        warmup_epochs: int = 0,
        schedule: str = "cosine",
        train_batch: int = 1024,
    ) -> dict[str, Any]:
        """What `options` may hold."""
        optimizer = {"name": "sgd", **(optimizer or {})}
        constructor = look_up(f"{WHERE}.optimizer.name", OPTIMIZERS, optimizer["name"])
        rest = {key: value for key, value in optimizer.items() if key != "name"}
        given = ("params", "fixed", "schedule", "weight_decay", "no_decay", "freeze", "layer_decay", "lr_scales", "frozen")
        check_arguments(f"{WHERE}.optimizer", constructor, rest, given)
        look_up(f"{WHERE}.schedule", SCHEDULES, schedule)
        for key, values in (("rates", rates), ("decays", decays)):
            if not values or min(values) < 0 or (key == "rates" and not min(values) > 0):
                raise ValueError(f"{WHERE}.{key} is {tuple(values)}; give numbers {'above' if key == 'rates' else 'of at least'} 0")
        if not 0 <= warmup_epochs < epochs or train_batch < 1:
            raise ValueError(
                f"{WHERE}: {epochs} epochs with {warmup_epochs} of warm-up in batches of {train_batch}; epochs must be more than those of "
                "warm-up and a batch at least 1"
            )
        return dict(
            heads=heads, optimizer=optimizer, rates=tuple(rates), decays=tuple(decays), epochs=epochs, warmup_epochs=warmup_epochs,
            schedule=schedule, train_batch=train_batch,
        )  # fmt: skip

    def prepare(self) -> None:
        """Build the heads."""
        model = self.objective.model
        default = {"mean": dict(name="probe", source="mean")}
        default |= {"global": dict(name="probe", source="global")} if model.num_global_tokens else {}
        self.options["heads"] = {name: dict(block) for name, block in (self.options["heads"] or default).items()}
        self._heads: dict[str, tuple[str, Any, str]] = {}
        for name, block in self.options["heads"].items():
            where, layers = f"{WHERE}.heads.{name}", tuple(block.get("layers", ()))
            given = {key: value for key, value in block.items() if key != "layers"}
            row, options = head_options(where, given, model.width, model.num_global_tokens)
            if HEADS[row].reads != "pooled":
                raise ValueError(f"{where}.name is {row!r}, which says something of every pixel; a probe's head gives one class")
            depth = dict(model.encoder)["depth"]
            if layers:
                check_layers(f"{where}.layers", layers, depth)
                if layers[-1] != depth:
                    raise ValueError(f"{where}.layers is {layers}; its last must be the encoder's last, {depth}")
                check_pooled_layers(f"{where}.layers", row, dict(options), layers)
            self._heads[name] = row, options, BLOCKS + "_".join(map(str, layers)) if len(layers) > 1 else "global"
        tokens = any(row == "attentive" for row, *_ in self._heads.values())
        pooled = any(row != "attentive" for row, *_ in self._heads.values())
        joined = tuple(dict.fromkeys(kind for *_, kind in self._heads.values() if kind != "global"))
        lacking = [name for x in self.extractions.values() for name in x.inputs if name in x.reading.source.may_lack]
        if tokens and lacking:
            raise ValueError(f"{WHERE}.heads reads all tokens, but some examples may lack {lacking[0]!r}: leave it out of shown")
        vectors = ("mean", *(("global",) if model.num_global_tokens else ())) if pooled else ()
        self.kinds = (*vectors, *joined, *(("tokens",) if tokens else ()))
        figures = ("top1", "top5", "mean_class", "loss", "held_out_top1", "rate", "decay")
        self.given = tuple(f"{name}/{figure}" for name in self._heads for figure in figures)

    def fit(
        self, train: Examples, test: Examples, fitted: Int[np.ndarray, " k"], chosen_by: Int[np.ndarray, " m"], num_classes: int,
        between: Callable[[], None],
    ) -> Figures:  # fmt: skip
        """The figures of each head."""
        rates, decays = self.options["rates"], self.options["decays"]
        for name, (row, options, kind) in self._heads.items():
            module = HEADS[row].module(dtype=jnp.float32, num_classes=num_classes, **dict(options))
            head = Head(module, row == "attentive", self.objective.model.num_global_tokens, kind)
            grid = self._train(head, train, fitted, between)
            correct = self._count(head, grid, train, chosen_by)
            decay, rate = np.unravel_index(int(correct.argmax()), correct.shape)
            best = jax.tree.map(lambda x, rate=rate: x[rate], (grid[decay].params, grid[decay].statistics))
            for figure, value in classification.summarize(self._test(head, best, test)).items():
                yield f"{name}/{figure}", value
            yield f"{name}/held_out_top1", 100.0 * int(correct.max()) / len(chosen_by)
            yield f"{name}/rate", rates[rate]
            yield f"{name}/decay", decays[decay]

    def _batches(self, count: int) -> tuple[int, int]:
        """(Examples per step, steps per epoch) of `count` examples."""
        size = min(self.options["train_batch"], count)
        return size, count // size

    def _train(self, head: Head, train: Examples, fitted: Int[np.ndarray, " k"], between: Callable[[], None]) -> list[Trained]:
        """The whole grid, one entry per decay."""
        from tqdm import tqdm

        size, steps = self._batches(len(fitted))
        settings: dict[str, Any] = dict(total=steps * self.options["epochs"], warmup=steps * self.options["warmup_epochs"])
        settings |= dict(steps_per_epoch=steps) if self.options["schedule"] == "cosine_per_epoch" else {}
        schedule = SCHEDULES[self.options["schedule"]](1.0, **settings)
        first = head.arguments(train, fitted[:1])
        variables = jax.eval_shape(head.module.init, jax.random.key(0), *first)
        optimizers = [self._optimizer(variables["params"], schedule, decay) for decay in self.options["decays"]]
        scaled = jnp.array(self.options["rates"]) * (size / PER_IMAGES)

        @functools.partial(jax.jit, out_shardings=replicated(self.mesh))
        def begin(inputs: Any) -> list[Trained]:
            # The same initial values for all: what differs is the setting.
            variables = head.module.init(jax.random.key(self.seed), *inputs)
            stack = lambda x: jnp.broadcast_to(x, (len(scaled), *x.shape))  # noqa: E731
            params, statistics = (jax.tree.map(stack, variables.get(name, {})) for name in ("params", "statistics"))
            # Running statistics begin as mean 0 and variance 1, as `init` leaves them.
            return [Trained(params, statistics, jax.vmap(optimizer.tx.init)(params)) for optimizer in optimizers]

        @functools.partial(jax.jit, donate_argnums=0, out_shardings=replicated(self.mesh))
        def step(grid: list[Trained], inputs: Any, labels: Int[Array, " b"], number: Int[Array, ""]) -> list[Trained]:
            one = functools.partial(_step, head.module, inputs, labels, schedule(number), number)
            return [Trained(*jax.vmap(functools.partial(one, x.tx))(*had, scaled)) for x, had in zip(optimizers, grid, strict=True)]

        grid = begin(tuple(self._placed(x) for x in first))
        numbers = range(steps * self.options["epochs"])
        for number in tqdm(numbers, desc="probe", unit="step", leave=False, disable=True if jax.process_index() else None):
            epoch, place = divmod(number, steps)
            if place == 0:
                order = np.random.default_rng((self.seed, epoch)).permutation(len(fitted))
            index = np.sort(fitted[order[place * size : (place + 1) * size]])  # sorted: files are read from front to back
            inputs = tuple(self._placed(x) for x in head.arguments(train, index))
            grid = step(grid, inputs, self._placed(np.asarray(train.labels[index])), np.int32(number))
            if number % BETWEEN == 0:
                between()
        return grid

    def _optimizer(self, params: Any, schedule: Any, decay: float) -> Any:
        settings = dict(self.options["optimizer"], weight_decay=decay)
        if settings["name"] != "lars":  # which leaves biases out by itself
            settings["no_decay"] = NO_DECAY
        return build_optimizer(params, jax.tree.map(lambda _: False, params), schedule, **settings)

    def _placed(self, array: np.ndarray) -> Array:
        """On the devices: a part each where the rows divide among them, else whole on all."""
        divides = len(array) % sample_devices(self.mesh) == 0
        return jax.device_put(array, batch_sharding(self.mesh) if divides else replicated(self.mesh))

    def _padded(self, head: Head, examples: Examples, chosen: Int[np.ndarray, " n"]) -> Iterator[tuple[Any, Array]]:
        """(Inputs, labels) of all examples in batches of one size, the last one filled with examples without a label."""
        size = min(self.options["train_batch"], len(chosen))
        for first in range(0, len(chosen), size):
            index = chosen[first : first + size]
            filled = np.pad(index, (0, size - len(index)), mode="edge")
            labels = np.where(np.arange(size) < len(index), np.asarray(examples.labels[filled]), -1).astype(np.int32)
            yield tuple(self._placed(x) for x in head.arguments(examples, filled)), self._placed(labels)

    def _count(self, head: Head, grid: list[Trained], examples: Examples, chosen: Int[np.ndarray, " n"]) -> Int[np.ndarray, "d r"]:
        """How many of the chosen examples each head of the grid gets right."""

        @functools.partial(jax.jit, out_shardings=replicated(self.mesh))
        def count(grid: list[Trained], inputs: Any, labels: Int[Array, " b"]) -> Int[Array, "d r"]:
            right = lambda params, statistics: (_logits(head.module, params, statistics, inputs).argmax(axis=-1) == labels).sum()  # noqa: E731
            return jnp.stack([jax.vmap(right)(x.params, x.statistics) for x in grid])

        total = None
        for inputs, labels in self._padded(head, examples, chosen):
            total = added(total, local(count(grid, inputs, labels)))
        return np.asarray(total)

    def _test(self, head: Head, best: Any, examples: Examples) -> Any:
        """The sums of one head over all examples."""

        @functools.partial(jax.jit, out_shardings=replicated(self.mesh))
        def sums(best: Any, inputs: Any, labels: Int[Array, " b"]) -> Any:
            params, statistics = best
            return classification.counts(_logits(head.module, params, statistics, inputs), labels)

        total = None
        for inputs, labels in self._padded(head, examples, np.arange(len(examples.labels))):
            total = added(total, local(sums(best, inputs, labels)))
        return total


def _logits(module: Any, params: Any, statistics: Any, inputs: Any) -> Float[Array, "b k"]:
    return apply_with_statistics(module, params, statistics, *inputs, train=False)[0]


def _step(
    module: Any, inputs: Any, labels: Int[Array, " b"], factor: Float[Array, ""], number: Int[Array, ""], tx: Any, params: Any,
    statistics: Any, opt_state: Any, rate: Float[Array, ""],
) -> tuple[Any, Any, Any]:  # fmt: skip
    """One head after a step of learning rate `rate` times the schedule's `factor`."""

    def loss(params: Any) -> tuple[Float[Array, ""], Any]:
        logits, changed = apply_with_statistics(module, params, statistics, *inputs, train=True)
        return cross_entropy(logits, labels)[0].mean(), changed

    grads, changed = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params, step=number)
    return jax.tree.map(lambda p, u: p + factor * rate * u, params, updates), changed, opt_state
