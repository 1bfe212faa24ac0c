"""Masked autoencoding: hide most tokens of all modalities, rebuild every modality; what to hide is a line of config.

Sources: Bachmann et al., "MultiMAE: Multi-modal Multi-task Masked Autoencoders", 2022, and the attention-guided masking that continues
it; He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021; Fu et al., "Rethinking Patch Dependence for Masked
Autoencoders", 2024. The three are rows of `maskvit.objectives.methods`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num

from maskvit.core.flops import forward_flops
from maskvit.core.keys import stream_keys
from maskvit.core.patches import patchify, unpatchify
from maskvit.core.types import Batch, DataNeeds, Guidance, MaskPlan, Metrics, Params, Queries, TokenBatch, TokenLayout
from maskvit.guidance import Request, Source
from maskvit.guidance.errors import predict_errors
from maskvit.heads.network import Network
from maskvit.heads.values import Prepared, ReadsFeatures, check_targets, prepare, split_channels, take
from maskvit.losses.pixels import PIXEL_LOSSES, masked_mean, normalize_patches
from maskvit.losses.ranking import ranking_loss
from maskvit.losses.weights import guidance_weights
from maskvit.masking.budgets import BUDGETS, moved_averages
from maskvit.masking.plan import drop, gather_tokens, mix_with_random, predicted_mask
from maskvit.masking.scores import random_scores
from maskvit.objectives.options import GuidedShare, LossWeight, Predicted, ToSteps
from maskvit.optim.transforms import guarded


@dataclasses.dataclass(frozen=True)
class MaskedAutoencoder(ReadsFeatures):
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

    differences = None  # a run begins from the same model, but for what `config.init_from` names

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

    def resolve(self, to_steps: ToSteps) -> MaskedAutoencoder:
        """The objective with every duration in steps; needed where `guided_share` or a temperature schedule is used."""
        parts = {name: getattr(self, name) for name in ("guided_share", "loss_weight")}
        return dataclasses.replace(self, **{name: part.resolve(to_steps) for name, part in parts.items() if part is not None})

    def recall(self, state: Any, index: Int[Array, " b"] | None) -> tuple[Any, Any]:
        """What of the state holds for every sample, and what is kept of the records `index` (None: nothing per record)."""
        if self.guidance is None or "guidance" not in state:
            return state, None
        shared, kept = self.guidance.recall(state["guidance"], index)
        return {**state, "guidance": shared}, kept

    def summarize(self, metrics: Metrics, step: Int[Array, ""]) -> Metrics:
        """The metrics of `loss`, which are scalars already."""
        return metrics

    @property
    def _budget_momentum(self) -> float | None:
        """How slow the averages of the adaptive budget are; None where the budget keeps none."""
        function, arguments = self.budget
        return dict(arguments).get("momentum", 0.99) if function is BUDGETS["adaptive_dirichlet"] else None

    def after_update(
        self, state: Any, params: Params, batch: Batch, keys: Key[Array, " b"], step: Int[Array, ""], errors: Any, metrics: Metrics,
        accepted: Bool[Array, ""] | bool = True,
    ) -> Any:  # fmt: skip
        """What follows the optimizer: the source's memory and the averages of the losses; nothing changes unless `accepted`.

        `params`: the updated ones; `errors` per token "b n" where the source observes them; `metrics`: those of this step.
        """
        state = dict(state)
        if self.guidance is not None and "guidance" in state:
            request = self._request(params, state, batch, keys)._replace(accepted=accepted)
            state["guidance"] = self.guidance.update(request, step, errors)
        momentum = self._budget_momentum
        if momentum is not None and "averages" in state:
            pairs = [metrics[f"loss/{self._own_output(name)}"] for name in self.model.inputs]
            state["averages"] = guarded(accepted, moved_averages(state["averages"], pairs, momentum), state["averages"])
        return state

    def _own_output(self, name: str) -> str:
        """The output that stands for an input modality: its own, else its normalized form."""
        return name if name in self.model.outputs else f"norm_{name}"

    # What training asks

    @property
    def needs(self) -> DataNeeds:
        """What the loader must deliver beside the modalities."""
        return DataNeeds() if self.guidance is None else self.guidance.needs

    def check(self) -> None:
        """Raise ValueError where there is nothing to train for."""
        if not self.model.outputs:
            raise ValueError("config.objective.outputs is empty: there is nothing to train for")

    def flops(self, views: Any = None) -> float:
        """The arithmetic of one training step per image: forward, backward at twice the forward, and what guides."""
        queries = {output: self.num_queries(output, self.model.layout) for output in self.model.outputs}
        flops = 3 * forward_flops(self.model, self.num_visible, queries)
        return flops + (self.guidance.flops(self.model) if self.guidance is not None else 0.0)

    def prepare(self, batch: Batch) -> Prepared:
        """What the loader delivers, in model values."""
        return prepare(self.model, batch)

    def with_random_masks(self) -> MaskedAutoencoder:
        """The same with random masks under a symmetric Dirichlet budget and plain losses, whatever hides or weighs in training."""
        plain = dataclasses.replace(self, scores=(random_scores, ()), budget=(BUDGETS["dirichlet"], ()))
        return dataclasses.replace(plain, guidance=None, guided_share=None, loss_weight=None, predicted=None)

    # From tokens to a plan

    def _request(
        self, params: Params, state: Any, batch: Batch, keys: Key[Array, " b"], tokens: TokenBatch | None = None, prepared: Any = None
    ) -> Request:
        prepared = self.prepare(batch) if prepared is None else prepared
        if batch.kept is None:
            batch = batch._replace(kept=self.recall(state, batch.record.index)[1])
        values = prepared.values_of(self.model.inputs)
        tokens = self.model.embed(params, values, prepared.present) if tokens is None else tokens

        def random_errors(error_keys: Key[Array, " b"]) -> Float[Array, "b n"]:
            counts = self._counts(error_keys, tokens, None, state)
            scores = random_scores(stream_keys(error_keys, "scores"), tokens.layout)
            plan = drop(scores, counts, tokens.layout, self.num_visible, tokens.present)
            return self.token_errors(self.reconstruct(params, tokens, plan), prepared, plan, tokens.layout)

        def whole_tokens() -> TokenBatch:
            whole = Batch(batch.whole)
            if batch.present is not None:  # the pictures are those of every k-th sample
                whole = whole._replace(present=batch.present[:: keys.shape[0] // whole.size])
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
        patches = split_channels(patchify(values, spec.patch_pixels), spec)
        if output != spec.name:
            patches = normalize_patches(patches, prepared.valid_patches(spec))[0]
        return patches

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
        has_padding, queries = tokens.present is not None, queries or {}
        predictions = {}
        for name in self.model.outputs:
            flat = self.model.decode(params, name, memory, plan, tokens.layout, has_padding, queries.get(name))
            predictions[name] = split_channels(flat, self.model.modality(name))
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
                target, weights = (take(x, queries[name].ids) for x in (target, weights))
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
                pixel_loss = pixel_loss * (take(weights, queries[name].ids) if queries and name in queries else weights)
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
        "reconstructions": predictions in stored units, class ids for categorical outputs. Normalized outputs borrow the
        mean and deviation of the target's own patch, standardized ones those of the target map.
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
            "inputs": {spec.name: batch.values[spec.name] for spec in self.model.modalities},
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
            own = split_channels(patchify(prepared.values[spec.name], spec.patch_pixels), spec)
            _, mean, deviation = normalize_patches(own, prepared.valid_patches(spec))
            prediction = prediction * deviation + mean
        values = unpatchify(prediction.reshape(*prediction.shape[:2], -1), grid, spec.patch_pixels)
        if spec.name in prepared.restore:
            mean, deviation = prepared.restore[spec.name]
            values = values * deviation + mean
        return (values * jnp.array(spec.std) + jnp.array(spec.mean)) / spec.scale
