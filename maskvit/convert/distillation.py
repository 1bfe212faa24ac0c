"""DINO and iBOT (AttMask) with both models and their projection heads.

Their positions are learned, so the class token's row stays apart. A shared head of iBOT stands twice in its files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from maskvit.convert.reader import ConversionError
from maskvit.convert.rules import Rule, layer_norm, linear, reshaped, tied, transposed
from maskvit.convert.source import Hints, Source
from maskvit.convert.vit import TIMM, encoder_rules, infer_sizes


def is_distilled(keys: Any) -> bool:
    """Whether these are the keys of a DINO or iBOT model with its projection head."""
    return {"patch_embed.proj.weight", "cls_token", "head.mlp.0.weight", "head.last_layer.weight_v"} <= set(keys)


def is_ibot(keys: Any) -> bool:
    """Whether a distilled model is iBOT's: a head for patches, or a token for hidden ones."""
    return "head.last_layer2.weight_v" in keys or "masked_embed" in keys


def infer_config(source: Source, hints: Hints) -> dict[str, Any]:
    """The config of the student in a file, with the objective "dino" or "ibot"."""
    form, image_size, rgb, encoder = infer_sizes(source, hints)
    found, where = source.tensors, source.where
    if form.names != TIMM or not form.class_row or form.scaled:
        raise ConversionError(f"{where}: has a projection head, but not the encoder of DINO or iBOT")
    hidden, _ = source.shape("head.mlp.0.weight", 2)
    prototypes, bottleneck = source.shape("head.last_layer.weight_v", 2)
    projection: dict[str, Any] = dict(hidden=hidden, bottleneck=bottleneck, num_prototypes=prototypes)
    if type(hints.args.get("norm_last_layer")) is bool:
        projection["fixed_scale"] = hints.args["norm_last_layer"]
    objective = dict(name="ibot" if is_ibot(found) else "dino", inputs=("rgb",), encoder=encoder, projection=projection)
    if is_ibot(found):
        shared = hints.args.get("shared_head")
        twice = [(f"head.last_layer.{part}", f"head.last_layer2.{part}") for part in ("weight_g", "weight_v")]
        if type(shared) is not bool:
            shared = all(np.array_equal(found.get(a, 0), found.get(b, 1)) for a, b in twice)
        projection["num_patch_prototypes"] = 0 if shared else source.shape("head.last_layer2.weight_v", 2)[0]
    return dict(image_size=image_size, modalities=dict(rgb=rgb), objective=objective)


def rules(config: Mapping[str, Any], teacher: bool = False) -> list[Rule]:
    """Every tensor of the student that `config` describes, or of its teacher, which has no token for hidden patches."""
    objective = config["objective"]
    width, projection, ibot = objective["encoder"]["width"], objective["projection"], objective["name"] == "ibot"
    found = encoder_rules(config, learned=True)
    if ibot and not teacher:
        found.append(reshaped("masked_embed", "inputs/rgb/mask_embed", (1, width), (width,)))
    found += layer_norm("norm", "norm", width)
    hidden, bottleneck = projection["hidden"], projection["bottleneck"]
    for key, path, (features_in, features_out) in (
        ("head.mlp.0", "projection/fc1", (width, hidden)),
        ("head.mlp.2", "projection/fc2", (hidden, hidden)),
        ("head.mlp.4", "projection/fc3", (hidden, bottleneck)),
    ):
        found += linear(key, path, features_in, features_out)
    last = _prototypes("head.last_layer", "projection/prototypes", bottleneck, projection["num_prototypes"])
    patches = projection.get("num_patch_prototypes", 0)
    if ibot and not patches:
        return found + [tied((rule.keys[0], rule.keys[0].replace("last_layer", "last_layer2")), rule) for rule in last]
    if ibot:
        last += _prototypes("head.last_layer2", "projection/patch_prototypes", bottleneck, patches)
    return found + last


def _prototypes(key: str, path: str, bottleneck: int, count: int) -> list[Rule]:
    """A weight-normalized linear layer without bias."""
    scale = reshaped(f"{key}.weight_g", f"{path}/scale", (count, 1), (count,))
    return [scale, transposed(f"{key}.weight_v", f"{path}/kernel", (count, bottleneck))]


def center_rules(config: Mapping[str, Any]) -> list[Rule]:
    """The running means of the teacher's outputs, a part of the loss."""
    projection = config["objective"]["projection"]
    count = projection["num_prototypes"]
    found = [reshaped("center", "center", (1, count), (count,))]
    if config["objective"]["name"] == "ibot":
        patches = projection.get("num_patch_prototypes", 0) or count
        found.append(reshaped("center2", "patch_center", (1, 1, patches), (patches,)))
    return found
