"""TokenCut: the object as one side of a normalized cut through the graph of similar patches.

Source: Wang et al., "Self-Supervised Transformers for Unsupervised Object Discovery using Normalized Cut", 2022. `exact_cut` is
the reference in float64 on the host, one picture at a time; `cut` does whole batches on the device in float32. They agree but
where float32 puts a cosine on the other side of tau or ties decide.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from maskvit.core.types import Params, TokenBatch
from maskvit.heads.network import Network
from maskvit.losses.weights import unit_range

FEATURES = ("keys", "keys_without_bias", "tokens")
GRAPHS = ("binary", "cosine")
VALUES = ("mask", "eigenvector")
SQUARINGS = 16  # eigenvalues of the walk that differ by a ten-thousandth are told apart, which is about what float32 can


class Cut(NamedTuple):
    """`mask`: the connected part with the seed; `eigenvector`: second smallest, its sign such that the object is positive.

    Arrays of the host without, of the device with a leading batch axis. x^T D x = 1 with D the degrees.
    """

    mask: Bool[np.ndarray, "gh gw"] | Bool[Array, "b gh gw"]
    eigenvector: Float[np.ndarray, "gh gw"] | Float[Array, "b gh gw"]


def _check(graph: str, tau: float, eps: float) -> None:
    if graph not in GRAPHS:
        raise ValueError(f"TokenCut's graph is {graph!r}; known: {', '.join(GRAPHS)}")
    if not (0 if graph == "cosine" else -1) <= tau < 1:
        raise ValueError(f"TokenCut's tau is {tau}; it is a cosine: below 1 and at least -1, with the graph of cosines at least 0")
    if eps <= 0:
        raise ValueError(f"TokenCut's eps is {eps}; it must be positive, or the graph may fall apart")


def exact_cut(features: Float[np.ndarray, "n d"], grid: tuple[int, int], tau: float = 0.2, eps: float = 1e-5, graph: str = "binary") -> Cut:
    """TokenCut of one picture's patch features (without class token), cosines in float32, all else in float64.

    Args:
      graph: "binary" joins patches whose cosine exceeds `tau` with weight 1, all others with `eps`; "cosine" keeps the cosines
        and puts `eps` for those below `tau`.
    """
    _check(graph, tau, eps)
    features = features.astype(np.float32)
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.float32(1e-12))
    cosine = unit @ unit.T
    w = np.where(cosine > tau, 1.0, eps) if graph == "binary" else np.where(cosine < tau, eps, cosine.astype(np.float64))
    root = np.sqrt(w.sum(axis=1))
    _, vectors = np.linalg.eigh(np.eye(len(w)) - w / np.outer(root, root))
    x = vectors[:, 1] / root
    part = x > x.mean()
    seed = int(np.argmax(np.abs(x)))
    if not part[seed]:
        x, part = -x, ~part
    part = part.reshape(grid)
    mask, previous = np.zeros(grid, bool), None
    mask.flat[seed] = True
    while previous is None or (mask != previous).any():
        previous = mask
        mask = with_neighbors(mask, np) & part
    return Cut(mask, x.reshape(grid))


def cut(features: Float[Array, "b n d"], grid: tuple[int, int], tau: float = 0.2, eps: float = 1e-5, graph: str = "binary") -> Cut:
    """`exact_cut` of a batch, in float32."""
    _check(graph, tau, eps)
    features = features.astype(jnp.float32)
    unit = features / jnp.maximum(jnp.linalg.norm(features, axis=2, keepdims=True), 1e-12)
    cosine = jnp.einsum("bnd,bmd->bnm", unit, unit, precision="highest")
    w = jnp.where(cosine > tau, 1.0, eps) if graph == "binary" else jnp.where(cosine < tau, eps, cosine)
    x = second_eigenvector(w)
    part = x > x.mean(axis=1, keepdims=True)
    seed = jnp.argmax(jnp.abs(x), axis=1)
    outside = ~jnp.take_along_axis(part, seed[:, None], axis=1)
    x, part = jnp.where(outside, -x, x), jnp.where(outside, ~part, part)
    part = part.reshape(-1, *grid)
    start = (jnp.arange(w.shape[1]) == seed[:, None]).reshape(part.shape)

    def grow(masks: tuple[Array, Array]) -> tuple[Array, Array]:
        mask, _ = masks
        return with_neighbors(mask, jnp) & part, mask

    mask, _ = jax.lax.while_loop(lambda masks: (masks[0] != masks[1]).any(), grow, (start, jnp.zeros_like(start)))
    return Cut(mask, x.reshape(part.shape))


def second_eigenvector(w: Float[Array, "b n n"], there: Bool[Array, "b n"] | None = None) -> Float[Array, "b n"]:
    """The second smallest eigenvector x of (D - W) x = lambda D x, x^T D x = 1, for symmetric graphs W >= 0; its sign is arbitrary.

    `there`: the nodes that exist, by default all; 0 at the others.

    By squaring the lazy random walk's matrix, the known first eigenvector taken out, until only the next one is left: `SQUARINGS`
    products of n x n matrices stand for 2 ** SQUARINGS steps of the power method. `jnp.linalg.eigh` takes longer on accelerators,
    and on a CPU that plays several devices its LAPACK may wait for itself for ever.
    """
    lazy, degree = jnp.eye(w.shape[1]), w.sum(axis=2)
    if there is not None:
        w = jnp.where(there[:, :, None] & there[:, None, :], w, 0.0)
        lazy, degree = lazy * there[:, :, None], w.sum(axis=2)
    root = jnp.sqrt(degree)
    known = root / jnp.linalg.norm(root, axis=1, keepdims=True)
    root = root if there is None else jnp.where(degree > 0, root, 1.0)
    walk = 0.5 * (lazy + w / (root[:, :, None] * root[:, None, :])) - known[:, :, None] * known[:, None, :]

    def square(_: Any, matrix: Float[Array, "b n n"]) -> Float[Array, "b n n"]:
        product = jnp.einsum("bij,bjk->bik", matrix, matrix, precision="highest")
        return product / jnp.linalg.norm(product, axis=(1, 2), keepdims=True)

    projector = jax.lax.fori_loop(0, SQUARINGS, square, walk)
    largest = jnp.argmax(jnp.diagonal(projector, axis1=1, axis2=2), axis=1)
    y = jnp.take_along_axis(projector, largest[:, None, None], axis=1)[:, 0]
    y = y / jnp.linalg.norm(y, axis=1, keepdims=True) / root
    return y if there is None else jnp.where(jnp.isfinite(y), y, 0.0)  # a graph of one node or none has no second eigenvector


def with_neighbors(mask: Shaped[Array, "*b gh gw"] | Shaped[np.ndarray, "*b gh gw"], xp: Any) -> Any:
    """Each patch or one of its four neighbors; `xp` is numpy or jax.numpy."""
    wide = xp.pad(mask, [(0, 0)] * (mask.ndim - 2) + [(1, 1), (1, 1)])
    return mask | wide[..., :-2, 1:-1] | wide[..., 2:, 1:-1] | wide[..., 1:-1, :-2] | wide[..., 1:-1, 2:]


def as_guidance(found: Cut, value: str = "eigenvector") -> Any:
    """A cut as importance in 0 ... 1, 0 outside the object's mask; an array of the cut's own shape.

    `value`: "mask" is 1 inside; "eigenvector" the signed eigenvector, its range over the picture mapped to 0 ... 1. Which of the
    two "Attention-Guided Masked Autoencoders" (2024) stores is not published.
    """
    if value not in VALUES:
        raise ValueError(f"TokenCut's value is {value!r}; known: {', '.join(VALUES)}")
    if value == "mask":
        return found.mask * 1.0
    x = jnp.asarray(found.eigenvector)
    return found.mask * unit_range(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)


def patch_features(
    model: Network,
    params: Params,
    batch: TokenBatch,
    features: str = "keys_without_bias",
    block: int = -1,
    modality: str | None = None,
) -> tuple[Float[Array, "b n d"], tuple[int, int]]:
    """What patches of one modality (the first by default) are compared by, and their grid.

    `features`: "keys" of the block as they are (the published choice), "keys_without_bias", or the "tokens" that leave it, through
    the final norm where it is the last. The bias is in all keys alike and the softmax does not see it; but in some models it is
    so large that all cosines come near 1, and the cut of raw keys is the same noise for every picture.
    """
    if features not in FEATURES:
        raise ValueError(f"TokenCut's features are {features!r}; known: {', '.join(FEATURES)}")
    name = batch.layout.names[0] if modality is None else modality
    if name not in batch.layout.names:
        raise ValueError(f"modality {name!r} is none of the inputs {', '.join(batch.layout.names)}")
    depth = dict(model.encoder)["depth"]
    if not -depth <= block < depth:
        raise ValueError(f"block is {block}; the encoder has blocks 0 ... {depth - 1} (or -1 for the last)")
    if features == "tokens":
        found = model.features(params, batch.tokens, (block % depth + 1,), batch.present)[0]
        found = model.normed(params, found) if block % depth == depth - 1 else found
    else:
        found = model.key_features(params, batch, block, bias=features == "keys")
    return found[:, batch.layout.span(name)], batch.layout.grids[batch.layout.names.index(name)]


def tokencut_map(
    model: Network,
    params: Params,
    batch: TokenBatch,
    features: str = "keys_without_bias",
    value: str = "eigenvector",
    tau: float = 0.2,
    eps: float = 1e-5,
    graph: str = "binary",
    block: int = -1,
    modality: str | None = None,
) -> Float[Array, "b gh gw"]:
    """TokenCut of a batch as guidance in 0 ... 1; arguments as `patch_features`, `cut` and `as_guidance`."""
    found, grid = patch_features(model, params, batch, features, block, modality)
    return as_guidance(cut(found, grid, tau, eps, graph), value)
