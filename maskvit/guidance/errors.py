"""Guidance from what the model rebuilds badly: its reconstruction error, measured or predicted."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maskvit.core.flops import decoder_flops, encoder_flops
from maskvit.core.keys import stream_keys
from maskvit.core.types import Guidance, Params, TokenLayout
from maskvit.guidance.attention import check_momentum, moving_average
from maskvit.guidance.source import Request, Source
from maskvit.heads.network import Network
from maskvit.masking.plan import show_all


def check_rebuilds_inputs(model: Network, name: str) -> None:
    """Raise unless every input is rebuilt, so that every token has an error."""
    rebuilt = {model.modality(output).name for output in model.outputs}
    missing = [modality for modality in model.inputs if modality not in rebuilt]
    if missing:
        raise ValueError(
            f"config.objective.guidance {name!r} needs an error of every input, but {missing[0]!r} is not in config.objective.outputs"
        )


def fill_with_mean(errors: Float[Array, "b n"], layout: TokenLayout) -> Float[Array, "b n"]:
    """NaN (no error taken) replaced by the mean of the modality's other tokens in the same sample, 0 where there is none."""
    parts = []
    for span in layout.spans():
        here = errors[:, span]
        known = ~jnp.isnan(here)
        mean = jnp.where(known, here, 0.0).sum(axis=1, keepdims=True) / jnp.maximum(known.sum(axis=1, keepdims=True), 1)
        parts.append(jnp.where(known, here, mean))
    return jnp.concatenate(parts, axis=1)


@dataclasses.dataclass(frozen=True)
class ReconstructionError(Source):
    """The error per token of `passes` extra passes without gradient, each under a random mask of the objective's own budget.

    A token that was visible in all of them counts as average for its modality.
    """

    passes: int = 1

    def check(self, model: Network) -> None:
        check_rebuilds_inputs(model, "reconstruction_error")
        if self.passes < 1:
            raise ValueError(f"config.objective.guidance.passes is {self.passes}; it must be at least 1")

    def __call__(self, request: Request) -> Guidance:
        errors = [request.random_errors(stream_keys(request.keys, f"errors {i}")) for i in range(self.passes)]
        stacked = jnp.stack(errors)
        known = ~jnp.isnan(stacked)
        total, count = jnp.where(known, stacked, 0.0).sum(axis=0), known.sum(axis=0)
        mean = jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)
        return jax.lax.stop_gradient(fill_with_mean(mean, request.tokens.layout))

    def flops(self, model: Network, batch: int = 1) -> float:
        visible = model.layout.num_tokens // 6  # the usual share; the objective's own number is not known here
        return self.passes * (encoder_flops(model, visible) + sum(decoder_flops(model, output, visible) for output in model.outputs))


@dataclasses.dataclass(frozen=True)
class PredictedError(Source):
    """The error that a teacher (a moving average of the parameters) expects at each token of the unmasked sample.

    The objective trains a decoder per input to rank tokens by their error. Source: HPM (Wang et al., "Hard Patches Mining for
    Masked Image Modeling", 2023). `momentum`: share of the teacher that stays at each step.
    """

    momentum: float = 0.999
    predicts_errors = True

    def check(self, model: Network) -> None:
        check_rebuilds_inputs(model, "predicted_error")
        check_momentum(self.momentum)

    def init(self, model: Network, params: Params, num_records: int) -> Params:
        return jax.tree.map(jnp.array, _predicting(model, params))

    def __call__(self, request: Request) -> Guidance:
        teacher = jax.lax.stop_gradient(request.state)
        tokens = request.model.embed(teacher, request.values, request.tokens.present)
        plan = show_all(tokens.layout, tokens.tokens.shape[0], tokens.present)
        has_padding = tokens.present is not None
        # `show_all` puts the present tokens first; that order is the encoder's and the decoder's.
        visible = jnp.take_along_axis(tokens.tokens, plan.visible_ids[:, :, None], axis=1)
        memory = request.model.memory(teacher, visible, plan.visible_valid if has_padding else None)
        return predict_errors(request.model, teacher, memory, plan, tokens.layout, has_padding)

    def update(self, request: Request, step: Int[Array, ""], errors: Float[Array, "b n"] | None) -> Params:
        return moving_average(request.state, _predicting(request.model, request.params), self.momentum, request.accepted)

    def flops(self, model: Network, batch: int = 1) -> float:
        tokens = model.layout.num_tokens
        heads = [f"error_{name}" for name in model.inputs]
        student = sum(3 * decoder_flops(model, head, tokens // 6) for head in heads)
        return encoder_flops(model, tokens) + sum(decoder_flops(model, head, tokens) for head in heads) + student


def predict_errors(
    model: Network, params: Params, memory: tuple[Float[Array, "b e d"], ...], plan: Any, layout: TokenLayout, has_padding: bool
) -> Float[Array, "b n"]:
    """How hard the model expects each token of the layout to be; only the order inside a modality means something."""
    parts = [model.decode(params, f"error_{name}", memory, plan, layout, has_padding)[..., 0] for name in layout.names]
    return jnp.concatenate(parts, axis=1)


def _predicting(model: Network, params: Params) -> Params:
    heads = {f"error_{name}": params["outputs"][f"error_{name}"] for name in model.inputs}
    return {"outputs": heads, **{name: params[name] for name in ("inputs", "global_tokens", "encoder", "norm") if name in params}}
