"""Grad-CAM: where a classifier finds its class, from the gradient of that class's score.

Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", 2017.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maskvit.core.types import Params, TokenBatch
from maskvit.heads.network import Network
from maskvit.nn.encoder import Block
from maskvit.nn.layers import apply, layer_norm
from maskvit.nn.resnet import ResNet


def class_activation(
    activation: Float[Array, "b gh gw c"],
    logits: Callable[[Float[Array, "b gh gw c"]], Float[Array, "b k"]],
    classes: Int[Array, " b"] | None = None,
) -> Float[Array, "b gh gw"]:
    """ReLU of the channels' sum, each weighted by the mean over places of the class score's gradient; the largest is 1.

    `classes`: the predicted ones where None. All 0 where nothing speaks for the class.
    """

    def score(activation: Float[Array, "b gh gw c"]) -> Float[Array, ""]:
        scores = logits(activation)
        chosen = jnp.argmax(scores, axis=1) if classes is None else classes
        return jnp.take_along_axis(scores, chosen[:, None], axis=1).sum()

    gradient = jax.grad(score)(activation)
    maps = jax.nn.relu(jnp.einsum("bhwc,bc->bhw", activation, gradient.mean(axis=(1, 2))))
    return maps / jnp.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-30)


def resnet_gradcam(
    model: ResNet, params: Params, values: Float[Array, "b h w c"], stage: int = 4, classes: Int[Array, " b"] | None = None
) -> Float[Array, "b gh gw"]:
    """Grad-CAM behind stage 3 (14 x 14 at 224 pixels) or 4 (7 x 7); `values` as `ResNet.prepare` makes them."""
    if stage not in (3, 4):
        raise ValueError(f"Grad-CAM's stage is {stage}; known: 3, 4")
    return class_activation(model.features(params, values, stage), lambda x: model.logits(params, x, stage), classes)


def vit_gradcam(model: Network, params: Params, batch: TokenBatch, classes: Int[Array, " b"] | None = None) -> Float[Array, "b gh gw"]:
    """Grad-CAM of a fine-tuned ViT with one input, on the patch tokens behind the first norm of the last block.

    Behind the block itself the class token alone would have a gradient; before the norm a few large channels outweigh all others.
    """
    if not model.num_classes:
        raise ValueError("Grad-CAM needs a classifier, but this model's config.objective.num_classes is 0")
    if len(batch.layout.names) != 1:
        raise ValueError(f"Grad-CAM of a ViT reads one input, but this model has {', '.join(batch.layout.names)}")
    sizes = dict(model.encoder)
    last = params["encoder"][f"block_{sizes['depth'] - 1:02d}"]
    block = Block(**{key: value for key, value in sizes.items() if key != "depth"})
    _, mask = model.append_global(params, batch.tokens, batch.present)
    tokens = model.features(params, batch.tokens, (sizes["depth"] - 1,), batch.present)[0].astype(jnp.float32)
    normed = apply(layer_norm(jnp.float32), last["norm1"], tokens)
    grid, n = batch.layout.grids[0], batch.layout.num_tokens

    def logits(patches: Float[Array, "b gh gw d"]) -> Float[Array, "b k"]:
        h = jnp.concatenate([patches.reshape(patches.shape[0], n, -1), normed[:, n:]], axis=1)
        encoded = apply(block, last, tokens, h, mask, method=Block.after_norm)
        return model.logits(params, model.normed(params, encoded))

    return class_activation(normed[:, :n].reshape(normed.shape[0], *grid, -1), logits, classes)
