"""MAE and CrossMAE with their decoders: the key layouts of their own code, and Hugging Face's of MAE.

Class token and encoder positions as in `vit`. A decoder's position table has a row of zeros for the class token, which is not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from maskvit.convert.reader import ConversionError
from maskvit.convert.rules import BlockNames, Rule, block, layer_norm, linear, position_rows, reshaped, same
from maskvit.convert.source import Hints, Source
from maskvit.convert.vit import TIMM, Form, Names, encoder_rules, infer_sizes, layout_of

MASK_RATIO = 0.75
# MAE's own decoder, for encoders that come without.
DECODER = dict(name="mae", width=512, depth=8, heads=16, mlp_ratio=4.0)


def is_mae(keys: Any) -> bool:
    """Whether these are the keys of a MAE with its decoder."""
    names = layout_of(keys)
    return names is not None and names.decoder_positions in keys and not is_crossmae(keys)


def is_crossmae(keys: Any) -> bool:
    """Whether these are the keys of a CrossMAE with its decoder."""
    return layout_of(keys) == TIMM and "decoder_blocks.0.cross_attn.q.weight" in keys


def infer_config(source: Source, hints: Hints) -> dict[str, Any]:
    """The config of the model in a file, with the objective "mae" or "crossmae"."""
    where, found = source.where, source.tensors
    form, image_size, rgb, encoder = infer_sizes(source, hints)
    names, cross = form.names, is_crossmae(found)
    if not form.class_token or not form.class_row:
        raise ConversionError(f"{where}: looks like {source.family}, but lacks {names.cls_token!r}, or its row in {names.positions!r}")
    width = source.shape(names.mask_token, 3)[2]
    blocks = names.decoder_blocks
    at = blocks.count(".") + 1
    decoder = dict(
        name="crossmae" if cross else "mae",
        width=width,
        depth=len({key.split(".")[at] for key in found if key.startswith(blocks + ".")}),
        heads=hints.decoder_heads(width, where),
        mlp_ratio=source.shape(f"{blocks}.0.{names.block.fc1}.weight", 2)[0] / width,
    )
    ratio = hints.args.get("mask_ratio")
    objective = dict(
        name="crossmae" if cross else "mae",
        inputs=("rgb",),
        outputs=("norm_rgb" if hints.normalized(where) else "rgb",),
        encoder=encoder,
        decoder=decoder,
        mask_ratio=ratio if isinstance(ratio, float) and 0 < ratio < 1 else MASK_RATIO,
    )
    if cross:
        decoder |= _features(crossing_of(source), encoder["depth"], hints.args, where)
    return dict(image_size=image_size, modalities=dict(rgb=rgb), objective=objective)


def infer_config_with_fresh_decoder(source: Source, hints: Hints) -> dict[str, Any]:
    """The config of a MAE with the usual decoder around the encoder in a file, which lacks the decoder's tensors."""
    _, image_size, rgb, encoder = infer_sizes(source, hints)
    output = "norm_rgb" if hints.normalized(source.where) else "rgb"
    objective = dict(name="mae", inputs=("rgb",), outputs=(output,), encoder=encoder, decoder=dict(DECODER), mask_ratio=MASK_RATIO)
    return dict(image_size=image_size, modalities=dict(rgb=rgb), objective=objective)


class Crossing(NamedTuple):
    """What a CrossMAE's decoder has: how many features of the encoder it weighs (0: no weights), and self-attention or not."""

    features: int = 0
    self_attention: bool = False


def crossing_of(source: Source) -> Crossing:
    """Of the decoder in a file."""
    features = source.shape("wfm.linear.weight", 2)[1] if "wfm.linear.weight" in source.tensors else 0
    return Crossing(features, "decoder_blocks.0.self_attn.qkv.weight" in source.tensors)


def _features(crossing: Crossing, depth: int, args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of our decoder that say so. `args`: what the file says of its training, for features that are chosen."""
    found: dict[str, Any] = dict(self_attention=True) if crossing.self_attention else {}
    blocks, use_input = args.get("use_fm"), args.get("use_input")
    if not crossing.features:
        return found | dict(weighted=False)
    if crossing.features == depth + 1:
        return found
    if crossing.features == depth:
        return found | dict(use_input=False)
    if isinstance(blocks, list) and all(type(i) is int for i in blocks) and crossing.features == len(blocks) + bool(use_input):
        return found | dict(features=tuple(blocks), use_input=bool(use_input))
    raise ConversionError(
        f"{where}: its decoder weighs {crossing.features} features of an encoder of {depth} blocks, and the file does not say which: "
        f"without that only {depth + 1} (with the input embedding) or {depth} are known"
    )


def rules(config: Mapping[str, Any], names: Names = TIMM) -> list[Rule]:
    """Every tensor of the MAE that `config` describes."""
    return encoder_rules(config, Form(names)) + _decoder_rules(config, names)


def cross_rules(config: Mapping[str, Any], crossing: Crossing) -> list[Rule]:
    """Every tensor of the CrossMAE that `config` describes."""
    return encoder_rules(config) + _cross_decoder_rules(config, crossing)


def _ends(config: Mapping[str, Any], names: Names, path: str) -> tuple[list[Rule], list[Rule]]:
    """What stands before and behind a decoder's blocks."""
    objective, rgb = config["objective"], config["modalities"]["rgb"]
    narrow, patch = objective["decoder"]["width"], rgb["patch"]
    rows, columns = (side // patch for side in config["image_size"])
    before = [
        reshaped(names.mask_token, f"{path}/mask_token", (1, 1, narrow), (narrow,)),
        position_rows(names.decoder_positions, f"{path}/pos_embed", (rows, columns), narrow, class_row=True),
    ]
    behind = layer_norm(names.decoder_norm, f"{path}/norm", narrow)
    # Patch vectors are ordered (row, column, channel) there as here.
    return before, behind + linear(names.decoder_head, f"{path}/head", narrow, rgb.get("channels", 3) * patch**2)


def _decoder_rules(config: Mapping[str, Any], names: Names) -> list[Rule]:
    objective = config["objective"]
    (output,), width, decoder = objective["outputs"], objective["encoder"]["width"], objective["decoder"]
    path, narrow = f"outputs/{output}", decoder["width"]
    before, behind = _ends(config, names, path)
    found = [*layer_norm(names.norm, "norm", width), *before, *linear(names.decoder_embed, f"{path}/context_proj", width, narrow)]
    hidden = round(narrow * decoder.get("mlp_ratio", 4.0))
    for i in range(decoder["depth"]):
        found += block(f"{names.decoder_blocks}.{i}", f"{path}/block_{i:02d}", narrow, hidden, names.block)
    return found + behind


def _cross_decoder_rules(config: Mapping[str, Any], crossing: Crossing) -> list[Rule]:
    objective = config["objective"]
    (output,), width, decoder = objective["outputs"], objective["encoder"]["width"], objective["decoder"]
    path, narrow, depth = f"outputs/{output}", decoder["width"], decoder["depth"]
    found, behind = _ends(config, TIMM, path)
    if crossing.features:
        found.append(same("wfm.linear.weight", f"{path}/feature_weights", (depth, crossing.features)))
    for i in range(depth):
        found += layer_norm(f"dec_norms.{i}", f"{path}/context_norm_{i:02d}", width)
    names, hidden = BlockNames(), round(narrow * decoder.get("mlp_ratio", 4.0))
    for i in range(depth):
        key, ours = f"decoder_blocks.{i}", f"{path}/block_{i:02d}"
        if crossing.self_attention:
            found += layer_norm(f"{key}.norm0", f"{ours}/norm0", narrow)
            found += linear(f"{key}.self_attn.qkv", f"{ours}/self_attn/qkv", narrow, 3 * narrow)
            found += linear(f"{key}.self_attn.proj", f"{ours}/self_attn/proj", narrow, narrow)
        found += layer_norm(f"{key}.{names.norm1}", f"{ours}/norm1", narrow)
        found += linear(f"{key}.cross_attn.q", f"{ours}/cross_attn/q", narrow, narrow)
        found += linear(f"{key}.cross_attn.kv", f"{ours}/cross_attn/kv", width, 2 * narrow)
        found += linear(f"{key}.cross_attn.proj", f"{ours}/cross_attn/proj", narrow, narrow)
        found += layer_norm(f"{key}.{names.norm2}", f"{ours}/norm2", narrow)
        found += linear(f"{key}.{names.fc1}", f"{ours}/mlp/fc1", narrow, hidden)
        found += linear(f"{key}.{names.fc2}", f"{ours}/mlp/fc2", hidden, narrow)
    return found + behind
