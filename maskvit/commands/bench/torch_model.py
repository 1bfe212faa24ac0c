"""The yardstick of the benchmark: a plain torch model of the same sizes. Needs torch, so it is imported only where that is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import torch
import torch.nn.functional as F
from torch import nn

from maskvit.core.processes import cpu_threads


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, ratio: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, round(ratio * width)), nn.Linear(round(ratio * width), width)

    def forward(self, x: Any) -> Any:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Decoder(nn.Module):
    """Cross-attention of one query per token of the output, its MLP, blocks and head."""

    def __init__(self, queries: int, values: int, context: int, width: int, depth: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.heads, hidden = heads, round(mlp_ratio * width)
        self.queries = nn.Parameter(0.02 * torch.randn(queries, width))
        self.project, self.q, self.kv = nn.Linear(context, width), nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj, self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.blocks = nn.Sequential(*(Block(width, heads, mlp_ratio) for _ in range(depth)))
        self.head = nn.Linear(width, values)

    def forward(self, encoded: Any) -> Any:
        b = encoded.shape[0]
        split = lambda x: x.reshape(b, x.shape[1], self.heads, -1).transpose(1, 2)  # noqa: E731
        k, v = self.kv(self.norms[0](self.project(encoded))).chunk(2, dim=-1)
        q = self.q(self.norms[1](self.queries.expand(b, -1, -1)))
        x = self.proj(F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).reshape(b, *self.queries.shape))
        x = x + self.fc2(F.gelu(self.fc1(self.norms[2](x))))
        return self.head(self.blocks(x))


def patch_sizes(model: Any) -> list[int]:
    """Values per embedded patch of every input."""
    specs = [model.modality(name) for name in model.inputs]
    return [spec.patch_pixels**2 * (spec.embed_dim if spec.kind == "categorical" else spec.channels) for spec in specs]


class Model(nn.Module):
    """Patch projections, encoder and decoders; returns the loss."""

    def __init__(self, objective: Any) -> None:
        super().__init__()
        self.objective = objective
        model, encoder, decoder = objective.model, dict(objective.model.encoder), dict(objective.model.decoder)
        ratios = {"mlp_ratio": decoder.get("mlp_ratio", 4.0)}
        self.embeds = nn.ModuleList(nn.Linear(size, model.width) for size in patch_sizes(model))
        self.global_tokens = nn.Parameter(torch.zeros(1, model.num_global_tokens, model.width))
        self.encoder = nn.Sequential(
            *(Block(model.width, encoder["heads"], encoder.get("mlp_ratio", 4.0)) for _ in range(encoder["depth"]))
        )
        shapes = {output: model.modality(output).grid(model.image_size) for output in model.outputs}
        self.decoders = nn.ModuleDict(
            {
                output: Decoder(rows * columns, model.modality(output).values_per_token, model.width, **{**ratios, **decoder})
                for output, (rows, columns) in shapes.items()
            }
        )

    def forward(self, patches: list[Any], targets: dict[str, Any]) -> Any:
        tokens = torch.cat([embed(x) for embed, x in zip(self.embeds, patches, strict=True)], dim=1)[:, : self.objective.num_visible]
        encoded = self.encoder(torch.cat([tokens, self.global_tokens.expand(len(tokens), -1, -1)], dim=1))
        total = torch.zeros((), device=encoded.device)
        for output, head in self.decoders.items():
            prediction, spec = head(encoded).float(), self.objective.model.modality(output)
            if spec.kind == "categorical":
                total = total + F.cross_entropy(prediction.reshape(-1, spec.num_classes), targets[output].reshape(-1))
            else:
                total = total + F.mse_loss(prediction, targets[output])
        return total


def torch_device() -> Any:
    """Where torch computes: on CUDA where JAX runs on a GPU, with its settings there, else on as many cores as JAX has."""
    if jax.devices()[0].platform == "gpu" and torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True  # JAX's default on these devices too
        return torch.device("cuda")
    torch.set_num_threads(cpu_threads())
    return torch.device("cpu")


def torch_step(objective: Any, batch: int, dtype: str) -> Callable[[], None]:
    """One training step of a plain torch model of the same sizes: forward, backward, AdamW; on CUDA where JAX runs on a GPU.

    The yardstick of this benchmark, not a port: embedded patches of all modalities of which the first `num_visible` count
    as visible, the encoder with `scaled_dot_product_attention`, a decoder per output, squared errors (cross-entropy for
    classes) over all tokens. What it leaves out (drawing masks, gathering, normalizing targets) is to its advantage.
    """
    model, sizes = objective.model, patch_sizes(objective.model)
    device = torch_device()
    net = Model(objective).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    patches = [torch.randn(batch, n, size, device=device) for n, size in zip(model.layout.sizes, sizes, strict=True)]
    targets = {}
    for output in model.outputs:
        spec = model.modality(output)
        n = spec.grid(model.image_size)[0] * spec.grid(model.image_size)[1]
        if spec.kind == "categorical":
            targets[output] = torch.randint(spec.num_classes, (batch, n, spec.patch_pixels**2), device=device)
        else:
            targets[output] = torch.randn(batch, n, spec.values_per_token, device=device)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = net(patches, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run
