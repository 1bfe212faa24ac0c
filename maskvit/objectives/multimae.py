"""MultiMAE: hide most tokens of all modalities, rebuild every modality; what to hide is a line of config.

Source: Bachmann et al., "MultiMAE: Multi-modal Multi-task Masked Autoencoders", 2022, and the attention-guided masking
that continues it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

from maskvit.configuration import named_function
from maskvit.guidance import GUIDANCE
from maskvit.keys import stream_keys
from maskvit.losses import PIXEL_LOSSES, masked_mean, normalize_patches, standardize_trimmed
from maskvit.masking import BUDGETS, GUIDED_SCORES, SCORES, drop, gather_tokens, predicted_mask
from maskvit.modalities import Modality
from maskvit.models import DTYPES, MultiMaeModel, encoder_sizes
from maskvit.patches import patchify, unpatchify
from maskvit.types import Batch, Guidance, MaskPlan, Metrics, Params, TokenBatch, TokenLayout


class Prepared(NamedTuple):
    """A batch in model values.

    `values`: model input per modality (continuous float32 with 0 where invalid, categorical int with -1 where unknown);
    `valid`: pixels that have a value, per modality that can lack some; `restore`: (mean, deviation) that undo a
    modality's standardisation; `present`: tokens that exist, None where all do.
    """

    values: dict[str, Num[Array, "b h w *c"]]
    valid: dict[str, Bool[Array, "b h w 1"]]
    restore: dict[str, tuple[Float[Array, "b 1 1 1"], Float[Array, "b 1 1 1"]]]
    present: Bool[Array, "b n"] | None

    def values_of(self, names: tuple[str, ...]) -> dict[str, Num[Array, "b h w *c"]]:
        """The values of those modalities that the batch has."""
        return {name: self.values[name] for name in names if name in self.values}


@dataclasses.dataclass(frozen=True)
class MultiMae:
    """The objective. Hashable and without arrays: parameters and state belong to the caller.

    Attributes:
      model: the network.
      num_visible: tokens shown per sample, all modalities together.
      scores, budget, guidance: (function, its keyword arguments); guidance is None where scores do not need it.
    """

    model: MultiMaeModel
    num_visible: int
    scores: tuple[Any, tuple[tuple[str, Any], ...]]
    budget: tuple[Any, tuple[tuple[str, Any], ...]]
    guidance: tuple[Any, tuple[tuple[str, Any], ...]] | None

    def init(self, key: Key[Array, ""]) -> tuple[Params, Any]:
        """Fresh parameters and the (empty) objective state."""
        return self.model.init(key), ()

    def after_update(self, state: Any, params: Params, step: Int[Array, ""]) -> Any:
        """MultiMAE keeps nothing between steps."""
        return state

    # From stored values to model values

    def prepare(self, batch: Batch) -> Prepared:
        """Normalise what the loader delivers; depth is standardised per sample over its valid pixels."""
        values: dict[str, Any] = {}
        valid: dict[str, Any] = {}
        restore: dict[str, Any] = {}
        for spec in self.model.modalities:
            if spec.name not in batch:
                continue
            stored = batch[spec.name]
            if "present" in batch and spec.name in self.model.inputs:
                # Whatever stands in for an absent modality (NaN) must not reach a product, not even one with weight 0.
                has = batch["present"][:, self.model.inputs.index(spec.name)]
                stored = jnp.where(has.reshape(-1, *(1,) * (stored.ndim - 1)), stored, jnp.zeros_like(stored))
            if spec.kind == "categorical":
                values[spec.name] = stored
                if spec.missing is not None:
                    valid[spec.name] = (stored >= 0)[..., None]
                continue
            if spec.missing is not None:
                valid[spec.name] = jnp.isfinite(stored).all(axis=-1, keepdims=True)
                stored = jnp.where(valid[spec.name], stored, 0)
            if "present" in batch and spec.name in self.model.inputs:
                # Loaders fill what a sample lacks with NaN: no attention weight of zero would take that out again.
                there = batch["present"][:, self.model.inputs.index(spec.name)]
                stored = jnp.where(there[:, None, None, None], stored, 0)
            scaled = stored.astype(jnp.float32) * spec.scale
            scaled = (scaled - jnp.array(spec.mean)) / jnp.array(spec.std)
            if spec.standardize:
                scaled, mean, deviation = standardize_trimmed(scaled, valid.get(spec.name))
                restore[spec.name] = mean, deviation
            values[spec.name] = jnp.where(valid[spec.name], scaled, 0) if spec.name in valid else scaled
        return Prepared(values, valid, restore, self._present_tokens(batch, values, valid))

    def _present_tokens(self, batch: Batch, values: Mapping[str, Any], valid: Mapping[str, Any]) -> Bool[Array, "b n"] | None:
        """Tokens of modalities that a sample has, with at least one valid pixel."""
        names = [name for name in self.model.inputs if name in values]
        if "present" not in batch and not any(name in valid for name in names):
            return None
        parts = []
        for name in names:
            patch = self.model.modality(name).patch_pixels
            b, height, width = values[name].shape[:3]
            tokens = jnp.ones((b, height * width // patch**2), bool)
            if name in valid:
                tokens = patchify(valid[name], patch).any(axis=-1)
            if "present" in batch:
                tokens &= batch["present"][:, self.model.inputs.index(name), None]
            parts.append(tokens)
        return jnp.concatenate(parts, axis=1)

    # From tokens to a plan

    def guide(self, params: Params, tokens: TokenBatch) -> Guidance | None:
        """Importance per token, or None where the scores do not ask for it."""
        if self.guidance is None:
            return None
        source, arguments = self.guidance
        return source(self.model, params, tokens, **dict(arguments))

    def make_plan(self, tokens: TokenBatch, guidance: Guidance | None, keys: Key[Array, " b"]) -> MaskPlan:
        """Scores and budget to a plan."""
        score, score_arguments = self.scores
        budget, budget_arguments = self.budget
        scores = score(stream_keys(keys, "scores"), tokens.layout, guidance, **dict(score_arguments))
        counts = budget(stream_keys(keys, "budget"), tokens.layout, self.num_visible, tokens.present, **dict(budget_arguments))
        return drop(scores, counts, tokens.layout, self.num_visible, tokens.present)

    def plan(self, params: Params, batch: Batch, keys: Key[Array, " b"]) -> tuple[MaskPlan, dict[str, Float[Array, ""]]]:
        """The plan of a batch, and how many samples each output's loss is a mean over."""
        prepared = self.prepare(batch)
        tokens = self.model.embed(params, prepared.values_of(self.model.inputs), prepared.present)
        plan = self.make_plan(tokens, self.guide(params, tokens), keys)
        weights = {name: self.pixel_weights(name, prepared, plan, tokens.layout) for name in self.model.outputs}
        return plan, {name: masked_mean(weight, weight)[1] for name, weight in weights.items()}

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

    def reconstruct(
        self, params: Params, tokens: TokenBatch, plan: MaskPlan, outputs: tuple[str, ...] | None = None
    ) -> dict[str, Float[Array, "b n p c"]]:
        """Encode the visible tokens and predict every output, as patches "b n p c" (classes: logits)."""
        masks_keys = tokens.present is not None
        visible = gather_tokens(tokens.tokens, plan.visible_ids)
        encoded = self.model.encode(params, visible, plan.visible_valid if masks_keys else None)
        return {
            name: _split_channels(self.model.decode(params, name, encoded, plan, tokens.layout, masks_keys), self.model.modality(name))
            for name in outputs or self.model.outputs
        }

    def loss_sums(
        self, predictions: Mapping[str, Float[Array, "b n p c"]], prepared: Prepared, plan: MaskPlan, layout: TokenLayout
    ) -> dict[str, tuple[Float[Array, ""], Float[Array, ""]]]:
        """Per output: (sum over samples of per-sample means, number of samples)."""
        sums = {}
        for name, prediction in predictions.items():
            pixel_loss = PIXEL_LOSSES[self.model.modality(name).loss](prediction, self.target(name, prepared))
            sums[name] = masked_mean(pixel_loss, self.pixel_weights(name, prepared, plan, layout))
        return sums

    def loss(
        self,
        params: Params,
        state: Any,
        batch: Batch,
        keys: Key[Array, " b"],
        step: Int[Array, ""],
        plan: MaskPlan | None = None,
        counts: Mapping[str, Float[Array, ""]] | None = None,
    ) -> tuple[Float[Array, ""], tuple[Any, Metrics]]:
        """The sum over outputs of their masked losses.

        `plan` and `counts` (from `plan`) are given where a batch is worked off in parts: the parts' losses then add up
        to the whole batch's.
        """
        prepared = self.prepare(batch)
        tokens = self.model.embed(params, prepared.values_of(self.model.inputs), prepared.present)
        if plan is None:
            plan = self.make_plan(tokens, self.guide(params, tokens), keys)
        sums = self.loss_sums(self.reconstruct(params, tokens, plan), prepared, plan, tokens.layout)
        total = jnp.zeros(())
        for name, (loss_sum, count) in sums.items():
            total += loss_sum / jnp.maximum(count if counts is None else counts[name], 1.0)
        return total, (state, {f"loss/{name}": value for name, value in sums.items()})

    # What evaluators and pictures read

    def predict(self, params: Params, state: Any, batch: Batch, inputs: tuple[str, ...] | None = None) -> dict[str, Float[Array, "b d"]]:
        """Features of an unmasked pass over `inputs` (the first input modality alone unless given).

        "mean": mean of the patch tokens of those modalities; "global": the (first) global token.
        """
        names = inputs or self.model.inputs[:1]
        prepared = self.prepare({key: value for key, value in batch.items() if key in names or key == "present"})
        tokens = self.model.embed(params, prepared.values_of(names), prepared.present)
        encoded = self.model.encode(params, tokens.tokens, tokens.present).astype(jnp.float32)
        n = tokens.layout.num_tokens
        weights = jnp.ones(encoded.shape[:1] + (n,)) if tokens.present is None else tokens.present.astype(jnp.float32)
        mean = jnp.einsum("bnd,bn->bd", encoded[:, :n], weights) / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
        return {"mean": mean, "global": encoded[:, n]}

    def visualize(
        self, params: Params, state: Any, batch: Batch, keys: Key[Array, " b"], plan: MaskPlan | None = None
    ) -> dict[str, dict[str, Array]]:
        """What a picture of the method needs.

        "inputs": stored values; "masked": bool "b h w" per input; "guidance": "b h w" per input (empty where unguided);
        "reconstructions": predictions in stored units, class ids for categorical outputs. Normalised outputs borrow the
        mean and deviation of the target's own patch, standardised ones those of the target map.
        """
        prepared = self.prepare(batch)
        tokens = self.model.embed(params, prepared.values_of(self.model.inputs), prepared.present)
        guidance = self.guide(params, tokens)
        plan = self.make_plan(tokens, guidance, keys) if plan is None else plan
        grids = dict(zip(tokens.layout.names, tokens.layout.grids, strict=True))
        on_grid = lambda flat: {n: flat[:, tokens.layout.span(n)].reshape(-1, *grids[n]) for n in grids}  # noqa: E731
        reconstructions = {}
        for name, prediction in self.reconstruct(params, tokens, plan).items():
            spec = self.model.modality(name)
            height, width = prepared.values[spec.name].shape[1:3]
            grid = height // spec.patch_pixels, width // spec.patch_pixels
            if spec.kind == "categorical":
                ids = prediction.argmax(axis=-1).astype(jnp.int32)
                reconstructions[name] = unpatchify(ids, grid, spec.patch_pixels)[..., 0]
                continue
            if name != spec.name:
                own = _split_channels(patchify(prepared.values[spec.name], spec.patch_pixels), spec)
                _, mean, deviation = normalize_patches(own, self._valid_patches(spec, prepared))
                prediction = prediction * deviation + mean
            values = unpatchify(prediction.reshape(*prediction.shape[:2], -1), grid, spec.patch_pixels)
            if spec.name in prepared.restore:
                mean, deviation = prepared.restore[spec.name]
                values = values * deviation + mean
            reconstructions[name] = (values * jnp.array(spec.std) + jnp.array(spec.mean)) / spec.scale
        return {
            "inputs": {spec.name: batch[spec.name] for spec in self.model.modalities},
            "masked": on_grid(plan.masked),
            "guidance": {} if guidance is None else on_grid(guidance),
            "reconstructions": reconstructions,
        }


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
    compute_dtype: str = "float32",
    remat: bool = False,
) -> MultiMae:
    """Build the objective from `config.objective`. Every mistake is an error that names the key.

    `decoder`: width, depth, heads (and mlp_ratio) of each output's decoder, by default 256, 2, 8. `scores`, `budget`,
    `guidance`: {"name": ..., and that function's arguments}; by default random scores under a Dirichlet budget.
    """
    for name in inputs:
        if name not in modalities:
            raise ValueError(f"config.objective.inputs names {name!r}; declared in config.modalities: {', '.join(modalities)}")
    for name in outputs:
        base = name if name in modalities else name.removeprefix("norm_")
        if base not in modalities:
            known = ", ".join(modalities) + ", or norm_<name> of a continuous one"
            raise ValueError(f"config.objective.outputs names {name!r}; known: {known}")
        if name != base and modalities[base].kind == "categorical":
            raise ValueError(f"config.objective.outputs names {name!r}, but classes of {base!r} cannot be normalised per patch")
    if not inputs or not outputs:
        raise ValueError("config.objective.inputs and config.objective.outputs must each name at least one modality")
    if compute_dtype not in DTYPES:
        raise ValueError(f"config.objective.compute_dtype is {compute_dtype!r}; known: {', '.join(DTYPES)}")
    used = [modalities[name] for name in dict.fromkeys((*inputs, *(n if n in modalities else n.removeprefix("norm_") for n in outputs)))]
    sizes = dict(dict(width=256, depth=2, heads=8), **(decoder or {}))
    for where, block in (("encoder", encoder_sizes(encoder)), ("decoder", sizes)):
        unknown = set(block) - {"width", "depth", "heads", "mlp_ratio"}
        if unknown:
            raise ValueError(f"config.objective.{where} has unknown key {sorted(unknown)[0]!r}; known: width, depth, heads, mlp_ratio")
        if block["width"] % block["heads"] or block["width"] % 4:
            raise ValueError(f"config.objective.{where}.width {block['width']} must divide by its {block['heads']} heads and by 4")
    model = MultiMaeModel(
        modalities=tuple(used),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        image_size=tuple(image_size),
        encoder=tuple(sorted(encoder_sizes(encoder).items())),
        decoder=tuple(sorted(sizes.items())),
        num_global_tokens=num_global_tokens,
        compute_dtype=compute_dtype,
        remat=remat,
    )
    for spec in used:
        spec.size(model.image_size)
    if not 1 <= num_visible < model.layout.num_tokens:
        raise ValueError(
            f"config.objective.num_visible is {num_visible}, but an image of {model.image_size} has {model.layout.num_tokens} tokens "
            f"({', '.join(f'{n} {s}' for n, s in zip(model.layout.names, model.layout.sizes, strict=True))}): "
            "at least one must be visible and one hidden"
        )
    score = named_function("config.objective.scores", SCORES, scores or {"name": "random"}, ("keys", "layout", "guidance"))
    guided = (scores or {}).get("name") in GUIDED_SCORES
    if guided and not guidance:
        raise ValueError(f"config.objective.scores.name {scores['name']!r} needs config.objective.guidance, one of: {', '.join(GUIDANCE)}")
    if guidance and not guided:
        raise ValueError(
            f"config.objective.guidance is set, but scores {(scores or {'name': 'random'})['name']!r} do not use it: remove one"
        )
    alphas = (budget or {}).get("alphas", 1.0)
    if isinstance(alphas, (list, tuple)) and len(alphas) != len(inputs):
        raise ValueError(f"config.objective.budget.alphas has {len(alphas)} values for the {len(inputs)} inputs {tuple(inputs)}")
    return MultiMae(
        model=model,
        num_visible=num_visible,
        scores=score,
        budget=named_function(
            "config.objective.budget", BUDGETS, budget or {"name": "dirichlet"}, ("keys", "layout", "num_visible", "present")
        ),
        guidance=named_function("config.objective.guidance", GUIDANCE, guidance, ("model", "params", "tokens")) if guidance else None,
    )
