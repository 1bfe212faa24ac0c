"""MultiMAE: hide most tokens of all modalities, rebuild every modality; what to hide is a line of config.

Source: Bachmann et al., "MultiMAE: Multi-modal Multi-task Masked Autoencoders", 2022, and the attention-guided masking
that continues it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

from maskvit.core.configuration import check_arguments, hashable, named_function
from maskvit.core.keys import stream_keys
from maskvit.core.modalities import Modality
from maskvit.core.patches import patchify, unpatchify
from maskvit.core.types import Batch, Guidance, MaskPlan, Metrics, Params, Queries, TokenBatch, TokenLayout
from maskvit.guidance import GUIDANCE, Request, Source, build_source
from maskvit.guidance.errors import predict_errors
from maskvit.heads import decoder_arguments
from maskvit.heads.network import Network
from maskvit.losses.pixels import PIXEL_LOSSES, masked_mean, normalize_patches
from maskvit.losses.ranking import ranking_loss
from maskvit.losses.weights import cosine_between, guidance_weights
from maskvit.masking.budgets import BUDGETS
from maskvit.masking.plan import drop, gather_tokens, mix_with_random, predicted_mask
from maskvit.masking.scores import GUIDED_SCORES, SCORES, random_scores
from maskvit.nn.backbone import encoder_sizes
from maskvit.objectives.values import Prepared, check_targets, prepare

Duration = str | int | float
ToSteps = Callable[[Duration], int]


def resolved(duration: Duration) -> int | float:
    """A duration that `resolve` has turned into steps. Raises TypeError for one that is still words."""
    if isinstance(duration, str):
        raise TypeError(f"the duration {duration!r} is not in steps yet: call the objective's `resolve` first")
    return duration


@dataclasses.dataclass(frozen=True)
class GuidedShare:
    """Which share of the hidden tokens the scores choose; the rest is hidden at random (`config.objective.guided_share`).

    Attributes:
      share: (first, last), each in [0, 1].
      start: duration before which all are random.
      ramp: duration of the linear way from first to last after `start`; 0 is a step.
    """

    share: tuple[float, float] = (1.0, 1.0)
    start: Duration = 0
    ramp: Duration = 0

    def __post_init__(self) -> None:
        if len(self.share) != 2 or not all(0 <= value <= 1 for value in self.share):
            raise ValueError(f"config.objective.guided_share.share is {self.share}; give (first, last), both between 0 and 1")

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """The share at a step; durations must be in steps (`resolve`)."""
        first, last = self.share
        start, ramp = resolved(self.start), resolved(self.ramp)
        progress = (step - start + 1e-6) / max(ramp, 1e-6)
        return jnp.where(step < start, 0.0, first + (last - first) * jnp.clip(progress, 0.0, 1.0))

    def resolve(self, to_steps: ToSteps) -> GuidedShare:
        """Durations in steps."""
        return dataclasses.replace(self, start=to_steps(self.start) if self.start else 0, ramp=to_steps(self.ramp) if self.ramp else 0)


@dataclasses.dataclass(frozen=True)
class LossWeight:
    """Guidance as weight of a token's loss, gamma * exp(g / tau) with g in [0, 1] per image and modality (`config.objective.loss_weight`).

    Attributes:
      tau: temperature; a pair goes from the first to the second on half a cosine over the run.
      gamma: factor on all weights.
      over: duration of the way between two temperatures.
    """

    tau: float | int | tuple[float, float] = 0.75
    gamma: float | int = 1.0
    over: Duration = "100 percent"

    def __post_init__(self) -> None:
        taus = self.tau if isinstance(self.tau, tuple) else (self.tau,)
        if len(taus) > 2 or min(taus) <= 0.05:
            raise ValueError(
                f"config.objective.loss_weight.tau is {self.tau}; give one or two numbers above 0.05 (weights reach exp(1 / tau))"
            )
        if self.gamma <= 0:
            raise ValueError(f"config.objective.loss_weight.gamma is {self.gamma}; it must be positive")

    def at(self, step: Int[Array, ""]) -> float | Float[Array, ""]:
        """The temperature at a step; durations must be in steps (`resolve`)."""
        if not isinstance(self.tau, tuple):
            return float(self.tau)
        return cosine_between(*self.tau, step / resolved(self.over))

    def resolve(self, to_steps: ToSteps) -> LossWeight:
        """Durations in steps."""
        return dataclasses.replace(self, over=max(1, to_steps(self.over))) if isinstance(self.tau, tuple) else self


@dataclasses.dataclass(frozen=True)
class Predicted:
    """Which hidden tokens are rebuilt (`config.objective.predicted`); the others are thrown away.

    Attributes:
      share: of each modality's hidden tokens.
      by: "scores" rebuilds those with the highest scores (AMT throws the less attended away), "random" any (CrossMAE).
    """

    share: float | int = 1.0
    by: str = "scores"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"config.objective.predicted.share is {self.share}; it must be above 0 and at most 1")
        if self.by not in ("scores", "random"):
            raise ValueError(f"config.objective.predicted.by is {self.by!r}; known: scores, random")


@dataclasses.dataclass(frozen=True)
class MultiMae:
    """The objective. Hashable and without arrays: parameters and state belong to the caller.

    Attributes:
      model: the network.
      num_visible: tokens shown per sample, all modalities together.
      scores, budget: (function, its keyword arguments).
      guidance: where importance comes from; None where neither scores nor loss weights need it.
      guided_share, loss_weight, predicted: None where not used.

    State, a dict that holds only what is kept: "guidance" (the source's memory), "averages" (loss per input, for the
    adaptive budget).
    """

    model: Network
    num_visible: int
    scores: tuple[Any, tuple[tuple[str, Any], ...]]
    budget: tuple[Any, tuple[tuple[str, Any], ...]]
    guidance: Source | None = None
    guided_share: GuidedShare | None = None
    loss_weight: LossWeight | None = None
    predicted: Predicted | None = None

    def init(self, key: Key[Array, ""], num_records: int = 1) -> tuple[Params, Any]:
        """Fresh parameters and the state that goes with them."""
        params = self.model.init(key)
        return params, self.init_state(params, num_records)

    def init_state(self, params: Params, num_records: int = 1) -> dict[str, Any]:
        """The state at step 0 of given parameters; `num_records`: size of the training data."""
        state: dict[str, Any] = {}
        memory = self.guidance.init(self.model, params, num_records) if self.guidance else ()
        if jax.tree.leaves(memory):
            state["guidance"] = memory
        if self._budget_momentum is not None:
            state["averages"] = {"loss": jnp.zeros(len(self.model.inputs)), "weight": jnp.zeros(())}
        return state

    def resolve(self, to_steps: ToSteps) -> MultiMae:
        """The objective with every duration in steps; needed where `guided_share` or a temperature schedule is used."""
        parts = {name: getattr(self, name) for name in ("guided_share", "loss_weight")}
        return dataclasses.replace(self, **{name: part.resolve(to_steps) for name, part in parts.items() if part is not None})

    @property
    def _budget_momentum(self) -> float | None:
        """How slow the averages of the adaptive budget are; None where the budget keeps none."""
        function, arguments = self.budget
        return dict(arguments).get("momentum", 0.99) if function is BUDGETS["adaptive_dirichlet"] else None

    def after_update(
        self, state: Any, params: Params, batch: Batch, keys: Key[Array, " b"], step: Int[Array, ""], errors: Any, metrics: Metrics
    ) -> Any:
        """What follows the optimiser: the source's memory and the averages of the losses.

        `params`: the updated ones; `errors` per token "b n" where the source observes them; `metrics`: those of this step.
        """
        state = dict(state)
        if self.guidance is not None and "guidance" in state:
            state["guidance"] = self.guidance.update(self._request(params, state, batch, keys), step, errors)
        momentum = self._budget_momentum
        if momentum is not None and "averages" in state:
            pairs = [metrics[f"loss/{self._own_output(name)}"] for name in self.model.inputs]
            losses = jnp.stack([total / jnp.maximum(count, 1.0) for total, count in pairs])
            seen = jnp.stack([count > 0 for _, count in pairs])
            old = state["averages"]
            loss = jnp.where(seen, momentum * old["loss"] + (1 - momentum) * losses, old["loss"])
            state["averages"] = {"loss": loss, "weight": momentum * old["weight"] + (1 - momentum)}
        return state

    def _own_output(self, name: str) -> str:
        """The output that stands for an input modality: its own, else its normalised form."""
        return name if name in self.model.outputs else f"norm_{name}"

    # From stored values to model values

    def prepare(self, batch: Batch) -> Prepared:
        """What the loader delivers, in model values."""
        return prepare(self.model, batch)

    # From tokens to a plan

    def _request(
        self, params: Params, state: Any, batch: Batch, keys: Key[Array, " b"], tokens: TokenBatch | None = None, prepared: Any = None
    ) -> Request:
        prepared = self.prepare(batch) if prepared is None else prepared
        values = prepared.values_of(self.model.inputs)
        tokens = self.model.embed(params, values, prepared.present) if tokens is None else tokens

        def random_errors(error_keys: Key[Array, " b"]) -> Float[Array, "b n"]:
            counts = self._counts(error_keys, tokens, None, state)
            scores = random_scores(stream_keys(error_keys, "scores"), tokens.layout)
            plan = drop(scores, counts, tokens.layout, self.num_visible, tokens.present)
            return self.token_errors(self.reconstruct(params, tokens, plan), prepared, plan, tokens.layout)

        def whole_tokens() -> TokenBatch:
            whole: Batch = {name.removeprefix("whole/"): value for name, value in batch.items() if name.startswith("whole/")}
            if "present" in batch:  # the pictures are those of every k-th sample
                whole["present"] = batch["present"][:: keys.shape[0] // next(iter(whole.values())).shape[0]]
            pictures = self.prepare(whole)
            return self.model.embed(params, pictures.values_of(self.model.inputs), pictures.present)

        return Request(self.model, params, state.get("guidance", ()), tokens, values, batch, keys, random_errors, whole_tokens)

    def guide(self, request: Request) -> Guidance | None:
        """Importance per token, without gradient; None where nothing asks for it."""
        return None if self.guidance is None else jax.lax.stop_gradient(self.guidance(request))

    def _counts(self, keys: Key[Array, " b"], tokens: TokenBatch, scores: Float[Array, "b n"] | None, state: Any) -> Int[Array, "b m"]:
        budget, arguments = self.budget
        if scores is None and budget is BUDGETS["joint"]:
            scores = random_scores(stream_keys(keys, "joint"), tokens.layout)
        averages = None
        if "averages" in state:
            averages = state["averages"]["loss"] / jnp.maximum(state["averages"]["weight"], 1e-12)
        key = stream_keys(keys, "budget")
        return budget(key, tokens.layout, self.num_visible, tokens.present, scores, averages, **dict(arguments))

    def make_plan(
        self, tokens: TokenBatch, guidance: Guidance | None, keys: Key[Array, " b"], state: Any = None, step: Int[Array, ""] | int = 0
    ) -> MaskPlan:
        """Scores, budget and weights to a plan."""
        step = jnp.asarray(step)
        score, arguments = self.scores
        scores = score(stream_keys(keys, "scores"), tokens.layout, guidance, tokens.present, **dict(arguments))
        counts = self._counts(keys, tokens, scores, state or {})
        if self.guided_share is not None:
            share = self.guided_share(step)
            scores = mix_with_random(stream_keys(keys, "share"), scores, counts, tokens.layout, share, tokens.present)
        predicted = self.predicted or Predicted()
        order = random_scores(stream_keys(keys, "predicted"), tokens.layout) if predicted.by == "random" else None
        plan = drop(scores, counts, tokens.layout, self.num_visible, tokens.present, float(predicted.share), order)
        if self.loss_weight is None:
            return plan
        if guidance is None:
            raise ValueError("config.objective.loss_weight weighs by guidance, but there is none: set config.objective.guidance")
        tau, gamma = self.loss_weight.at(step), float(self.loss_weight.gamma)
        return plan._replace(loss_weights=guidance_weights(guidance, tokens.layout, tau, gamma, tokens.present))

    def plan(
        self, params: Params, batch: Batch, keys: Key[Array, " b"], state: Any = None, step: Int[Array, ""] | int = 0
    ) -> tuple[MaskPlan, dict[str, Float[Array, ""]]]:
        """The plan of a batch, and how many samples each output's loss is a mean over."""
        prepared = self.prepare(batch)
        check_targets(self.model, prepared)
        request = self._request(params, state or {}, batch, keys, prepared=prepared)
        tokens = request.tokens
        plan = self.make_plan(tokens, self.guide(request), keys, state, step)
        weights = {name: self.pixel_weights(name, prepared, plan, tokens.layout) for name in self.model.outputs}
        counts = {name: masked_mean(weight, weight)[1] for name, weight in weights.items()}
        for name in self.model.error_outputs:
            errors = predicted_mask(plan)[:, tokens.layout.span(name)]
            counts[f"error_{name}"] = (errors.sum(axis=1) > 1).sum().astype(jnp.float32)
        return plan, counts

    # Losses

    def pixel_weights(self, output: str, prepared: Prepared, plan: MaskPlan, layout: TokenLayout) -> Float[Array, "b n p"]:
        """1 for every valid pixel of a predicted token; an output that is not an input is predicted everywhere."""
        spec = self.model.modality(output)
        b, height, width = prepared.values[spec.name].shape[:3]
        shape = (b, height * width // spec.patch_pixels**2, spec.patch_pixels**2)
        weights = jnp.ones(shape)
        if spec.name in layout.names:
            weights *= predicted_mask(plan)[:, layout.span(spec.name), None]
        if spec.name in prepared.valid:
            weights *= patchify(prepared.valid[spec.name], spec.patch_pixels)
        return weights

    def target(self, output: str, prepared: Prepared) -> Num[Array, "b n p *c"]:
        """What an output must predict, as patches: "b n p c" numbers or "b n p" class ids."""
        spec = self.model.modality(output)
        values = prepared.values[spec.name]
        if spec.kind == "categorical":
            return patchify(values[..., None], spec.patch_pixels)
        patches = _split_channels(patchify(values, spec.patch_pixels), spec)
        if output != spec.name:
            patches = normalize_patches(patches, self._valid_patches(spec, prepared))[0]
        return patches

    def _valid_patches(self, spec: Modality, prepared: Prepared) -> Float[Array, "b n p"] | None:
        if spec.name not in prepared.valid:
            return None
        return patchify(prepared.valid[spec.name], spec.patch_pixels).astype(jnp.float32)

    def encode_visible(self, params: Params, tokens: TokenBatch, plan: MaskPlan) -> tuple[Float[Array, "b e d"], ...]:
        """The visible tokens, in the plan's order, and the global ones, encoded: what the decoders read of it."""
        visible = gather_tokens(tokens.tokens, plan.visible_ids)
        return self.model.memory(params, visible, plan.visible_valid if tokens.present is not None else None)

    def num_queries(self, output: str, layout: TokenLayout) -> int:
        """How many tokens of an output the loss needs at most; static."""
        rows, columns = self.model.output_grid(output, layout)
        name = self.model.modality(output).name
        if name not in layout.names:
            return rows * columns
        hidden = min(rows * columns, layout.num_tokens - self.num_visible)
        share = 1.0 if self.predicted is None else self.predicted.share
        return max(1, round(float(np.float32(share) * np.float32(hidden))))  # float32, half to even: as `masking.drop` counts

    def queries(self, plan: MaskPlan, layout: TokenLayout) -> dict[str, Queries]:
        """The tokens that the loss needs of each output; an output that is not here is decoded whole."""
        if not self.model.decodes_part:
            return {}
        found, predicted = {}, predicted_mask(plan)
        for output in self.model.outputs:
            name = self.model.modality(output).name
            if name in layout.names:
                here = predicted[:, layout.span(name)]
                ids = jnp.argsort(~here, axis=1, stable=True)[:, : self.num_queries(output, layout)]
                found[output] = Queries(ids, jnp.take_along_axis(here, ids, axis=1))
        return found

    def decode(
        self,
        params: Params,
        memory: tuple[Float[Array, "b e d"], ...],
        tokens: TokenBatch,
        plan: MaskPlan,
        queries: Mapping[str, Queries] | None = None,
    ) -> dict[str, Float[Array, "b q p c"]]:
        """Predict every output from the encoded visible tokens, as patches "b q p c" (classes: logits): all, or the queries."""
        masks_keys, queries = tokens.present is not None, queries or {}
        predictions = {}
        for name in self.model.outputs:
            flat = self.model.decode(params, name, memory, plan, tokens.layout, masks_keys, queries.get(name))
            predictions[name] = _split_channels(flat, self.model.modality(name))
        return predictions

    def reconstruct(self, params: Params, tokens: TokenBatch, plan: MaskPlan) -> dict[str, Float[Array, "b n p c"]]:
        """`encode_visible` and `decode`, of all tokens of every output in one pass."""
        return self.decode(params, self.encode_visible(params, tokens, plan), tokens, plan)

    def pixel_losses(
        self,
        predictions: Mapping[str, Float[Array, "b q p c"]],
        prepared: Prepared,
        plan: MaskPlan,
        layout: TokenLayout,
        queries: Mapping[str, Queries] | None = None,
    ) -> dict[str, tuple[Float[Array, "b q p"], Float[Array, "b q p"]]]:
        """Per output: (loss of every pixel, 1 where it counts), of all tokens or of those that were decoded."""
        losses = {}
        for name, prediction in predictions.items():
            target, weights = self.target(name, prepared), self.pixel_weights(name, prepared, plan, layout)
            if queries and name in queries:
                target, weights = (_take(x, queries[name].ids) for x in (target, weights))
            losses[name] = PIXEL_LOSSES[self.model.modality(name).loss](prediction, target), weights
        return losses

    def loss_sums(
        self,
        predictions: Mapping[str, Float[Array, "b q p c"]],
        prepared: Prepared,
        plan: MaskPlan,
        layout: TokenLayout,
        queries: Mapping[str, Queries] | None = None,
    ) -> dict[str, tuple[Float[Array, ""], Float[Array, ""]]]:
        """Per output: (sum over samples of per-sample means, number of samples).

        Loss weights multiply the losses and not the number they are divided by, as in AttG; an output that is not an input
        has no tokens and hence no weights. `queries`: which tokens the predictions are of, where not all.
        """
        sums = {}
        for name, (pixel_loss, counted) in self.pixel_losses(predictions, prepared, plan, layout, queries).items():
            modality = self.model.modality(name).name
            if plan.loss_weights is not None and modality in layout.names:
                weights = plan.loss_weights[:, layout.span(modality), None]
                pixel_loss = pixel_loss * (_take(weights, queries[name].ids) if queries and name in queries else weights)
            sums[name] = masked_mean(pixel_loss, counted)
        return sums

    def token_errors(
        self,
        predictions: Mapping[str, Float[Array, "b q p c"]],
        prepared: Prepared,
        plan: MaskPlan,
        layout: TokenLayout,
        queries: Mapping[str, Queries] | None = None,
    ) -> Float[Array, "b n"]:
        """Unweighted error per token, summed over the outputs of its modality, mean over its counted pixels; NaN where none counts."""
        errors: dict[str, Any] = {}
        for name, (pixel_loss, counted) in self.pixel_losses(predictions, prepared, plan, layout, queries).items():
            modality = self.model.modality(name).name
            if modality in layout.names:
                count = counted.sum(axis=2)
                error = jnp.where(count > 0, (pixel_loss * counted).sum(axis=2) / jnp.maximum(count, 1.0), jnp.nan)
                if queries and name in queries:
                    rows, ids = jnp.arange(error.shape[0])[:, None], queries[name].ids
                    whole = layout.span(modality).stop - layout.span(modality).start
                    error = jnp.full((error.shape[0], whole), jnp.nan).at[rows, ids].set(error)
                errors[modality] = errors.get(modality, 0.0) + error
        unknown = [jnp.full((plan.masked.shape[0], size), jnp.nan) for size in layout.sizes]
        return jax.lax.stop_gradient(jnp.concatenate([errors.get(n, u) for n, u in zip(layout.names, unknown, strict=True)], axis=1))

    def loss(
        self,
        params: Params,
        state: Any,
        batch: Batch,
        keys: Key[Array, " b"],
        step: Int[Array, ""],
        plan: MaskPlan | None = None,
        counts: Mapping[str, Float[Array, ""]] | None = None,
        shared_key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], tuple[Any, Metrics]]:
        """The sum over outputs of their masked losses, and ((errors per token or None), metrics).

        `plan` and `counts` (from `plan`) are given where a batch is processed in micro-batches: the parts' losses then add up
        to the whole batch's. Every sample draws for itself: `shared_key` is not used.
        """
        prepared = self.prepare(batch)
        check_targets(self.model, prepared)
        tokens = self.model.embed(params, prepared.values_of(self.model.inputs), prepared.present)
        if plan is None:
            request = self._request(params, state or {}, batch, keys, tokens, prepared)
            plan = self.make_plan(tokens, self.guide(request), keys, state, step)
        memory, queries = self.encode_visible(params, tokens, plan), self.queries(plan, tokens.layout)
        predictions = self.decode(params, memory, tokens, plan, queries)
        sums = self.loss_sums(predictions, prepared, plan, tokens.layout, queries)
        errors = None
        if self.model.error_outputs or (self.guidance is not None and self.guidance.observes):
            errors = self.token_errors(predictions, prepared, plan, tokens.layout, queries)
        if self.model.error_outputs and errors is not None:
            expected = predict_errors(self.model, params, memory, plan, tokens.layout, tokens.present is not None)
            known = ~jnp.isnan(errors)
            for name in self.model.error_outputs:
                s = tokens.layout.span(name)
                sums[f"error_{name}"] = ranking_loss(expected[:, s], jnp.where(known, errors, 0.0)[:, s], known[:, s])
        total = jnp.zeros(())
        for name, (loss_sum, count) in sums.items():
            total += loss_sum / jnp.maximum(count if counts is None else counts[name], 1.0)
        observed = errors if self.guidance is not None and self.guidance.observes else None
        return total, (observed, {f"loss/{name}": value for name, value in sums.items()})

    # What evaluators and pictures read

    def predict(self, params: Params, state: Any, batch: Batch, inputs: tuple[str, ...] | None = None) -> dict[str, Float[Array, "b d"]]:
        """Features of an unmasked pass over `inputs` (the first input modality alone unless given).

        "mean": mean of the patch tokens of those modalities; "global": the (first) global token, where there is one.
        """
        names = inputs or self.model.inputs[:1]
        prepared = self.prepare({key: value for key, value in batch.items() if key in names or key == "present"})
        tokens = self.model.embed(params, prepared.values_of(names), prepared.present)
        encoded = self.model.encode(params, tokens.tokens, tokens.present).astype(jnp.float32)
        n = tokens.layout.num_tokens
        weights = jnp.ones(encoded.shape[:1] + (n,)) if tokens.present is None else tokens.present.astype(jnp.float32)
        mean = jnp.einsum("bnd,bn->bd", encoded[:, :n], weights) / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
        return {"mean": mean} | ({"global": encoded[:, n]} if self.model.num_global_tokens else {})

    def visualize(
        self,
        params: Params,
        state: Any,
        batch: Batch,
        keys: Key[Array, " b"],
        plan: MaskPlan | None = None,
        step: Int[Array, ""] | int = 0,
    ) -> dict[str, dict[str, Array]]:
        """What a picture of the method needs.

        "inputs": stored values; "masked": bool "b h w" per input; "guidance": "b h w" per input (empty where unguided);
        "reconstructions": predictions in stored units, class ids for categorical outputs. Normalised outputs borrow the
        mean and deviation of the target's own patch, standardised ones those of the target map.
        """
        prepared = self.prepare(batch)
        check_targets(self.model, prepared)
        request = self._request(params, state or {}, batch, keys, prepared=prepared)
        tokens, guidance = request.tokens, self.guide(request)
        plan = self.make_plan(tokens, guidance, keys, state, step) if plan is None else plan
        grids = dict(zip(tokens.layout.names, tokens.layout.grids, strict=True))
        on_grid = lambda flat: {n: flat[:, tokens.layout.span(n)].reshape(-1, *grids[n]) for n in grids}  # noqa: E731
        predictions = self.reconstruct(params, tokens, plan)
        return {
            "inputs": {spec.name: batch[spec.name] for spec in self.model.modalities},
            "masked": on_grid(plan.masked),
            "guidance": {} if guidance is None else on_grid(guidance),
            "reconstructions": {name: self.to_stored(name, prediction, prepared) for name, prediction in predictions.items()},
        }

    def to_stored(self, output: str, prediction: Float[Array, "b n p c"], prepared: Prepared) -> Num[Array, "b h w *c"]:
        """A prediction as a map in stored units, or of class ids."""
        spec = self.model.modality(output)
        height, width = prepared.values[spec.name].shape[1:3]
        grid = height // spec.patch_pixels, width // spec.patch_pixels
        if spec.kind == "categorical":
            ids = prediction.argmax(axis=-1).astype(jnp.int32)
            return unpatchify(ids, grid, spec.patch_pixels)[..., 0]
        if output != spec.name:
            own = _split_channels(patchify(prepared.values[spec.name], spec.patch_pixels), spec)
            _, mean, deviation = normalize_patches(own, self._valid_patches(spec, prepared))
            prediction = prediction * deviation + mean
        values = unpatchify(prediction.reshape(*prediction.shape[:2], -1), grid, spec.patch_pixels)
        if spec.name in prepared.restore:
            mean, deviation = prepared.restore[spec.name]
            values = values * deviation + mean
        return (values * jnp.array(spec.std) + jnp.array(spec.mean)) / spec.scale


def _take(values: Num[Array, "b n *p"], ids: Int[Array, "b q"]) -> Num[Array, "b q *p"]:
    return jnp.take_along_axis(values, ids.reshape(*ids.shape, *(1,) * (values.ndim - 2)), axis=1)


def _split_channels(patches: Num[Array, "b n k"], spec: Modality) -> Num[Array, "b n p c"]:
    return patches.reshape(*patches.shape[:2], spec.patch_pixels**2, -1)


def multimae(
    modalities: Mapping[str, Modality],
    image_size: tuple[int, int],
    *,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    encoder: str | Mapping[str, Any] = "B",
    decoder: Mapping[str, Any] | None = None,
    num_global_tokens: int = 1,
    num_visible: int = 98,
    scores: Mapping[str, Any] | None = None,
    budget: Mapping[str, Any] | None = None,
    guidance: Mapping[str, Any] | None = None,
    guided_share: Mapping[str, Any] | None = None,
    loss_weight: Mapping[str, Any] | None = None,
    predicted: Mapping[str, Any] | None = None,
    final_norm: bool = False,
    num_classes: int = 0,
    pool: str = "global",
    positions: str = "rows_first",
    compute_dtype: str = "float32",
    remat: bool = False,
) -> MultiMae:
    """Build the objective from `config.objective`. Every mistake is an error that names the key.

    `decoder`: each output's, {"name": "spatial" (MultiMAE's, by default 256 wide with 2 blocks and 8 heads), "mae" (512, 8, 16) or
    "crossmae" (512, 12, 16), and width, depth, heads, mlp_ratio}; "crossmae" takes `features` (encoder blocks read: "all" or a
    list), `use_input` (also what enters the encoder), `weighted` (False: the last block alone) and `self_attention` beside.
    `positions`: "rows_first" or, as in MAE, "columns_first". `scores`, `budget`, `guidance`: {"name": ..., and that row's
    arguments}; by default random scores under a Dirichlet budget. `guided_share`, `loss_weight`, `predicted`: the fields of
    `GuidedShare`, `LossWeight`, `Predicted`. `final_norm`, `num_classes`, `pool`:
    of imported encoders; one without `outputs` gives features and guidance and cannot be trained.
    """
    check_inputs(modalities, inputs)
    for name in outputs:
        base = name if name in modalities else name.removeprefix("norm_")
        if base not in modalities:
            known = ", ".join(modalities) + ", or norm_<name> of a continuous one"
            raise ValueError(f"config.objective.outputs names {name!r}; known: {known}")
        if name != base and modalities[base].kind == "categorical":
            raise ValueError(f"config.objective.outputs names {name!r}, but classes of {base!r} cannot be normalised per patch")
    used = [modalities[name] for name in dict.fromkeys((*inputs, *(n if n in modalities else n.removeprefix("norm_") for n in outputs)))]
    decoder_name, sizes = decoder_arguments(decoder or {}, encoder_sizes(encoder)["depth"])
    model = Network(
        modalities=tuple(used),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        image_size=image_size,
        encoder=tuple(sorted(encoder_sizes(encoder).items())),
        decoder=tuple(sorted(sizes.items())),
        num_global_tokens=num_global_tokens,
        compute_dtype=compute_dtype,
        remat=remat,
        final_norm=final_norm,
        heads=(("head", (("num_classes", num_classes),)),) if num_classes else (),
        pool=pool,
        decoder_name=decoder_name,
        positions=positions,
    )
    for spec in used:
        spec.size(model.image_size)
    if not 1 <= num_visible < model.layout.num_tokens:
        raise ValueError(
            f"config.objective.num_visible is {num_visible}, but an image of {model.image_size} has {model.layout.num_tokens} tokens "
            f"({', '.join(f'{n} {s}' for n, s in zip(model.layout.names, model.layout.sizes, strict=True))}): "
            "at least one must be visible and one hidden"
        )
    name = (scores or {}).get("name", "random")
    score = named_function("config.objective.scores", SCORES, scores or {"name": "random"}, ("keys", "layout", "guidance", "present"))
    weight = _part("loss_weight", LossWeight, loss_weight)
    users = [f"scores {name!r}"] if name in GUIDED_SCORES else []
    users += ["loss_weight"] if weight is not None else []
    if users and not guidance:
        raise ValueError(
            f"config.objective.{users[0].replace(' ', '.name ')} needs config.objective.guidance, one of: {', '.join(GUIDANCE)}"
        )
    if guidance and not users:
        raise ValueError(f"config.objective.guidance is set, but scores {name!r} do not use it and there is no loss_weight: remove it")
    share = _part("guided_share", GuidedShare, guided_share)
    source = build_source(guidance) if guidance else None
    if source is not None:
        if source.predicts_errors:
            model = dataclasses.replace(model, error_outputs=model.inputs)
        source.check(model)
    given = ("keys", "layout", "num_visible", "present", "scores", "averages")
    spend = named_function("config.objective.budget", BUDGETS, budget or {"name": "dirichlet"}, given)
    objective = MultiMae(model, num_visible, score, spend, source, share, weight, _part("predicted", Predicted, predicted))
    _check_arguments_of_functions(objective)
    return objective


def check_inputs(modalities: Mapping[str, Modality], inputs: Sequence[str]) -> None:
    """Raise ValueError where `config.objective.inputs` is empty, or names what is not declared, or something twice."""
    if not inputs:
        raise ValueError("config.objective.inputs must name at least one modality")
    for name in inputs:
        if name not in modalities:
            raise ValueError(f"config.objective.inputs names {name!r}; declared in config.modalities: {', '.join(modalities)}")
    if len(set(inputs)) < len(inputs):
        raise ValueError(f"config.objective.inputs is {tuple(inputs)}: each modality is named once")


def _part(key: str, constructor: Any, block: Mapping[str, Any] | None) -> Any:
    """A block of `config.objective` to its dataclass; None where it is empty."""
    if not block:
        return None
    check_arguments(f"config.objective.{key}", constructor, block)
    return constructor(**{name: hashable(value) for name, value in block.items()})


def _check_arguments_of_functions(objective: MultiMae) -> None:
    """Call scores and budget on shapes, so that wrong numbers are found before anything is computed."""
    model = objective.model
    if objective._budget_momentum is not None:
        missing = [n for n in model.inputs if n not in model.outputs and f"norm_{n}" not in model.outputs]
        if missing:
            raise ValueError(
                f"the budget 'adaptive_dirichlet' follows losses, but the input {missing[0]!r} is not in config.objective.outputs"
            )
    (score, score_arguments), (budget, budget_arguments), layout = objective.scores, objective.budget, model.layout

    def both(keys: Key[Array, " b"]) -> Any:
        scores = score(keys, layout, jnp.zeros((1, layout.num_tokens)), None, **dict(score_arguments))
        return budget(keys, layout, objective.num_visible, None, scores, None, **dict(budget_arguments))

    jax.eval_shape(both, jax.random.split(jax.random.key(0), 1))
