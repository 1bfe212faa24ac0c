"""What self-distillation adds to an encoder: the projection head with its prototypes, and initial values of its own.

Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO), 2021; Zhou et al., "iBOT", 2022.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from maskvit.core.keys import stream_keys
from maskvit.core.types import Params, path_name
from maskvit.nn.layers import Dense, uniform_by_fan_in


class Prototypes(nn.Module):
    """A linear layer without bias whose columns have a length of their own: kernel / |kernel| * scale (weight normalization).

    `kernel` (in, out) and `scale` (out,); a fixed scale gets no gradient. float32.
    """

    features: int
    fixed_scale: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        kernel = self.param("kernel", uniform_by_fan_in(x.shape[-1]), (x.shape[-1], self.features), jnp.float32)
        scale = self.param("scale", nn.initializers.ones_init(), (self.features,), jnp.float32)
        if self.fixed_scale:
            scale = jax.lax.stop_gradient(scale)
        length = jnp.sqrt(jnp.square(kernel).sum(axis=0))
        flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32) @ (kernel * (scale / length))
        return flat.reshape(*x.shape[:-1], self.features)


class Projection(nn.Module):
    """Three linear layers with GELU, L2 normalization, prototypes: those of the class token, and those of the patches.

    Attributes:
      hidden, bottleneck: widths of the layers.
      num_prototypes: how many.
      num_patch_prototypes: how many the patches have of their own; 0: they share those of the class token.
      fixed_scale: whether the prototypes' lengths stay 1 ("norm_last_layer").
    """

    hidden: int
    bottleneck: int
    num_prototypes: int
    num_patch_prototypes: int = 0
    fixed_scale: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        normal = nn.initializers.normal(0.02)
        self.fc1 = Dense(self.hidden, self.dtype, normal)
        self.fc2 = Dense(self.hidden, self.dtype, normal)
        self.fc3 = Dense(self.bottleneck, self.dtype, normal)
        self.prototypes = Prototypes(self.num_prototypes, self.fixed_scale)
        if self.num_patch_prototypes:
            self.patch_prototypes = Prototypes(self.num_patch_prototypes, self.fixed_scale)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b k"]:
        """Logits of class tokens."""
        return self.prototypes(self.bottlenecked(x))

    def patches(self, x: Float[Array, "*b d"]) -> Float[Array, "*b k"]:
        """Logits of patch tokens."""
        return (self.patch_prototypes if self.num_patch_prototypes else self.prototypes)(self.bottlenecked(x))

    def all(self, x: Float[Array, "*b d"]) -> Any:
        """Both, so that every parameter is made."""
        return self(x), self.patches(x)

    def bottlenecked(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        """Up to the normalized bottleneck, float32."""
        x = jax.nn.gelu(self.fc1(x), approximate=False)
        x = jax.nn.gelu(self.fc2(x), approximate=False)
        x = self.fc3(x).astype(jnp.float32)
        return x / jnp.maximum(jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True)), 1e-12)


# Where this family differs from MultiMAE's initial values, first match wins: DINO draws every linear layer from a normal of
# deviation 0.02 (its truncation at 2 is a hundred deviations away) and leaves the patch projection as PyTorch makes a convolution.
INITIAL_VALUES = (
    (r"inputs/\w+/proj/kernel", lambda key, shape: uniform_by_fan_in(shape[0])(key, shape)),
    (r"encoder/.*/kernel", nn.initializers.normal(0.02)),
)


def redraw(params: Params, key: Key[Array, ""]) -> Params:
    """Parameters with the values of `INITIAL_VALUES` in place of their own."""

    def one(path: Any, value: Array) -> Array:
        name = path_name(path)
        initial = next((initial for pattern, initial in INITIAL_VALUES if re.fullmatch(pattern, name)), None)
        return value if initial is None else initial(stream_keys(key, name), value.shape)

    return jax.tree_util.tree_map_with_path(one, params)
