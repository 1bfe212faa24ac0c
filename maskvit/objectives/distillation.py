"""DINO and iBOT: a student learns what its own moving average, the teacher, says of other views; AttMask hides by its attention.

Sources: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO), 2021; Zhou et al., "iBOT: Image BERT
Pre-Training with Online Tokenizer", 2022; Kakogeorgiou et al., "What to Hide from Your Students: Attention-Guided Masked Image
Modeling" (AttMask), 2022.

A batch holds two global views (b, 2, H, W, c) and, where the loader cuts them, local ones (b, l, h, w, c). Views of one sample lie side
by side, so that a device keeps its own samples' views together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from maskvit.core.flops import embed_flops, encoder_flops, projection_flops
from maskvit.core.keys import stream_keys
from maskvit.core.types import Batch, DataNeeds, Guidance, Metrics, Params, TokenLayout
from maskvit.guidance.stored import BlockMask, maps_to_tokens
from maskvit.heads.network import Network
from maskvit.heads.prototypes import redraw
from maskvit.heads.values import Prepared, ReadsFeatures, prepare
from maskvit.losses.distillation import across_views, at_masked_tokens, distillation_targets
from maskvit.losses.weights import cosine_between
from maskvit.masking.scores import SCORES, hint_reveals
from maskvit.nn.encoder import drop_path
from maskvit.objectives.options import Duration, ToSteps, resolved
from maskvit.optim.transforms import guarded

GLOBAL_VIEWS = 2
STUDENT_TEMPERATURE = 0.1

# A collapsed teacher says the same of every image: all prototypes alike, one prototype at a time (the center, which lags behind,
# then hands the role on, and the loss looks splendid), or features without spread. The untrained network looks like that too, so
# the alarm waits for a tenth of the run.
UNIFORM, SAME, NO_SPREAD = 0.999, 0.01, 0.01
QUIET_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Masking:
    """How much of the student's large views is hidden (`config.objective.masking`).

    Attributes:
      ratio, ratio_var: the share of tokens hidden is uniform in ratio -+ ratio_var. Sequences hold alternatives, one of which
        is taken at random (iBOT: ratios 0 and 0.3, variations 0 and 0.2).
      probability: of a view to be masked at all.
      per: "step" draws one share for every view of a step (AttMask), "view" one for each (iBOT).
    """

    ratio: float | int | tuple[float, ...] = 0.3
    ratio_var: float | int | tuple[float, ...] = 0.2
    probability: float | int = 0.5
    per: str = "step"

    def __post_init__(self) -> None:
        where = "config.objective.masking"
        if self.per not in ("step", "view"):
            raise ValueError(f"{where}.per is {self.per!r}; known: step, view")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"{where}.probability is {self.probability}; it must be between 0 and 1")
        ratios, variations = self.ranges
        if not ratios or len(ratios) != len(variations):
            raise ValueError(f"{where}.ratio has {len(ratios)} values and ratio_var {len(variations)}: give as many of each, at least one")
        for ratio, variation in zip(ratios, variations, strict=True):
            if not 0 <= ratio - variation <= ratio + variation <= 1:
                raise ValueError(f"{where}: ratio {ratio} -+ ratio_var {variation} must be in 0 ... 1")

    @property
    def ranges(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Ratios and variations, alternative by alternative."""
        as_tuple = lambda value: value if isinstance(value, tuple) else (value,)  # noqa: E731
        return as_tuple(self.ratio), as_tuple(self.ratio_var)

    def draw(self, keys: Key[Array, " r"], shared_key: Key[Array, ""], name: str) -> Float[Array, " r"]:
        """The share of every view; `name` tells independent draws apart.

        `shared_key` is the step's: micro-batches of one step must draw the same where `per` is "step".
        """
        ratios, variations = (jnp.array(values, jnp.float32) for values in self.ranges)

        def one(key: Key[Array, ""]) -> Float[Array, ""]:
            which, where = jax.random.split(key)
            i = jax.random.randint(which, (), 0, len(ratios))
            return ratios[i] + variations[i] * jax.random.uniform(where, minval=-1.0, maxval=1.0)

        if self.per == "view":
            return jax.vmap(one)(stream_keys(keys, name))
        return jnp.broadcast_to(one(stream_keys(shared_key, name)), keys.shape)


class Views(NamedTuple):
    """What the teacher makes of views: encoded tokens "r e d" (global token last) and the attention its class token pays, "r n"."""

    encoded: Float[Array, "r e d"]
    attention: Guidance


@dataclasses.dataclass(frozen=True)
class Distillation(ReadsFeatures):
    """The objective. Hashable and without arrays.

    Attributes:
      model: the network; student and teacher are two trees of its parameters.
      masking: how much is hidden; None: nothing is, and there is no loss on patches (DINO).
      scores: (function, its keyword arguments): what is hidden first. Guided ones read the teacher's attention.
      guidance: the exact block masks of the loader, which then take the place of masking and scores.
      teacher_momentum: share of the teacher that stays at the first step; it rises to 1 on half a cosine.
      momentum_over: duration of that way. A run that may stop early and go on needs it in epochs or steps.
      center_momentum: share of a center that stays at a step; 0: it is the mean over the batch before. Beside a fast teacher a slow
        center lags behind, and every image is told the same, one prototype after the other.
      teacher_temperature, patch_temperature: of the targets, from the first to the second value.
      temperature_warmup: duration of that way, which is gone in whole epochs.
      drop_path: share of the last block's branches that the student leaves out (stochastic depth).
      steps_per_epoch: set by `resolve`.

    State: "teacher" (parameters without `mask_embed`), "center" (k,) and "patch_center" (k,), running means of its logits.
    """

    model: Network
    masking: Masking | None = None
    scores: tuple[Any, tuple[tuple[str, Any], ...]] = (SCORES["random"], ())
    guidance: BlockMask | None = None
    teacher_momentum: float = 0.996
    momentum_over: Duration = "100 percent"
    center_momentum: float = 0.9
    teacher_temperature: tuple[float, float] = (0.04, 0.04)
    patch_temperature: tuple[float, float] = (0.04, 0.07)
    temperature_warmup: Duration = 0
    drop_path: float = 0.1
    steps_per_epoch: int = 1

    differences = None  # a run begins from the same model, but for what `config.init_from` names

    @property
    def num_visible(self) -> int:
        """Tokens of a view that the encoder sees: all, hidden ones as the mask embedding."""
        return self.model.layout.num_tokens

    @property
    def masks(self) -> bool:
        """Whether the student's views are masked and their hidden patches predicted."""
        return self.masking is not None or self.guidance is not None

    # What training asks

    @property
    def needs(self) -> DataNeeds:
        """Several views of a record, and the loader's block masks where those take the place of masking."""
        return DataNeeds(views=True, blocks=None if self.guidance is None else self.guidance.needs.blocks)

    def check(self) -> None:
        """There is always something to train for."""

    def flops(self, views: Any) -> float:
        """The arithmetic of one step per image: the student three times (it has a backward pass), the teacher once; `views` as loaded."""
        model, tokens, local = self.model, self.model.layout.num_tokens, views.local_image_size
        small = sum(math.prod(model.modality(name).grid(local)) for name in model.inputs)
        large = embed_flops(model) + encoder_flops(model, tokens) + projection_flops(model, 1 + tokens * self.masks)
        cropped = embed_flops(model) * small / tokens + encoder_flops(model, small) + projection_flops(model, 1)
        return GLOBAL_VIEWS * 4 * large + views.local_crops * 3 * cropped

    # The protocol

    def init(self, key: Key[Array, ""], num_records: int = 1) -> tuple[Params, Any]:
        """Fresh parameters and the state that goes with them."""
        params = redraw(self.model.init(key), jax.random.fold_in(key, 3))
        return params, self.init_state(params, num_records)

    def init_state(self, params: Params, num_records: int = 1) -> dict[str, Any]:
        """The teacher starts as the student, in arrays of its own: the student's are given away at the first step."""
        state: dict[str, Any] = {"teacher": jax.tree.map(jnp.array, teacher_params(params))}
        sizes = dict(self.model.projection)
        state["center"] = jnp.zeros(sizes["num_prototypes"])
        if self.masks:
            state["patch_center"] = jnp.zeros(sizes.get("num_patch_prototypes", 0) or sizes["num_prototypes"])
        return state

    def resolve(self, to_steps: ToSteps) -> Distillation:
        """The objective with every duration in steps."""
        return dataclasses.replace(
            self,
            temperature_warmup=to_steps(self.temperature_warmup) if self.temperature_warmup else 0,
            steps_per_epoch=max(1, to_steps("1 epochs")),
            momentum_over=max(1, to_steps(self.momentum_over)),
        )

    def plan(
        self, params: Params, batch: Batch, keys: Key[Array, " b"], state: Any = None, step: Int[Array, ""] | int = 0
    ) -> tuple[tuple[()], dict[str, Float[Array, ""]]]:
        """Nothing is decided beforehand: masks come out of the teacher's one pass, in `loss`. Every image counts in every loss."""
        images = jnp.float32(keys.shape[0])
        return (), {name: images for name in (("global", "patch") if self.masks else ("global",))}

    def loss(
        self,
        params: Params,
        state: Any,
        batch: Batch,
        keys: Key[Array, " b"],
        step: Int[Array, ""],
        plan: Any = None,
        counts: Mapping[str, Float[Array, ""]] | None = None,
        shared_key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], tuple[dict[str, Array], Metrics]]:
        """Mean over images of the losses between views and on masked patches; observed: the teacher's mean logits per image.

        `counts` (from `plan`): images of the whole batch where it is processed in micro-batches; `shared_key`: the step's key
        (`maskvit.core.keys.step_key`), for what all of them draw alike. Without it the batch is the whole one.
        """
        model, b = self.model, keys.shape[0]
        counts = self.plan(params, batch, keys)[1] if counts is None else counts
        large = prepare(model, views_of(batch, "global"))
        n = model.layout.num_tokens
        view_keys = split_views(keys, "global views", GLOBAL_VIEWS)

        # The teacher first: targets and masks come out of this one pass.
        teacher = jax.lax.stop_gradient(self.teacher_pass(state["teacher"], large))
        teacher_logits = jax.lax.stop_gradient(model.project(state["teacher"], teacher.encoded[:, n]))
        masked = self.choose_masked(teacher.attention, view_keys, keys[0] if shared_key is None else shared_key, batch, large.present)

        encoded = self._student(params, large, view_keys, masked)
        student_logits = [self.by_image(model.project(params, encoded[:, n]), b)]
        if "local" in batch.views:
            small = prepare(model, views_of(batch, "local"))
            rows = next(iter(small.values.values())).shape[0]
            crops = self._student(params, small, split_views(keys, "local views", rows // b))
            student_logits.append(self.by_image(model.project(params, crops[:, -model.num_global_tokens]), b))
        targets = distillation_targets(teacher_logits, state["center"], self.temperature(self.teacher_temperature, step))
        losses = {"global": across_views(self.by_image(targets, b), jnp.concatenate(student_logits, axis=1), STUDENT_TEMPERATURE)}
        observed = {"center": self.by_image(teacher_logits, b).mean(axis=1)}

        if masked is not None:
            teacher_patch_logits = jax.lax.stop_gradient(model.project(state["teacher"], teacher.encoded[:, :n], patches=True))
            student_patch_logits = model.project(params, encoded[:, :n], patches=True)
            patch_targets = distillation_targets(
                teacher_patch_logits, state["patch_center"], self.temperature(self.patch_temperature, step)
            )
            per_view = at_masked_tokens(patch_targets, student_patch_logits, masked, STUDENT_TEMPERATURE)
            losses["patch"] = per_view.reshape(b, GLOBAL_VIEWS).mean(axis=1)
            observed["patch_center"] = teacher_patch_logits.mean(axis=1).reshape(b, GLOBAL_VIEWS, -1).mean(axis=1)

        total = jnp.zeros(())
        metrics: Metrics = {}
        for name, values in losses.items():
            total += values.sum() / counts[name]
            metrics[f"loss/{name}"] = values.sum(), jnp.float32(b)
        if masked is not None:
            metrics["masked_share"] = masked.mean(axis=1, dtype=jnp.float32).sum(), jnp.float32(masked.shape[0])
        return total, (observed, metrics | collapse_sums(targets, teacher.encoded[:, n]))

    def after_update(
        self, state: Any, params: Params, batch: Batch, keys: Key[Array, " b"], step: Int[Array, ""], observed: Any, metrics: Metrics,
        accepted: Bool[Array, ""] | bool = True,
    ) -> Any:  # fmt: skip
        """The teacher moves towards the updated student, the centers towards the whole batch's mean logits, in an accepted step."""
        # What is left to 1 and not the momentum itself, which float32 rounds to 1 long before the end.
        moves = cosine_between(1 - self.teacher_momentum, 0.0, step / resolved(self.momentum_over))
        new = dict(state, teacher=jax.tree.map(lambda old, x: old + moves * (x - old), state["teacher"], teacher_params(params)))
        for name, rows in observed.items():
            new[name] = self.center_momentum * state[name] + (1 - self.center_momentum) * rows.mean(axis=0)
        return guarded(accepted, new, state)

    def encoder_params(self, params: Params, state: Any) -> Params:
        """The teacher's. Without a state `params` are the teacher's already, as they are where a checkpoint is opened for use."""
        return state["teacher"] if state else params

    def visualize(
        self, params: Params, state: Any, batch: Batch, keys: Key[Array, " b"], plan: Any = None, step: Int[Array, ""] | int = 0
    ) -> dict[str, dict[str, Array]]:
        """For pictures: "inputs", the "guidance" (the teacher's attention) and what would be "masked"; nothing is rebuilt."""
        prepared = prepare(self.model, batch)
        attention = self.teacher_pass(state["teacher"], prepared).attention
        masked = self.choose_masked(attention, keys, keys[0], batch, prepared.present)
        masked = jnp.zeros(attention.shape, bool) if masked is None else masked
        layout = self.model.layout_of(prepared.values_of(self.model.inputs))
        on_grid = lambda flat: {  # noqa: E731
            name: flat[:, layout.span(name)].reshape(-1, *grid) for name, grid in zip(layout.names, layout.grids, strict=True)
        }
        return {
            "inputs": {spec.name: batch.values[spec.name] for spec in self.model.modalities},
            "masked": on_grid(masked),
            "guidance": on_grid(attention),
            "reconstructions": {},
        }

    # Parts

    def temperature(self, ends: tuple[float, float], step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The temperature of a step's epoch: evenly spaced over the epochs of the warm-up, the last value from its last epoch on."""
        epochs = int(resolved(self.temperature_warmup)) // self.steps_per_epoch
        progress = jnp.minimum(jnp.asarray(step) // self.steps_per_epoch / (epochs - 1), 1.0) if epochs > 1 else jnp.ones(())
        return ends[0] + (ends[1] - ends[0]) * progress

    def teacher_pass(self, teacher: Params, prepared: Prepared) -> Views:
        """The teacher's pass over whole views."""
        tokens = self.model.embed(teacher, prepared.values_of(self.model.inputs), prepared.present)
        n = tokens.layout.num_tokens
        encoded, weights = self.model.encode_with_attention(teacher, tokens.tokens, slice(n, n + 1), tokens.present)
        return Views(encoded, weights.mean(axis=1)[:, 0, :n])

    def choose_masked(
        self, attention: Guidance, keys: Key[Array, " r"], shared_key: Key[Array, ""], batch: Batch, present: Bool[Array, "r n"] | None
    ) -> Bool[Array, "r n"] | None:
        """What the student does not see of each view: True = hidden; None where nothing is ever hidden."""
        layout = self.model.layout
        if self.guidance is not None:
            blocks = batch.maps
            masked = maps_to_tokens(blocks.reshape(-1, 1, *blocks.shape[2:]), layout) > 0.5
            return masked if present is None else masked & present
        if self.masking is None:
            return None
        return choose_hidden(self.masking, self.scores, attention, keys, shared_key, layout, present)

    def _student(
        self, params: Params, prepared: Prepared, keys: Key[Array, " r"], masked: Bool[Array, "r n"] | None = None
    ) -> Float[Array, "r e d"]:
        tokens = self.model.embed(params, prepared.values_of(self.model.inputs), prepared.present, masked)
        branches = None
        if self.drop_path:
            branches = drop_path(stream_keys(keys, "drop path"), dict(self.model.encoder)["depth"], self.drop_path)
        return self.model.encode(params, tokens.tokens, tokens.present, branches)

    @staticmethod
    def by_image(rows: Float[Array, "r k"], images: int) -> Float[Array, "b v k"]:
        """Rows of views back to their images."""
        return rows.reshape(images, -1, rows.shape[-1])

    def recall(self, state: Any, index: Int[Array, " b"] | None) -> tuple[Any, Any]:
        """Nothing is kept per record."""
        return state, None

    def summarize(self, metrics: Metrics, step: Int[Array, ""]) -> Metrics:
        """`collapse_sums` of the whole batch to signs of collapse and alarms; the other metrics as they are.

        `teacher_entropy` is the mean entropy of a view's targets; `teacher_information` is what the entropy of the views' mean target
        has on top of it, the mutual information of view and prototype: 0 where every view is told the same, however sharply. Both are
        shares of ln k, and the second grows with the views compared, to at most the logarithm of their number.
        The spread is the deviation over views of the features, each of length 1, times sqrt(d): near 1 where they point anywhere,
        0 where they are one.
        """
        entropy, targets, features, squares = (metrics[name][0] / metrics[name][1] for name in COLLAPSE_SUMS)
        most = jnp.log(targets.shape[-1])
        share, information = entropy / most, (shannon_entropy(targets) - entropy) / most
        spread = jnp.sqrt(jnp.maximum(squares - features**2, 0.0)).mean() * jnp.sqrt(features.shape[-1])
        late = step >= QUIET_SHARE * resolved(self.momentum_over)
        several = metrics["collapse/targets"][1] > GLOBAL_VIEWS  # views of one image should be told the same
        alarms = {
            "uniform_teacher": share > UNIFORM,
            "constant_features": spread < NO_SPREAD,
            "same_targets": several & (information < SAME),
        }
        values = {"teacher_entropy": share, "teacher_information": information, "feature_spread": spread}
        values |= {f"alarm/{name}": (late & sign).astype(jnp.float32) for name, sign in alarms.items()}
        others = {name: value for name, value in metrics.items() if name not in COLLAPSE_SUMS}
        return others | {name: (value, jnp.ones(())) for name, value in values.items()}


COLLAPSE_SUMS = ("collapse/entropy", "collapse/targets", "collapse/features", "collapse/squares")


def collapse_sums(targets: Float[Array, "r k"], features: Float[Array, "r d"]) -> Metrics:
    """Sums over views, and their number: of the targets' entropy and the targets, of the teacher's features at length 1 and their squares.

    Out of the sums of all micro-batches and devices `Distillation.summarize` makes what holds for the whole batch.
    """
    targets, features = jax.lax.stop_gradient((targets, features.astype(jnp.float32)))
    features /= jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    rows = (shannon_entropy(targets), targets, features, features**2)
    return {name: (x.sum(axis=0), jnp.float32(x.shape[0])) for name, x in zip(COLLAPSE_SUMS, rows, strict=True)}


def shannon_entropy(probabilities: Float[Array, "*r k"]) -> Float[Array, "*r"]:
    """Shannon entropy in nats; a probability of 0 adds nothing."""
    return -jnp.where(probabilities > 0, probabilities * jnp.log(jnp.where(probabilities > 0, probabilities, 1.0)), 0.0).sum(axis=-1)


def teacher_params(params: Params) -> Params:
    """What of the student's parameters its teacher has: all but the mask embedding."""
    inputs = {name: {k: v for k, v in block.items() if k != "mask_embed"} for name, block in params["inputs"].items()}
    return {**params, "inputs": inputs}


def views_of(batch: Batch, kind: str) -> Batch:
    """The views of one kind ("global", "local") as samples of their own, those of an image side by side."""
    if kind not in batch.views:
        raise ValueError(f"the batch holds no {kind} views: set config.data.augment.views")
    views = batch.views[kind]
    count = next(iter(views.values())).shape[1]
    present = None if batch.present is None else jnp.repeat(batch.present, count, axis=0)
    return Batch({name: value.reshape(-1, *value.shape[2:]) for name, value in views.items()}, present)


def split_views(keys: Key[Array, " b"], name: str, views: int) -> Key[Array, " r"]:
    """A key for every view."""
    return jax.vmap(lambda key: jax.random.split(key, views))(stream_keys(keys, name)).reshape(-1)


def choose_hidden(
    masking: Masking,
    scores: tuple[Any, tuple[tuple[str, Any], ...]],
    attention: Guidance,
    keys: Key[Array, " r"],
    shared_key: Key[Array, ""],
    layout: TokenLayout,
    present: Bool[Array, "r n"] | None = None,
) -> Bool[Array, "r n"]:
    """The floor(ratio * n) tokens of each view with the highest scores, in the views that are masked at all.

    Hints (`attention_hint`) are taken out of what `attention_high` hides, as many as a second draw of the ratio says; the
    published code draws both once for all views of a step.
    """
    function, arguments = scores
    options = dict(arguments)
    hints = function is SCORES["attention_hint"]
    score_keys = stream_keys(keys, "scores")
    if hints:
        order = attention
    else:
        order = function(score_keys, layout, attention, present, **options)
    exists = jnp.ones(order.shape, bool) if present is None else present
    # 1e-5: a rounding error is not a token.
    count = jnp.floor(exists.sum(axis=1) * masking.draw(keys, shared_key, "ratio") + 1e-5)
    rank = jnp.argsort(jnp.argsort(jnp.where(exists, -order, jnp.inf), axis=1), axis=1)
    masked = rank < count[:, None]
    if hints:
        masked &= ~hint_reveals(score_keys, layout, attention, present, amounts=masking.draw(keys, shared_key, "hint ratio"), **options)
    kept = jax.vmap(jax.random.uniform)(stream_keys(keys, "masked at all")) < masking.probability
    return masked & kept[:, None]
