"""Multi-head attention: plain, or fused into one kernel where the device has one that is faster."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from maskvit.nn.layers import Dense, xavier_uniform
from maskvit.sharding import by_tensor_group, on_own_samples, split_over_tensor, tensor_devices


def split_heads(x: Float[Array, "b n d"], heads: int) -> Float[Array, "b a n e"]:
    """Head h owns channels h*e ... h*e + e - 1."""
    b, n, d = x.shape
    return x.reshape(b, n, heads, d // heads).transpose(0, 2, 1, 3)


def attention_weights(
    q: Float[Array, "b a q e"], k: Float[Array, "b a n e"], mask: Bool[Array, "b n"] | None = None
) -> Float[Array, "b a q n"]:
    """Softmax over keys of q k^T / sqrt(e), in float32. `mask` True where a key may be attended to."""
    if q.shape[1] % tensor_devices() == 0:  # a probe's pooling may have a single head
        q, k = (split_over_tensor(x, 1) for x in (q, k))
    # The scale goes onto the queries: on the logits XLA's CPU backend is slower (2.6 times, for heads of width 32 on 196 tokens).
    logits = jnp.einsum("baqe,bane->baqn", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)


# What computes attention: "plain" is matrix products and a softmax, of any shape and on any device; "cudnn" cuDNN's fused kernel, of
# GPUs; "splash" the one that JAX ships for TPUs.
KERNELS = ("plain", "cudnn", "splash")

# By compiled programs for a v5e of ViT-B in bfloat16, splash attention takes longer than plain attention at 99 tokens (whose weights
# stay on the chip), as long at 197, and 0.6 of it at 589. Heads narrower than 64 fill too little of the tiles that lie in memory.
SPLASH_TOKENS, SPLASH_WIDTH = 256, 64
# Rows and columns of its blocks come in multiples of this, and at most so many fit on the chip in the backward pass.
_SPLASH_LANES, _SPLASH_BLOCK = 128, 768


def attention_kernel(wanted: str, compute_dtype: str) -> str:
    """One of `KERNELS` for `config.objective.attention`: "auto" is `fitting_kernel` of the devices that there are.

    Raises ValueError for an unknown name, or for a fused kernel in float32.
    """
    if wanted not in ("auto", *KERNELS):
        raise ValueError(f"config.objective.attention is {wanted!r}; known: auto, {', '.join(KERNELS)}")
    if wanted not in ("auto", "plain") and compute_dtype != "bfloat16":
        needs = "which is for compute_dtype 'bfloat16'"
        raise ValueError(f"config.objective.attention is {wanted!r}, {needs}, not {compute_dtype!r}: use 'auto'")
    if wanted != "auto":
        return wanted
    return fitting_kernel(jax.default_backend(), getattr(jax.local_devices()[0], "compute_capability", None), compute_dtype)


def fitting_kernel(platform: str, capability: float | str | None, compute_dtype: str) -> str:
    """The fused kernel of a device in bfloat16, else "plain": splash on TPUs, cuDNN's on GPUs of compute capability 9 and more.

    On older GPUs cuDNN's is reported to be slower than plain attention at the lengths of ViTs.
    """
    if compute_dtype != "bfloat16":
        return "plain"
    if platform == "tpu":
        return "splash"
    return "cudnn" if platform == "gpu" and float(capability or 0) >= 9 else "plain"


def kernel_at(kernel: str, keys: int, width: int) -> str:
    """What computes attention over so many keys with heads that wide: splash attention is for many, and for wide ones.

    And for what a device does by itself, which is all of a training step but the guidance's own learning: the compiler cannot divide
    such a kernel among devices.
    """
    fits = keys >= SPLASH_TOKENS and width >= SPLASH_WIDTH and on_own_samples()
    return "plain" if kernel == "splash" and not fits else kernel


def kernel_in_words(kernel: str) -> str:
    """The kernel's name, and where another computes in its place."""
    return f"splash; plain below {SPLASH_TOKENS} keys and for heads narrower than {SPLASH_WIDTH}" if kernel == "splash" else kernel


def evened(x: Float[Array, "b n d"], kernel: str) -> tuple[Float[Array, "b e d"], Int[Array, " b"] | None]:
    """The tokens, with one of zeros behind them where cuDNN computes and their number is odd, and then their true number.

    Done once in front of a stack of blocks: in every block it would be a copy of queries, keys and values and of their gradients.
    """
    b, n, _ = x.shape
    if kernel != "cudnn" or n % 2 == 0:
        return x, None
    return jnp.pad(x, ((0, 0), (0, 1), (0, 0))), jnp.full((b,), n, jnp.int32)


def fused_attend(
    q: Float[Array, "b q d"],
    k: Float[Array, "b n d"],
    v: Float[Array, "b n d"],
    heads: int,
    queries: Int[Array, " b"] | None = None,
    keys: Int[Array, " b"] | None = None,
    implementation: Any = "cudnn",
) -> Float[Array, "b q d"]:
    """What `attend` gives without a mask, by JAX's fused attention: logits and weights never leave the processor's own memory.

    `queries`, `keys`: how many tokens of each sample there are, where not all (`evened`); what lies behind them is not attended to,
    and comes out as zeros with gradients of zero. Heads stay where the projection has put them, beside the tokens: nothing is
    transposed.
    """
    width = q.shape[2] // heads
    whole = lambda x: jnp.full((x.shape[0],), x.shape[1], jnp.int32)  # noqa: E731
    if queries is not None or keys is not None:  # one alone is not enough
        queries = whole(q) if queries is None else queries
        keys = whole(k) if keys is None else keys

    def of_heads(q: Array, k: Array, v: Array, queries: Any, keys: Any) -> Array:
        split = (x.reshape(*x.shape[:2], -1, width) for x in (q, k, v))
        lengths: dict[str, Any] = dict(query_seq_lengths=queries, key_value_seq_lengths=keys)
        return jax.nn.dot_product_attention(*split, **lengths, implementation=implementation).reshape(q.shape)

    return by_tensor_group(of_heads, (q, k, v), (queries, keys))


def _blocks(tokens: int) -> tuple[int, int]:
    """(Tokens with padding, tokens of a block) of splash attention: as few blocks as fit on the chip, of as few tokens as hold all."""
    count = -(-tokens // _SPLASH_BLOCK)
    block = -(-tokens // (count * _SPLASH_LANES)) * _SPLASH_LANES
    return count * block, block


def splash_attend(
    q: Float[Array, "b q d"],
    k: Float[Array, "b n d"],
    v: Float[Array, "b n d"],
    heads: int,
    mask: Bool[Array, "b n"] | None = None,
    interpret: bool = False,
) -> Float[Array, "b q d"]:
    """What `attend` gives, by the attention kernel that JAX ships for TPUs: logits and weights stay on the chip.

    `interpret`: by JAX's interpreter of such kernels, on any device; slow.
    """
    # Loaded where it is used: it takes a second, and there is none of it in a run on another device.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    (rows, row_block), (columns, column_block) = _blocks(q.shape[1]), _blocks(k.shape[1])
    width = q.shape[2] // heads
    sizes = splash_attention_kernel.BlockSizes(
        block_q=row_block, block_kv=column_block, block_kv_compute=column_block, block_q_dkv=row_block, block_kv_dkv=column_block,
        block_kv_dkv_compute=column_block, use_fused_bwd_kernel=True,
    )  # fmt: skip
    there = jnp.ones(k.shape[:2], bool) if mask is None else mask
    absent = jnp.pad(~there, ((0, 0), (0, columns - k.shape[1])), constant_values=True).astype(jnp.int32)

    def of_heads(q: Array, k: Array, v: Array, absent: Array) -> Array:
        parts = q.shape[2] // width
        everywhere = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((rows, columns))] * parts)
        kernel = splash_attention_kernel.make_splash_mha_single_device(everywhere, block_sizes=sizes, interpret=interpret)
        padded = (jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0))) for x, length in ((q, rows), (k, columns), (v, columns)))
        queries, keys, values = (split_heads(x, parts) for x in padded)

        def of_sample(q: Array, k: Array, v: Array, absent: Array) -> Array:
            segments = splash_attention_kernel.SegmentIds(q=jnp.zeros((rows,), jnp.int32), kv=absent)
            return kernel(q, k, v, segment_ids=segments)

        out = jax.vmap(of_sample)(queries * width**-0.5, keys, values, absent)
        return out.transpose(0, 2, 1, 3).reshape(q.shape[0], rows, -1)[:, : q.shape[1]].astype(v.dtype)

    return by_tensor_group(of_heads, (q, k, v), (absent,))


def attend(
    q: Float[Array, "b q d"],
    k: Float[Array, "b n d"],
    v: Float[Array, "b n d"],
    heads: int,
    mask: Bool[Array, "b n"] | None = None,
    kernel: str = "plain",
    queries: Int[Array, " b"] | None = None,
    keys: Int[Array, " b"] | None = None,
) -> Float[Array, "b q d"]:
    """Multi-head attention on projected tokens; `mask` as in `attention_weights`.

    `kernel`: one of `KERNELS`. With a mask cuDNN's gives way to the plain one: it would take the mask as a bias of full size. `queries`,
    `keys`: as in `fused_attend`, where the caller has made their numbers even.
    """
    q, k, v = (split_over_tensor(x, 2, heads) for x in (q, k, v))
    if kernel_at(kernel, k.shape[1], k.shape[2] // heads) == "splash":
        return splash_attend(q, k, v, heads, mask)
    if kernel == "cudnn" and mask is None:
        n = q.shape[1]
        if n % 2:
            q, queries = evened(q, kernel)
        if k.shape[1] % 2:
            (k, keys), (v, _) = evened(k, kernel), evened(v, kernel)
        return fused_attend(q, k, v, heads, queries, keys)[:, :n]
    weights = attention_weights(split_heads(q, heads), split_heads(k, heads), mask)
    out = jnp.einsum("baqn,bane->baqe", weights.astype(v.dtype), split_heads(v, heads))
    b, a, n, e = out.shape
    return out.transpose(0, 2, 1, 3).reshape(b, n, a * e)


class SelfAttention(nn.Module):
    """Fused q | k | v projection (initialized as `qkv_parts` kernels), attention by `kernel`, output projection."""

    width: int
    heads: int
    dtype: Any = jnp.float32
    qkv_parts: int = 3
    kernel: str = "plain"

    def setup(self) -> None:
        self.qkv = Dense(3 * self.width, self.dtype, xavier_uniform(parts=self.qkv_parts), parts=self.heads)
        self.proj = Dense(self.width, self.dtype)

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None, length: Int[Array, " b"] | None = None
    ) -> Float[Array, "b n d"]:
        """`length`: how many of the tokens there are, where not all (`evened`)."""
        q, k, v = self._projected(x)
        return self.proj(attend(q, k, v, self.heads, mask, self.kernel, length, length))

    def _projected(self, x: Float[Array, "b n d"]) -> list[Float[Array, "b n d"]]:
        """Queries, keys, values."""
        if kernel_at(self.kernel, x.shape[1], self.width // self.heads) == "plain" and tensor_devices() == 1:
            return jnp.split(self.qkv(x), 3, axis=-1)
        # A fused kernel wants each by itself: three products write them there, where one would be cut up by a copy. And heads are
        # dealt out of each.
        return [self.qkv(x, columns=slice(i * self.width, (i + 1) * self.width)) for i in range(3)]

    def with_weights(
        self, x: Float[Array, "b n d"], queries: slice, mask: Bool[Array, "b n"] | None = None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b a q n"]]:
        """What calling it gives, and the softmax attention of the tokens in `queries`, off one projection."""
        q, k, v = self._projected(x)
        weights = attention_weights(split_heads(q[:, queries], self.heads), split_heads(k, self.heads), mask)
        return self.proj(attend(q, k, v, self.heads, mask, self.kernel)), weights

    def weights(self, x: Float[Array, "b n d"], queries: slice, mask: Bool[Array, "b n"] | None = None) -> Float[Array, "b a q n"]:
        """The softmax attention of the tokens in `queries` over all tokens; values and projection are not computed."""
        q = self.qkv(x[:, queries], columns=slice(0, self.width))
        k = self.qkv(x, columns=slice(self.width, 2 * self.width))
        return attention_weights(split_heads(q, self.heads), split_heads(k, self.heads), mask)

    def key_features(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """The keys, heads side by side; nothing else is computed."""
        return self.qkv(x, columns=slice(self.width, 2 * self.width))


class CrossAttention(nn.Module):
    """Attention of queries over a context by `kernel`; fused k | v projection, initialized as `kv_parts` kernels."""

    width: int
    heads: int
    dtype: Any = jnp.float32
    kv_parts: int = 2
    kernel: str = "plain"

    @nn.compact
    def __call__(
        self, queries: Float[Array, "b q d"], context: Float[Array, "b v w"], mask: Bool[Array, "b v"] | None = None
    ) -> Float[Array, "b q d"]:
        q = Dense(self.width, self.dtype, parts=self.heads, name="q")(queries)
        length = None
        if mask is None:
            context, length = evened(context, self.kernel)
        kv = Dense(2 * self.width, self.dtype, xavier_uniform(parts=self.kv_parts), parts=self.heads, name="kv")
        if kernel_at(self.kernel, context.shape[1], self.width // self.heads) == "plain" and tensor_devices() == 1:
            k, v = jnp.split(kv(context), 2, axis=-1)
        else:  # each by itself, as in `SelfAttention`
            k, v = (kv(context, columns=slice(i * self.width, (i + 1) * self.width)) for i in range(2))
        return Dense(self.width, self.dtype, name="proj")(attend(q, k, v, self.heads, mask, self.kernel, keys=length))
