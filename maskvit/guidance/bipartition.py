"""Guidance from the model's own grouping of tokens: the sample split in two, and how much each token belongs to the object."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maskvit.core.flops import block_flops
from maskvit.core.types import Guidance
from maskvit.guidance.source import Request, Source
from maskvit.guidance.tokencut import SQUARINGS, second_eigenvector
from maskvit.heads.network import Network


def relevance(tokens: Float[Array, "n d"], there: Bool[Array, " n"]) -> Float[Array, " n"]:
    """Cosine of each token with the mean of the object's tokens, the object being the half with the strongest node.

    Tokens are compared after their mean is taken out: what all have in common says nothing of groups. 0 for absent tokens.
    """
    weight = there.astype(jnp.float32)[:, None]
    centered = (tokens - (tokens * weight).sum(axis=0) / jnp.maximum(weight.sum(), 1.0)) * weight
    unit = centered / jnp.maximum(jnp.linalg.norm(centered, axis=1, keepdims=True), 1e-12)
    x = second_eigenvector(jnp.maximum(unit @ unit.T, 0.0)[None], there[None])[0]
    above = x > (x * weight[:, 0]).sum() / jnp.maximum(weight.sum(), 1.0)
    strongest = jnp.argmax(jnp.abs(x))
    same_half = (above == above[strongest]) & there
    center = (unit * same_half[:, None]).sum(axis=0)
    return unit @ (center / jnp.maximum(jnp.linalg.norm(center), 1e-12))


@dataclasses.dataclass(frozen=True)
class Bipartition(Source):
    """How much each token belongs to the object, by a normalized cut of the model's own tokens in each modality.

    `block`: the tokens that leave this block (negative counts from the last). With scores `attention_hint` it is the masking of
    "Self-Guided Masked Autoencoder" (Shin et al., 2024), which hides the object but for a few hints.
    """

    block: int = -1

    def check(self, model: Network) -> None:
        depth = dict(model.encoder)["depth"]
        if not -depth <= self.block < depth:
            raise ValueError(
                f"config.objective.guidance.block is {self.block}; the encoder has blocks 0 ... {depth - 1} (or -1 for the last)"
            )

    def __call__(self, request: Request) -> Guidance:
        params, batch = jax.lax.stop_gradient(request.params), request.tokens
        stop = self.block % dict(request.model.encoder)["depth"] + 1
        tokens = request.model.features(params, batch.tokens, (stop,), batch.present)[0].astype(jnp.float32)
        there = jnp.ones(batch.tokens.shape[:2], bool) if batch.present is None else batch.present
        return jnp.concatenate([jax.vmap(relevance)(tokens[:, s], there[:, s]) for s in batch.layout.spans()], axis=1)

    def flops(self, model: Network, batch: int = 1) -> float:
        sizes = dict(model.encoder)
        tokens = model.layout.num_tokens + model.num_global_tokens
        blocks = (self.block % sizes["depth"] + 1) * block_flops(tokens, sizes["width"], sizes.get("mlp_ratio", 4.0))
        cuts = sum(2 * size**2 * (sizes["width"] + SQUARINGS * size) for size in model.layout.sizes)
        return blocks + cuts
