"""What a downstream task asks of a model and how wrong an answer is: the rows of `config.objective.task`.

A task says how many channels the head gives and which modality it is compared with. Its losses are (sum, number of labels), so that the
parts of a batch add up exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from maskvit.core.configuration import check_arguments, hashable, look_up
from maskvit.core.modalities import Modality
from maskvit.core.types import Batch
from maskvit.heads.values import Prepared
from maskvit.losses import dense
from maskvit.losses.classes import cross_entropy, soft_target_cross_entropy
from maskvit.objectives.mixing import erase, mix

WHERE = "config.objective.task"
Values = dict[str, Num[Array, "b h w *c"]]
Sums = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]

# What a regression may minimize, in model values of its target.
REGRESSION_LOSSES = {
    "l1": dense.l1,
    "berhu": dense.berhu,
    "scale_and_shift_invariant": dense.scale_and_shift_invariant,
    "silog": dense.silog,
    "angular": dense.angular,
    "cosine": dense.cosine,
}


@dataclasses.dataclass(frozen=True)
class Classification:
    """One class per image: softmax cross-entropy, perhaps of mixed images (`dict(name="classification", num_classes=...)`).

    Attributes:
      num_classes: labels are 0 ... num_classes - 1; images with another label (-1) count nowhere.
      smoothing: share of the target that is spread over all classes.
      mixup, cutmix: parameters of their Beta distributions, 0 for none; with both, each step takes one of them at random.
      erasing: probability that a random box of an image is replaced by noise.
      class_weights: one factor per class on the losses of its images; not beside mixup and cutmix.
    """

    num_classes: int
    smoothing: float | int = 0.0
    mixup: float | int = 0.0
    cutmix: float | int = 0.0
    erasing: float | int = 0.0
    class_weights: tuple[float, ...] = ()

    dense = False
    target = ""

    def __post_init__(self) -> None:
        if not 2 <= self.num_classes <= 2**20:
            raise ValueError(f"{WHERE}.num_classes is {self.num_classes}; it must be at least 2 and at most {2**20}")
        for key in ("smoothing", "erasing"):
            if not 0 <= getattr(self, key) <= (1 if key == "erasing" else 0.99):
                raise ValueError(f"{WHERE}.{key} is {getattr(self, key)}; it must be a share between 0 and 1")
        for key in ("mixup", "cutmix"):
            if not 0 <= getattr(self, key) <= 100:
                raise ValueError(f"{WHERE}.{key} is {getattr(self, key)}; it must be 0 or the parameter of a Beta distribution")
        check_class_weights(self.class_weights, self.num_classes)
        if self.class_weights and self.mixes:
            raise ValueError(f"{WHERE}.class_weights weigh whole images, but mixup or cutmix mixes their classes: use one of the two")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with one another."""
        return bool(self.mixup or self.cutmix)

    def check(self, modalities: Mapping[str, Modality], inputs: tuple[str, ...]) -> None:
        """Raise ValueError where images are to be mixed or erased that have class ids."""
        wrong = [name for name in inputs if modalities[name].kind == "categorical"]
        if wrong and (self.mixes or self.erasing):
            raise ValueError(f"{WHERE} mixes or erases pixels, but the input {wrong[0]!r} has class ids: set mixup, cutmix, erasing to 0")

    def channels(self, modalities: Mapping[str, Modality]) -> int:
        """What the head gives per image."""
        return self.num_classes

    def counts(self, batch: Batch, prepared: Prepared) -> dict[str, Float[Array, ""]]:
        """What each loss is a mean over: the labeled images, by weight."""
        nothing = jnp.zeros((batch.size, self.num_classes))
        return {name: count for name, (_, count) in self.losses(nothing, nothing if self.mixes else None, batch, prepared).items()}

    def augment(
        self, key: Key[Array, ""], keys: Key[Array, " b"], values: Values, batch: Batch
    ) -> tuple[Values, Float[Array, "b k"] | None]:
        """Model values of the inputs, mixed and erased, and the mixed targets; None where nothing is mixed.

        `key`: of this part of the batch, whose images are mixed with one another; `keys`: the samples'.
        """
        if self.erasing:
            values = {name: erase(keys, value, float(self.erasing)) for name, value in values.items()}
        if not self.mixes:
            return values, None
        settings = dict(mixup=float(self.mixup), cutmix=float(self.cutmix), smoothing=float(self.smoothing))
        mixed, targets = {}, None
        for name, value in values.items():  # one key: every modality of an image is mixed alike
            mixed[name], targets = mix(key, value, batch.label, num_classes=self.num_classes, **settings)
        return mixed, targets

    def losses(self, output: Float[Array, "b k"], targets: Float[Array, "b k"] | None, batch: Batch, prepared: Prepared) -> Sums:
        """Cross-entropy of the images that have a label."""
        if targets is not None:
            losses, weights = soft_target_cross_entropy(output, targets, batch.label >= 0)
        else:
            losses, weights = cross_entropy(output, batch.label, float(self.smoothing), self.class_weights or None)
        return {"loss/classification": (losses.sum(), weights.sum())}

    def answers(self, output: Float[Array, "b k"], modalities: Mapping[str, Modality]) -> dict[str, Float[Array, "b k"]]:
        """What the model says of its images: class scores before the softmax."""
        return {"logits": output}


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """A class for every pixel of a categorical modality (`dict(name="segmentation", target="semseg")`).

    Attributes:
      target: the modality; pixels without a label count nowhere.
      class_weights: one factor per class on the losses of its pixels.
      auxiliary: factor on the loss of the head's second output, where it has one.
    """

    target: str
    class_weights: tuple[float, ...] = ()
    auxiliary: float | int = 0.4

    dense = True

    def check(self, modalities: Mapping[str, Modality], inputs: tuple[str, ...]) -> None:
        """Raise ValueError unless the target is a categorical modality that is not an input."""
        check_target(self.target, "categorical", modalities, inputs)
        check_class_weights(self.class_weights, modalities[self.target].num_classes)

    def channels(self, modalities: Mapping[str, Modality]) -> int:
        """What the head gives per pixel."""
        return modalities[self.target].num_classes

    def counts(self, batch: Batch, prepared: Prepared) -> dict[str, Float[Array, ""]]:
        """What each loss is a mean over: the labeled pixels, by weight."""
        ids = prepared.values[self.target]
        weights = jnp.where(ids >= 0, jnp.array(self.class_weights)[jnp.maximum(ids, 0)] if self.class_weights else 1.0, 0.0)
        return {name: weights.sum() for name in self._names}

    @property
    def _names(self) -> tuple[str, str]:
        """Of the losses of both outputs that a head may have."""
        return f"loss/{self.target}", f"loss/{self.target}_auxiliary"

    def augment(self, key: Key[Array, ""], keys: Key[Array, " b"], values: Values, batch: Batch) -> tuple[Values, None]:
        """The values as they are: what moves pixels must move their labels, which is the loader's work."""
        return values, None

    def losses(self, output: Any, targets: None, batch: Batch, prepared: Prepared) -> Sums:
        """Cross-entropy of the pixels that have a label; `output` may be (logits, auxiliary logits)."""
        sums = {}
        outputs = output if isinstance(output, tuple) else (output,)
        for name, logits, factor in zip(self._names, outputs, (1.0, float(self.auxiliary)), strict=False):
            losses, weights = dense.pixel_cross_entropy(logits, prepared.values[self.target], class_weights=self.class_weights or None)
            sums[name] = factor * losses.sum(), weights.sum()
        return sums

    def answers(self, output: Float[Array, "b h w k"], modalities: Mapping[str, Modality]) -> dict[str, Float[Array, "b h w k"]]:
        """What the model says of every pixel: class scores before the softmax."""
        return {"logits": output}


@dataclasses.dataclass(frozen=True)
class Regression:
    """Numbers for every pixel of a continuous modality: depth, normals, Taskonomy's maps (`dict(name="regression", target="depth")`).

    Attributes:
      target: the modality; the loss is taken in its model values, over the pixels that have a measurement.
      loss: a row of `REGRESSION_LOSSES`.
    """

    target: str
    loss: str = "l1"

    dense = True

    def __post_init__(self) -> None:
        look_up(f"{WHERE}.loss", REGRESSION_LOSSES, self.loss)

    def check(self, modalities: Mapping[str, Modality], inputs: tuple[str, ...]) -> None:
        """Raise ValueError unless the target is a continuous modality that is not an input, of a form that the loss is defined for."""
        check_target(self.target, "continuous", modalities, inputs)
        spec = modalities[self.target]
        least = {"angular": 3, "cosine": 3, "silog": 1, "scale_and_shift_invariant": 1}.get(self.loss, spec.channels)
        if spec.channels != least:
            raise ValueError(f"{WHERE}.loss {self.loss!r} is of {least} channel(s); config.modalities.{self.target} has {spec.channels}")
        if self.loss == "silog" and any(spec.mean):
            raise ValueError(f"{WHERE}.loss 'silog' takes logarithms: config.modalities.{self.target}.mean must be 0, not {spec.mean}")

    def channels(self, modalities: Mapping[str, Modality]) -> int:
        """What the head gives per pixel."""
        return modalities[self.target].channels

    def counts(self, batch: Batch, prepared: Prepared) -> dict[str, Float[Array, ""]]:
        """What the loss is a mean over: the measured values, or the images that have some."""
        nothing = jnp.zeros_like(prepared.values[self.target])
        return {name: count for name, (_, count) in self.losses(nothing, None, batch, prepared).items()}

    def augment(self, key: Key[Array, ""], keys: Key[Array, " b"], values: Values, batch: Batch) -> tuple[Values, None]:
        """The values as they are: what moves pixels must move their targets, which is the loader's work."""
        return values, None

    def losses(self, output: Float[Array, "b h w c"], targets: None, batch: Batch, prepared: Prepared) -> Sums:
        """The loss over the measured pixels."""
        valid = prepared.valid.get(self.target)
        target = prepared.values[self.target]
        losses, counts = REGRESSION_LOSSES[self.loss](output, target, None if valid is None else valid[..., 0])
        return {f"loss/{self.target}": (losses.sum(), counts.sum())}

    def answers(self, output: Float[Array, "b h w c"], modalities: Mapping[str, Modality]) -> dict[str, Float[Array, "b h w c"]]:
        """What the model says of every pixel, in stored units."""
        spec = modalities[self.target]
        return {"values": (output * jnp.array(spec.std) + jnp.array(spec.mean)) / spec.scale}


TASKS: dict[str, Any] = {"classification": Classification, "segmentation": Segmentation, "regression": Regression}


def build_task(block: Mapping[str, Any], modalities: Mapping[str, Modality], inputs: tuple[str, ...]) -> Any:
    """`config.objective.task` to a row of `TASKS`, checked against the modalities. Every mistake is a ValueError that names the key."""
    given = {key: hashable(value) for key, value in block.items()}
    constructor = look_up(f"{WHERE}.name", TASKS, given.pop("name", None))
    check_arguments(WHERE, constructor, given)
    task = constructor(**given)
    task.check(modalities, inputs)
    return task


def check_target(target: str, kind: str, modalities: Mapping[str, Modality], inputs: tuple[str, ...]) -> None:
    """Raise ValueError unless a declared modality of `kind`, that the model is not shown, can be predicted."""
    if target not in modalities:
        raise ValueError(f"{WHERE}.target is {target!r}; declared in config.modalities: {', '.join(modalities)}")
    spec = modalities[target]
    if spec.kind != kind:
        raise ValueError(f"{WHERE}.target {target!r} is {spec.kind}; this task predicts a {kind} modality")
    if target in inputs:
        raise ValueError(f"{WHERE}.target {target!r} is also one of config.objective.inputs: the model would be shown what it must predict")
    if spec.kind == "continuous" and spec.standardize:
        raise ValueError(
            f"config.modalities.{target}.standardize is True, but each picture's own mean and deviation are lost then: set it to False, "
            "and mean and std to those of the data"
        )


def check_class_weights(weights: tuple[float, ...], num_classes: int) -> None:
    """Raise ValueError unless there is one positive number per class, or none at all."""
    if weights and (len(weights) != num_classes or min(weights) <= 0):
        raise ValueError(f"{WHERE}.class_weights is {weights}; give a number above 0 for each of the {num_classes} classes")
