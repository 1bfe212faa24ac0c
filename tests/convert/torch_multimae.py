"""A small MultiMAE in torch with the names and call of the public code, written for these tests: what --verify compares with.

Its predictions and losses for all inputs are those recorded from the public code (tests/fixtures/multimae_tiny.npz).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, crossed: bool = False):
        super().__init__()
        self.heads = heads
        if crossed:
            self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, context=None):
        q, k, v = self.qkv(x).chunk(3, -1) if context is None else (self.q(x), *self.kv(context).chunk(2, -1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, ratio: float):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, round(width * ratio)), nn.Linear(round(width * ratio), width)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, ratio: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn, self.mlp = Attention(width, heads), Mlp(width, ratio)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchedInputAdapter(nn.Module):
    def __init__(self, num_channels, stride_level, patch_size_full, image_size):
        super().__init__()
        self.channels, self.side = num_channels, patch_size_full // stride_level
        self.grid = tuple(side // patch_size_full for side in image_size)

    def init(self, width):
        self.pos_emb = nn.Parameter(torch.zeros(1, width, *self.grid))
        self.proj = nn.Conv2d(self.channels, width, self.side, self.side)

    def forward(self, x):
        return (self.proj(x) + self.pos_emb).flatten(2).transpose(1, 2)


class SemSegInputAdapter(PatchedInputAdapter):
    def __init__(self, num_classes, dim_class_emb, **common):
        super().__init__(dim_class_emb, **common)
        self.class_emb = nn.Embedding(num_classes, dim_class_emb)

    def forward(self, x):
        return super().forward(self.class_emb(x).permute(0, 3, 1, 2))


class SpatialOutputAdapter(nn.Module):
    def __init__(
        self, num_channels, stride_level, patch_size_full, dim_tokens, depth, num_heads, mlp_ratio, image_size, task, context_tasks
    ):
        super().__init__()
        self.task, self.side, self.channels = task, patch_size_full // stride_level, num_channels
        self.grid = tuple(side // patch_size_full for side in image_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim_tokens))
        self.pos_emb = nn.Parameter(torch.zeros(1, dim_tokens, *self.grid))
        self.task_embeddings = nn.ParameterDict({name: nn.Parameter(torch.zeros(1, 1, dim_tokens)) for name in context_tasks})
        self.decoder = Attention(dim_tokens, num_heads, crossed=True)
        self.context_norm, self.query_norm, self.out_norm = (nn.LayerNorm(dim_tokens, 1e-6) for _ in range(3))
        self.mlp = Mlp(dim_tokens, mlp_ratio)
        self.decoder_transformer = nn.Sequential(*(Block(dim_tokens, num_heads, mlp_ratio) for _ in range(depth)))
        self.out_proj = nn.Linear(dim_tokens, num_channels * self.side**2)

    def init(self, width):
        self.proj_context = nn.Linear(width, self.mask_token.shape[-1])

    def forward(self, encoded, sizes, keep, restore):
        count = keep.shape[1]
        projected = self.proj_context(encoded)
        visible, others = projected[:, :count], projected[:, count:]
        positions = self.pos_emb.flatten(2).transpose(1, 2)
        places = {name: positions + self.task_embeddings[name] for name in sizes}
        place = torch.cat(list(places.values()), 1)
        hidden = self.mask_token.expand(1, restore.shape[1] - count, -1)
        whole = torch.cat([visible, hidden], 1)[:, restore[0]] + place
        context = torch.cat([visible + place[:, keep[0]], others], 1)
        if self.task in sizes:
            names = list(sizes)
            start = sum(sizes[name] for name in names[: names.index(self.task)])
            queries = whole[:, start : start + sizes[self.task]]
        else:
            queries = self.mask_token + positions + self.task_embeddings[self.task]
        x = self.decoder(self.query_norm(queries), self.context_norm(context))
        x = self.decoder_transformer(x + self.mlp(self.out_norm(x)))
        cut = self.out_proj(x).reshape(1, *self.grid, self.channels, self.side, self.side)
        return cut.permute(0, 3, 1, 4, 2, 5).reshape(1, self.channels, *(side * self.side for side in self.grid))


class MultiMAE(nn.Module):
    def __init__(self, input_adapters, output_adapters, num_global_tokens, dim_tokens, depth, num_heads, mlp_ratio):
        super().__init__()
        for adapter in (*input_adapters.values(), *output_adapters.values()):
            adapter.init(dim_tokens)
        self.input_adapters, self.output_adapters = nn.ModuleDict(input_adapters), nn.ModuleDict(output_adapters)
        self.global_tokens = nn.Parameter(torch.zeros(1, num_global_tokens, dim_tokens))
        self.encoder = nn.Sequential(*(Block(dim_tokens, num_heads, mlp_ratio) for _ in range(depth)))

    def forward(self, x, mask_inputs, task_masks, num_encoded_tokens):
        tokens = {name: self.input_adapters[name](value) for name, value in x.items()}
        masked = torch.cat([task_masks[name] for name in tokens], 1)
        order = torch.argsort(masked, dim=1, stable=True)
        keep, restore = order[:, : int((masked == 0).sum())], order.argsort(1)
        assert mask_inputs and keep.shape[1] == num_encoded_tokens
        visible = torch.cat(list(tokens.values()), 1)[:, keep[0]]
        encoded = self.encoder(torch.cat([visible, self.global_tokens], 1))
        sizes = {name: value.shape[1] for name, value in tokens.items()}
        return {name: adapter(encoded, sizes, keep, restore) for name, adapter in self.output_adapters.items()}, task_masks


class _MaskedLoss:
    def __init__(self, patch_size, stride, norm_pix=False):
        self.side, self.norm_pix = patch_size // stride, norm_pix

    def __call__(self, predicted, target, mask=None):
        if self.norm_pix:
            patches = target.unfold(2, self.side, self.side).unfold(3, self.side, self.side)  # b c h w p q
            patches = patches.permute(0, 2, 3, 1, 4, 5)
            flat = patches.flatten(3)
            flat = (flat - flat.mean(-1, keepdim=True)) / torch.sqrt(flat.var(-1, keepdim=True) + 1e-6)
            target = flat.reshape(patches.shape).permute(0, 3, 1, 4, 2, 5).reshape(target.shape)
        loss = self.of_pixels(predicted, target)
        if mask is None:
            return loss.mean()
        grid = tuple(side // self.side for side in loss.shape[1:])
        mask = mask.reshape(1, *grid).repeat_interleave(self.side, 1).repeat_interleave(self.side, 2)
        return (loss * mask).sum() / mask.sum()


class MaskedMSELoss(_MaskedLoss):
    def of_pixels(self, predicted, target):
        return ((predicted - target) ** 2).mean(1)


class MaskedL1Loss(_MaskedLoss):
    def of_pixels(self, predicted, target):
        return (predicted - target).abs().mean(1)


class MaskedCrossEntropyLoss(_MaskedLoss):
    def of_pixels(self, predicted, target):
        return functional.cross_entropy(predicted, target, reduction="none")
