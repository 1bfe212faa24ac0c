"""The model's own attention as guidance: one pass over all tokens, without gradient, stopping at the softmax of one block."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from maskvit.core.flops import attention_flops
from maskvit.core.keys import stream_keys
from maskvit.core.types import Guidance, Params, TokenBatch, TokenLayout
from maskvit.guidance.source import Request, Source
from maskvit.heads.network import Network
from maskvit.optim.transforms import guarded

QUERIES = ("global", "mean")
Heads = tuple[int, ...] | str | None


def self_attention(
    model: Network,
    params: Params,
    tokens: TokenBatch,
    query: str = "global",
    block: int = -1,
    heads: Heads = None,
    renormalise: bool = False,
    keys: Key[Array, " b"] | None = None,
) -> Guidance:
    """The attention that every token receives in one block.

    Args:
      query: "global" reads the global token's row, "mean" averages over all n + 1 queries (absent tokens not counted).
      block: which block; negative counts from the last.
      heads: None for the mean over all, a tuple of heads, or "random": for every sample a fresh random subset whose size is
        uniform in 1 ... heads (needs `keys`).
      renormalise: make every modality's scores add up to 1.

    The global token's own column is dropped. Source: the attention-guided MultiMAE project; which of the two rows it read is
    not published. The default is the row whose hidden tokens cover more of the objects on the demo's checkpoint (docs/measurements.md,
    "Which attention row").
    """
    frozen = jax.lax.stop_gradient(params)
    batch = TokenBatch(jax.lax.stop_gradient(tokens.tokens), tokens.layout, tokens.present)
    queries = slice(tokens.layout.num_tokens, None) if query == "global" else slice(None)
    weights = model.attention(frozen, batch, queries, block)
    return read_attention(weights, tokens.layout, tokens.present, query, heads, renormalise, keys)


def read_attention(
    weights: Float[Array, "b a q e"],
    layout: TokenLayout,
    present: Bool[Array, "b n"] | None,
    query: str = "global",
    heads: Heads = None,
    renormalise: bool = False,
    keys: Key[Array, " b"] | None = None,
) -> Guidance:
    """One number per token out of attention weights over all tokens (global tokens last); arguments as `self_attention`.

    `weights`: the rows of the global tokens for query "global", of all tokens for "mean".
    """
    if query not in QUERIES:
        raise ValueError(f"config.objective.guidance.query is {query!r}; known: {', '.join(QUERIES)}")
    n = layout.num_tokens
    if heads == "random":
        if keys is None:
            raise ValueError("heads='random' needs keys")
        chosen = random_heads(keys, weights.shape[1])
        weights = jnp.einsum("baqe,ba->bqe", weights, chosen / chosen.sum(axis=1, keepdims=True))
    else:
        weights = (weights if heads is None else weights[:, jnp.array(heads)]).mean(axis=1)
    if query == "global":
        scores = weights[:, -1, :n]
    elif present is None:
        scores = weights.mean(axis=1)[:, :n]
    else:
        counted = jnp.pad(present, ((0, 0), (0, weights.shape[1] - n)), constant_values=True).astype(weights.dtype)
        scores = (jnp.einsum("bqn,bq->bn", weights, counted) / counted.sum(axis=1, keepdims=True))[:, :n]
    return per_modality_sum_one(scores, layout, present) if renormalise else scores


def random_heads(keys: Key[Array, " b"], heads: int) -> Float[Array, "b a"]:
    """1 for the heads of a random subset, else 0: its size uniform in 1 ... heads, its members uniform."""

    def one_sample(key: Key[Array, ""]) -> Float[Array, " a"]:
        size_key, order_key = jax.random.split(stream_keys(key, "heads"))
        size = jax.random.randint(size_key, (), 1, heads + 1)
        return (jax.random.permutation(order_key, heads) < size).astype(jnp.float32)

    return jax.vmap(one_sample)(keys)


def per_modality_sum_one(scores: Float[Array, "b n"], layout: TokenLayout, present: Bool[Array, "b n"] | None) -> Float[Array, "b n"]:
    """Scores divided by their sum over the modality's present tokens."""
    counted = scores if present is None else jnp.where(present, scores, 0.0)
    parts = [counted[:, span] / jnp.maximum(counted[:, span].sum(axis=1, keepdims=True), 1e-30) for span in layout.spans()]
    return jnp.concatenate(parts, axis=1)


@dataclasses.dataclass(frozen=True)
class SelfAttention(Source):
    """`self_attention` as a source; the fields are its arguments."""

    query: str = "global"
    block: int = -1
    heads: Heads = None
    renormalise: bool = False

    def check(self, model: Network) -> None:
        sizes = dict(model.encoder)
        where = "config.objective.guidance"
        if self.query not in QUERIES:
            raise ValueError(f"{where}.query is {self.query!r}; known: {', '.join(QUERIES)}")
        if self.query == "global" and not model.num_global_tokens:
            raise ValueError(f"{where}.query is 'global', but the model has no global token: set it to 'mean'")
        if not -sizes["depth"] <= self.block < sizes["depth"]:
            raise ValueError(f"{where}.block is {self.block}; the encoder has blocks 0 ... {sizes['depth'] - 1} (or -1 for the last)")
        if isinstance(self.heads, str):
            if self.heads != "random":
                raise ValueError(f"{where}.heads is {self.heads!r}; give None (all), 'random' or numbers of heads")
        elif self.heads is not None:
            wrong = [head for head in self.heads if not 0 <= head < sizes["heads"]]
            if wrong or not self.heads:
                raise ValueError(f"{where}.heads is {self.heads}; the encoder has heads 0 ... {sizes['heads'] - 1}")

    @property
    def reading(self) -> dict[str, Any]:
        """The arguments of `read_attention`."""
        return dict(query=self.query, heads=self.heads, renormalise=self.renormalise)

    def __call__(self, request: Request) -> Guidance:
        return self_attention(request.model, request.params, request.tokens, block=self.block, keys=request.keys, **self.reading)

    def flops(self, model: Network, batch: int = 1) -> float:
        return attention_flops(model, self.block, self.query == "global")


@dataclasses.dataclass(frozen=True)
class TeacherAttention(SelfAttention):
    """The attention of a teacher: a moving average of the parameters, read as `self_attention` reads the model's own.

    `momentum`: share of the teacher that stays at each step.
    """

    momentum: float = 0.996

    def check(self, model: Network) -> None:
        super().check(model)
        check_momentum(self.momentum)

    def init(self, model: Network, params: Params, num_records: int) -> Params:
        return jax.tree.map(jnp.array, encoder_params(params))

    def __call__(self, request: Request) -> Guidance:
        tokens = request.model.embed(request.state, request.values, request.tokens.present)
        return super().__call__(request._replace(params=request.state, tokens=tokens))

    def update(self, request: Request, step: Int[Array, ""], errors: Float[Array, "b n"] | None) -> Params:
        return moving_average(request.state, encoder_params(request.params), self.momentum, request.accepted)


def check_momentum(momentum: float) -> None:
    """Raise unless it is a share of what stays."""
    if not 0 <= momentum < 1:
        raise ValueError(f"config.objective.guidance.momentum is {momentum}; it must be at least 0 and below 1")


def encoder_params(params: Params) -> Params:
    """What a teacher needs to embed and encode."""
    return {name: params[name] for name in ("inputs", "global_tokens", "global_pos_embed", "encoder") if name in params}


def moving_average(average: Any, new: Any, momentum: float, accepted: Bool[Array, ""] | bool = True) -> Any:
    """momentum * average + (1 - momentum) * new, leaf by leaf, where a step is accepted; else the average as it was."""
    return guarded(accepted, jax.tree.map(lambda old, x: momentum * old + (1 - momentum) * x, average, new), average)
