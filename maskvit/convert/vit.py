"""Plain Vision Transformers (timm, DINO, iBOT, DINOv2, fine-tuned MAE, Hugging Face's Dinov2Model) as one-input models of ours.

Attention does not care for order, so the class token is our global token, which comes last. Its own position row is added to
it, and the remaining rows are the input's position table. DINOv2's LayerScale multiplies what a block adds, which is the
same as multiplying the kernel and bias before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from maskvit import modalities as known
from maskvit.convert.reader import ConversionError
from maskvit.convert.rules import Rule, block, layer_norm, linear, patch_projection, reshaped, same

# What stands before the encoder's own keys: data-parallel and self-distillation wrappers.
PREFIXES = ("module.backbone.", "backbone.", "module.", "")
# Tensors that are not part of the encoder, and why they are left out. Keys as in the file, after "module.".
DROPPED = (
    (r"head\.(mlp\.\d+\.\w+|last_layer2?\.\w+)", "the projection head of self-distillation"),
    (r"(backbone\.)?(mask_token|masked_embed|embeddings\.mask_token)", "the token of hidden patches in pretraining"),
    (r"decoder\.(upconv|bn)\d\.\w+|decoder\.final_conv\.\w+", "a saliency decoder"),
)
# Hugging Face's names of a Dinov2Model, in timm's. Query, key and value are joined afterwards.
HUGGING_FACE = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"encoder\.layer\.(\d+)\.(norm[12]|mlp\.fc[12])\.(\w+)", r"blocks.\1.\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(\w+)", r"blocks.\1.attn.\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"layernorm\.(\w+)", r"norm.\1"),
)
# What a LayerScale multiplies.
SCALED = {"ls1": "attn.proj", "ls2": "mlp.fc2"}


def _prefix(keys: Any) -> str | None:
    """What stands before the encoder's keys; None where they are not those of a ViT."""
    for prefix in PREFIXES:
        if f"{prefix}cls_token" in keys and f"{prefix}patch_embed.proj.weight" in keys:
            return prefix
        if f"{prefix}embeddings.cls_token" in keys and f"{prefix}embeddings.patch_embeddings.projection.weight" in keys:
            return prefix
    return None


def is_vit(keys: Any) -> bool:
    """Whether these are the keys of an encoder alone: a class token, a patch projection, and no decoder of masked modelling."""
    return _prefix(keys) is not None and not any("decoder_pos_embed" in key or "cross_attn" in key for key in keys)


def tensors(state: Mapping[str, np.ndarray], where: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """The encoder's tensors under timm's names, class token and first position row joined as "global_token", LayerScale folded.

    Also says, line by line, what was done. ConversionError where a tensor is of no known use.
    """
    prefix = _prefix(state)
    assert prefix is not None, "only for what is_vit"
    said: list[str] = []
    found: dict[str, np.ndarray] = {}
    left: dict[str, list[str]] = {}
    for key, value in state.items():
        reason = next((why for pattern, why in DROPPED if re.fullmatch(pattern, key.removeprefix("module."))), None)
        if reason:
            left.setdefault(reason, []).append(key)
        elif key.startswith(prefix):
            found[key.removeprefix(prefix)] = value
        else:
            raise ConversionError(f"{where}: {key!r} stands outside the encoder ({prefix}...) and is of no known use")
    said += [f"left out {why}: {len(keys)} tensors, {keys[0]} among them" for why, keys in left.items()]
    if prefix:
        said.append(f"keys of the encoder without their prefix {prefix!r}")
    if "register_tokens" in found or "embeddings.register_tokens" in found:
        raise ConversionError(f"{where}: has register tokens; give the file of the model without registers")
    if "embeddings.cls_token" in found:
        found = _from_hugging_face(found, where)
        said.append("Hugging Face's names; queries, keys and values joined")
    _fold_layer_scale(found, where, said)
    _join_class_token(found, where)
    return found, said


def _from_hugging_face(found: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    renamed: dict[str, np.ndarray] = {}
    for key, value in found.items():
        name = next((re.sub(f"^{old}$", new, key) for old, new in HUGGING_FACE if re.fullmatch(old, key)), None)
        if name is None:
            raise ConversionError(f"{where}: {key!r} is not part of this model")
        renamed[name] = value
    for key in [key for key in renamed if ".attn.query." in key]:
        three = [key.replace("query", part) for part in ("query", "key", "value")]
        missing = [name for name in three if name not in renamed]
        if missing:
            raise ConversionError(f"{where}: tensors are missing: {missing[0]}")
        renamed[key.replace("query", "qkv")] = np.concatenate([renamed.pop(name) for name in three])
    return renamed


def _fold_layer_scale(found: dict[str, np.ndarray], where: str, said: list[str]) -> None:
    """gamma * (W x + b) = (gamma W) x + gamma b. In place."""
    gammas = [key for key in found if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", key)]
    blocks = {key.split(".")[1] for key in found if key.startswith("blocks.")}
    if gammas and len(gammas) != 2 * len(blocks):
        raise ConversionError(f"{where}: {len(gammas)} LayerScale vectors for {len(blocks)} blocks; two in each expected")
    for key in gammas:
        start, scale = key.removesuffix(".gamma").rsplit(".", 1)
        gamma = found.pop(key).astype(np.float32)
        for part in ("weight", "bias"):
            name = f"{start}.{SCALED[scale]}.{part}"
            if name not in found or found[name].shape[0] != gamma.size:
                raise ConversionError(f"{where}: {key!r} of shape {gamma.shape} does not fit {name!r}")
            value = found[name].astype(np.float32)
            found[name] = gamma.reshape(-1, *(1,) * (value.ndim - 1)) * value
    if gammas:
        said.append(f"LayerScale of {len(blocks)} blocks folded into proj and fc2")


def _join_class_token(found: dict[str, np.ndarray], where: str) -> None:
    """`cls_token` and the first row of `pos_embed` to "global_token"; the other rows stay. In place."""
    if "pos_embed" not in found:
        raise ConversionError(f"{where}: looks like a ViT, but lacks 'pos_embed'")
    token, positions = found.pop("cls_token"), found["pos_embed"]
    if positions.ndim != 3 or positions.shape[1] < 2 or token.shape != (1, 1, positions.shape[2]):
        raise ConversionError(f"{where}: 'cls_token' {token.shape} and 'pos_embed' {positions.shape} do not fit each other")
    found["global_token"] = token.astype(np.float32)[0] + positions.astype(np.float32)[0, :1]
    found["pos_embed"] = positions[:, 1:]


def infer_config(found: Mapping[str, np.ndarray], where: str, num_heads: int | None = None) -> dict[str, Any]:
    """The config of the model whose `tensors` these are."""

    def shape(key: str, axes: int) -> tuple[int, ...]:
        if key not in found:
            raise ConversionError(f"{where}: looks like a ViT, but lacks {key!r}")
        if found[key].ndim != axes or 0 in found[key].shape:
            raise ConversionError(f"{where}: {key!r} has the shape {found[key].shape}; {axes} axes expected, none of them empty")
        return found[key].shape

    _, positions, width = shape("pos_embed", 3)
    _, channels, patch, columns = shape("patch_embed.proj.weight", 4)
    side = math.isqrt(positions)
    if side**2 != positions or patch != columns:
        raise ConversionError(f"{where}: {positions} positions and patches of {patch} x {columns}: only square grids and patches are known")
    if num_heads is None and width % 64:
        raise ConversionError(f"{where}: the width {width} is no multiple of 64: give --num-heads")
    heads = width // 64 if num_heads is None else num_heads
    if heads < 1 or width % heads:
        raise ConversionError(f"{where}: the width {width} does not divide into {heads} heads; --num-heads says how many there are")
    depth = len({key.split(".")[1] for key in found if key.startswith("blocks.")})
    encoder = dict(width=width, depth=depth, heads=heads, mlp_ratio=shape("blocks.0.mlp.fc1.weight", 2)[0] / width)
    rgb = {**known.RGB, "patch": patch} if channels == 3 else dict(kind="continuous", channels=channels, patch=patch)
    objective = dict(
        name="multimae",
        inputs=("rgb",),
        outputs=(),
        encoder=encoder,
        num_global_tokens=1,
        num_visible=max(round(positions / 6), 1),
        final_norm="norm.weight" in found or "fc_norm.weight" in found,
        num_classes=shape("head.weight", 2)[0] if "head.weight" in found else 0,
        pool="mean" if "fc_norm.weight" in found else "global",
    )
    return dict(image_size=(side * patch, side * patch), modalities=dict(rgb=rgb), objective=objective)


def rules(config: Mapping[str, Any]) -> list[Rule]:
    """Every one of the `tensors` of the model that `config` describes."""
    objective, rgb = config["objective"], config["modalities"]["rgb"]
    encoder = objective["encoder"]
    width, patch = encoder["width"], rgb["patch"]
    rows, columns = (side // patch for side in config["image_size"])
    found = [
        same("global_token", "global_tokens", (1, width)),
        reshaped("pos_embed", "inputs/rgb/pos_embed", (1, rows * columns, width), (rows, columns, width)),
        *patch_projection("patch_embed.proj", "inputs/rgb/proj", rgb["channels"], patch, width),
    ]
    for i in range(encoder["depth"]):
        found += block(f"blocks.{i}", f"encoder/block_{i:02d}", width, round(width * encoder["mlp_ratio"]))
    if objective["final_norm"]:
        found += layer_norm("fc_norm" if objective["pool"] == "mean" else "norm", "norm", width)
    if objective["num_classes"]:
        found += linear("head", "head", width, objective["num_classes"])
    return found
