"""Plain Vision Transformers (timm, DINO, iBOT, DINOv2, fine-tuned MAE, Hugging Face's ViT and Dinov2) as one-input models of ours.

Attention does not care for order, so the class token is our global token, which comes last. Its own position row is added to
it, and the remaining rows are the input's position table. DINOv2's LayerScale multiplies what a block adds, which is the
same as multiplying the kernel and bias before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from maskvit.convert.reader import ConversionError
from maskvit.convert.rules import (
    BlockNames,
    Rule,
    block,
    layer_norm,
    linear,
    patch_projection,
    position_rows,
    reshaped,
)
from maskvit.convert.source import Hints, Source
from maskvit.core import modalities as known


class Names(NamedTuple):
    """What a layout calls the parts of a ViT, and of MAE's decoder behind it."""

    cls_token: str = "cls_token"
    positions: str = "pos_embed"
    patches: str = "patch_embed.proj"
    blocks: str = "blocks"
    block: BlockNames = BlockNames()
    norm: str = "norm"
    pooled_norm: str = "fc_norm"
    head: str = "head"
    mask_token: str = "mask_token"
    decoder_positions: str = "decoder_pos_embed"
    decoder_embed: str = "decoder_embed"
    decoder_blocks: str = "decoder_blocks"
    decoder_norm: str = "decoder_norm"
    decoder_head: str = "decoder_pred"


TIMM = Names()
_HUGGING_FACE = Names(
    cls_token="embeddings.cls_token",
    positions="embeddings.position_embeddings",
    patches="embeddings.patch_embeddings.projection",
    blocks="encoder.layer",
    norm="layernorm",
    head="classifier",
    mask_token="decoder.mask_token",
    decoder_positions="decoder.decoder_pos_embed",
    decoder_embed="decoder.decoder_embed",
    decoder_blocks="decoder.decoder_layers",
    decoder_norm="decoder.decoder_norm",
    decoder_head="decoder.decoder_pred",
)
_THREE = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
# Files at Hugging Face, and ViTModel and ViTMAEModel of transformers before 5.
HUGGING_FACE = _HUGGING_FACE._replace(
    block=BlockNames("layernorm_before", _THREE, "attention.output.dense", "layernorm_after", "intermediate.dense", "output.dense")
)
# What transformers 5 calls the same tensors in memory.
HUGGING_FACE_5 = _HUGGING_FACE._replace(
    blocks="layers",
    block=BlockNames(
        "layernorm_before", tuple(f"attention.{x}_proj" for x in "qkv"), "attention.o_proj", "layernorm_after", "mlp.fc1", "mlp.fc2"
    ),
)
DINOV2 = _HUGGING_FACE._replace(
    block=BlockNames(qkv=_THREE, proj="attention.output.dense", scale1="layer_scale1.lambda1", scale2="layer_scale2.lambda1")
)
LAYOUTS = (TIMM, HUGGING_FACE, HUGGING_FACE_5, DINOV2)

# Tensors that are not part of the encoder, and why they are left out.
LEFT_OUT = (
    (r"((dino|ibot)_)?head\.(mlp\.\d+\.\w+|last_layer2?\.\w+)", "the projection head of self-distillation"),
    (r"mask_token|masked_embed|embeddings\.mask_token", "the token of hidden patches in pretraining"),
    (r"(.*\.)?position_ids", "indices of positions"),
    (r"pooler\.dense\.\w+", "a pooler behind the class token"),
    (r"decoder\.(upconv|bn)\d\.\w+|decoder\.final_conv\.\w+", "a saliency decoder"),
)


def layout_of(keys: Any) -> Names | None:
    """The layout that these keys are of; None where they are not those of a ViT."""
    for names in LAYOUTS:
        if f"{names.patches}.weight" in keys and f"{names.blocks}.0.{names.block.norm1}.weight" in keys:
            return names
    return next((names for names in LAYOUTS if f"{names.patches}.weight" in keys and names.cls_token in keys), None)


def is_vit(keys: Any) -> bool:
    """Whether these are the keys of an encoder alone: a patch projection and blocks, and no decoder of masked modeling."""
    return layout_of(keys) is not None and not any("decoder_pos_embed" in key or "cross_attn" in key for key in keys)


def names_of(source: Source) -> Names:
    """The layout of a file whose keys `layout_of` knows."""
    names = layout_of(source.tensors)
    assert names is not None, "only for what layout_of knows"
    return names


class Form(NamedTuple):
    """How a file holds a ViT.

    Attributes:
      names: what it calls the parts.
      class_token: whether it has one.
      class_row: whether its position table has a row for the class token.
      scaled: whether its blocks have LayerScale.
    """

    names: Names = TIMM
    class_token: bool = True
    class_row: bool = True
    scaled: bool = False


def form_of(source: Source, grid: tuple[int, int]) -> Form:
    """The form of a file whose keys `layout_of` knows; `grid`: rows and columns of its position table."""
    names, found, where = names_of(source), source.tensors, source.where
    _, rows, width = source.shape(names.positions, 3)
    class_token = names.cls_token in found
    if class_token and found[names.cls_token].shape != (1, 1, width):
        shapes = f"{names.cls_token!r} {found[names.cls_token].shape} and {names.positions!r} {found[names.positions].shape}"
        raise ConversionError(f"{where}: {shapes} do not fit each other")
    scales = (names.block.scale1, names.block.scale2)
    gammas = [key for key in found if key.startswith(names.blocks + ".") and key.endswith(scales)]
    depth = len(_blocks(source, names))
    if gammas and len(gammas) != 2 * depth:
        raise ConversionError(f"{where}: {len(gammas)} LayerScale vectors for {depth} blocks; two in each expected")
    return Form(names, class_token, class_token and rows == 1 + math.prod(grid), bool(gammas))


def _blocks(source: Source, names: Names) -> set[str]:
    """The numbers of the blocks in a file."""
    return {key.split(".")[names.blocks.count(".") + 1] for key in source.tensors if key.startswith(names.blocks + ".")}


class Sizes(NamedTuple):
    """What the shapes of a ViT and the hints say: its form, image size (height, width), modality rgb, and block `encoder`."""

    form: Form
    image_size: tuple[int, int]
    rgb: dict[str, Any]
    encoder: dict[str, Any]


def infer_sizes(source: Source, hints: Hints) -> Sizes:
    """The sizes of the ViT in a file."""
    where, names = source.where, names_of(source)
    if any("register_tokens" in key or key in ("reg_token", "dist_token") for key in source.tensors):
        raise ConversionError(f"{where}: has register or distillation tokens; give the file of the model without them")
    _, rows, width = source.shape(names.positions, 3)
    _, channels, patch, columns = source.shape(f"{names.patches}.weight", 4)
    if patch != columns:
        raise ConversionError(f"{where}: has patches of {patch} x {columns}: only square patches are known")
    grid = hints.grid_of(rows, patch, names.cls_token in source.tensors, where)
    form = form_of(source, grid)
    hidden = source.shape(f"{names.blocks}.0.{names.block.fc1}.weight", 2)[0]
    encoder = dict(width=width, depth=len(_blocks(source, names)), heads=hints.heads(width, where), mlp_ratio=hidden / width)
    statistics = hints.statistics(channels, where)
    rgb = {**(known.RGB if channels == 3 else dict(kind="continuous", channels=channels)), "patch": patch, **statistics}
    return Sizes(form, (grid[0] * patch, grid[1] * patch), rgb, encoder)


def grid_in(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the tokens of the modality rgb in a config."""
    patch = config["modalities"]["rgb"]["patch"]
    return config["image_size"][0] // patch, config["image_size"][1] // patch


def infer_config(source: Source, hints: Hints) -> dict[str, Any]:
    """The config of the encoder in a file: the objective "multimae" without outputs."""
    form, image_size, rgb, encoder = infer_sizes(source, hints)
    names, found = form.names, source.tensors
    pooled = f"{names.pooled_norm}.weight" in found
    classes = source.shape(f"{names.head}.weight", 2)[0] if f"{names.head}.weight" in found else 0
    if classes and not form.class_token and not pooled:
        raise ConversionError(
            f"{source.where}: its classifier reads the mean of normed tokens ({names.norm}.*, no {names.pooled_norm}.*), which no model "
            f"here does; leave it out with --allow '{names.head}\\..*'"
        )
    objective = dict(
        name="multimae",
        inputs=("rgb",),
        outputs=(),
        encoder=encoder,
        num_global_tokens=int(form.class_token),
        num_visible=max(round(image_size[0] * image_size[1] / rgb["patch"] ** 2 / 6), 1),
        final_norm=f"{names.norm}.weight" in found or pooled,
        num_classes=classes,
        pool="mean" if pooled else "global",
    )
    return dict(image_size=image_size, modalities=dict(rgb=rgb), objective=objective)


def joined_class_token(names: Names, width: int, grid: tuple[int, int]) -> Rule:
    """Class token and position table with its row: our global token is their sum, and is written back with a row of zeros."""
    rows = 1 + grid[0] * grid[1]
    return Rule(
        (names.cls_token, names.positions),
        ((1, 1, width), (1, rows, width)),
        ("global_tokens", "inputs/rgb/pos_embed"),
        lambda token, table: (token[0] + table[0, :1], table[0, 1:].reshape(*grid, width)),
        lambda token, table: (token[None], np.concatenate([np.zeros((1, width), table.dtype), table.reshape(-1, width)])[None]),
    )


def learned_positions(names: Names, width: int, grid: tuple[int, int]) -> list[Rule]:
    """Class token and position table where both are trained on: the class token's row stays apart."""
    table = Rule(
        (names.positions,),
        ((1, 1 + grid[0] * grid[1], width),),
        ("global_pos_embed", "inputs/rgb/learned_pos_embed"),
        lambda x: (x[0, :1], x[0, 1:].reshape(*grid, width)),
        lambda row, rows: (np.concatenate([row, rows.reshape(-1, width)])[None],),
    )
    return [reshaped(names.cls_token, "global_tokens", (1, 1, width), (1, width)), table]


def encoder_rules(config: Mapping[str, Any], form: Form = Form(), learned: bool = False) -> list[Rule]:  # noqa: B008
    """Class token, positions, patch projection and blocks. `learned`: for models that train their positions (DINO, iBOT)."""
    encoder, rgb, names = config["objective"]["encoder"], config["modalities"]["rgb"], form.names
    width, patch = encoder["width"], rgb["patch"]
    rows, columns = (side // patch for side in config["image_size"])
    grid = rows, columns
    if learned:
        found = learned_positions(names, width, grid)
    elif form.class_row:
        found = [joined_class_token(names, width, grid)]
    else:
        found = [position_rows(names.positions, "inputs/rgb/pos_embed", grid, width, class_row=False)]
        if form.class_token:
            found.append(reshaped(names.cls_token, "global_tokens", (1, 1, width), (1, width)))
    found += patch_projection(names.patches, "inputs/rgb/proj", rgb["channels"], patch, width)
    hidden = round(width * encoder.get("mlp_ratio", 4.0))
    for i in range(encoder["depth"]):
        found += block(f"{names.blocks}.{i}", f"encoder/block_{i:02d}", width, hidden, names.block, form.scaled)
    return found


def rules(config: Mapping[str, Any], form: Form = Form(), learned: bool = False) -> list[Rule]:  # noqa: B008
    """Every tensor of the model that `config` describes, in timm's order."""
    objective, names = config["objective"], form.names
    width = objective["encoder"]["width"]
    found = encoder_rules(config, form, learned)
    if objective.get("final_norm", False):
        found += layer_norm(names.pooled_norm if objective.get("pool") == "mean" else names.norm, "norm", width)
    if objective.get("num_classes", 0):
        found += linear(names.head, "head", width, objective["num_classes"])
    return found
