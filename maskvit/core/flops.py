"""The arithmetic of a model, counted from its sizes: 2 FLOP per multiply-add of every matrix product, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def block_flops(tokens: int, width: int, mlp_ratio: float = 4.0) -> float:
    """One forward transformer block: projections (4 width^2), MLP (2 mlp_ratio width^2), attention over all pairs."""
    return 2 * tokens * (4 + 2 * mlp_ratio) * width**2 + 4 * tokens**2 * width


def embed_flops(model: Any) -> float:
    """All input adapters, forward."""
    specs = [model.modality(name) for name in model.inputs]
    values = [s.patch_pixels**2 * (s.embed_dim if s.kind == "categorical" else s.channels) for s in specs]
    return sum(2 * size * value * model.width for size, value in zip(model.layout.sizes, values, strict=True))


def encoder_flops(model: Any, tokens: int) -> float:
    """The encoder on `tokens` tokens and the global ones, forward."""
    sizes = dict(model.encoder)
    ratio = sizes.get("mlp_ratio", 4.0)
    return sizes["depth"] * block_flops(tokens + model.num_global_tokens, sizes["width"], ratio)


def decoder_flops(model: Any, output: str, num_visible: int, num_queries: int | None = None) -> float:
    """One output's decoder, forward; `num_queries` tokens of it where the decoder can leave the others out, by default all."""
    sizes, spec = dict(model.decoder), model.modality(output)
    width, depth, ratio = sizes["width"], sizes["depth"], sizes.get("mlp_ratio", 4.0)
    rows, columns = spec.grid(model.image_size)
    queries, context = rows * columns, num_visible + model.num_global_tokens
    if model.decoder_name == "crossmae":
        queries = queries if num_queries is None else num_queries
        block = 2 * 2 * queries * width**2 + 2 * 2 * context * model.width * width + 4 * queries * context * width  # cross-attention
        block += 2 * queries * 2 * ratio * width**2  # its MLP
        if sizes.get("self_attention"):
            block += 2 * queries * 4 * width**2 + 4 * queries**2 * width
        features = len(sizes["features"]) if sizes.get("weighted", True) else 0
        mixing = 2 * features * context * model.width
        return depth * (block + mixing) + 2 * queries * width * spec.values_per_token
    flops = 2 * context * model.width * width  # to the decoder's width
    if model.decoder_name == "mae":
        tokens = model.layout.num_tokens + model.num_global_tokens + (0 if spec.name in model.inputs else queries)
        return flops + depth * block_flops(tokens, width, ratio) + 2 * queries * width * spec.values_per_token
    flops += 2 * (2 * queries + 2 * context) * width**2 + 4 * queries * context * width  # cross-attention
    flops += 2 * queries * 2 * ratio * width**2  # its MLP
    flops += depth * block_flops(queries, width, ratio)
    return flops + 2 * queries * width * spec.values_per_token


def forward_flops(model: Any, num_visible: int, num_queries: Mapping[str, int] | None = None) -> float:
    """One image through the masked forward pass: embedding, encoder on the visible tokens, all decoders."""
    decoders = sum(decoder_flops(model, output, num_visible, (num_queries or {}).get(output)) for output in model.outputs)
    return embed_flops(model) + encoder_flops(model, num_visible) + decoders


def attention_flops(model: Any, block: int = -1, global_row: bool = False, tokens: int | None = None) -> float:
    """One image through the encoder up to the softmax of one block: all blocks before it, its queries, keys and their product.

    `global_row`: only the global tokens are queries. `tokens`: how many tokens take part, by default all of the layout.
    """
    sizes = dict(model.encoder)
    total = (model.layout.num_tokens if tokens is None else tokens) + model.num_global_tokens
    queries = model.num_global_tokens if global_row else total
    last = 2 * (queries + total) * sizes["width"] ** 2 + 2 * queries * total * sizes["width"]
    return (block % sizes["depth"]) * block_flops(total, sizes["width"], sizes.get("mlp_ratio", 4.0)) + last


def projection_flops(model: Any, tokens: int) -> float:
    """The head of self-distillation on `tokens` tokens, forward."""
    sizes = dict(model.projection)
    hidden, bottleneck = sizes["hidden"], sizes["bottleneck"]
    return 2 * tokens * (model.width * hidden + hidden**2 + hidden * bottleneck + bottleneck * sizes["num_prototypes"])
