"""MultiMAE's key layout: recognize a file, read the sizes off its shapes, and the rules to and from our parameters.

MultiViT is its encoder with the input adapters, without decoders.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maskvit.convert.reader import ConversionError
from maskvit.convert.rules import Rule, block, layer_norm, linear, patch_head, patch_projection, position_map, reshaped, same
from maskvit.convert.source import Hints, Source
from maskvit.core import modalities as known
from maskvit.core.modalities import parse_modalities
from maskvit.nn.backbone import VARIANTS, encoder_sizes

FIRST_INPUTS = ("rgb", "depth", "semseg")
DECLARED = {"rgb": known.RGB, "depth": known.DEPTH, "semseg": known.SEMSEG}
ENCODER_NAMES = {"pretrain_multimae_base": "B", "pretrain_multimae_large": "L"}
# MultiMAE's own decoders, for encoders that come without.
DECODER = dict(width=256, depth=2, heads=8, mlp_ratio=4.0)


def is_multimae(keys: Any) -> bool:
    """Whether these are the keys of a MultiMAE pretraining model."""
    return is_multivit(keys) and any(k.startswith("output_adapters.") for k in keys)


def is_multivit(keys: Any) -> bool:
    """Whether these are the keys of MultiMAE's encoder with its input adapters, decoders or not."""
    return "global_tokens" in keys and any(k.startswith("input_adapters.") for k in keys)


def _parts(keys: Any, prefix: str) -> list[str]:
    return list(dict.fromkeys(key.split(".")[1] for key in keys if key.startswith(prefix + ".")))


def _count(keys: Any, pattern: str) -> int:
    numbers = {match[1] for key in keys if (match := re.match(pattern, key))}
    return len(numbers)  # of what is numbered with gaps the rules find the strangers


def infer_config(source: Source, hints: Hints) -> dict[str, Any]:
    """The config of the model in a file: `image_size`, `modalities` and `objective`, as `objectives.build_objective` takes them.

    A MultiViT becomes a MultiMAE with the usual decoders for all its inputs, whose tensors the file then lacks.
    """
    state = source.tensors
    inputs, image_size, modalities = read_inputs(source, hints)
    outputs = _parts(state, "output_adapters")
    outputs = [n for n in inputs if n in outputs or not outputs] + sorted(n for n in outputs if n not in inputs)
    _check_names(outputs, source.where)
    for name in outputs:
        if name not in modalities and name.removeprefix("norm_") not in modalities:
            raise ConversionError(f"{source.where}: output {name!r} belongs to none of the inputs {', '.join(inputs)}")
    encoder = read_encoder(source, hints)
    decoder = _decoder(source, hints, outputs[0]) if is_multimae(state) else dict(DECODER)
    objective = dict(
        name="multimae", inputs=tuple(inputs), outputs=tuple(outputs), encoder=encoder, decoder=decoder,
        num_global_tokens=source.shape("global_tokens", 3)[1],
    )  # fmt: skip
    tokens = sum(math.prod(source.shape(f"input_adapters.{name}.pos_emb", 4)[2:]) for name in inputs)
    visible = hints.args.get("num_encoded_tokens")
    objective["num_visible"] = visible if type(visible) is int and 1 <= visible <= tokens else max(round(tokens / 6), 1)
    return dict(image_size=image_size, modalities=modalities, objective=objective)


def _check_names(names: Sequence[str], where: str) -> None:
    odd = [name for name in names if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]
    if odd:
        raise ConversionError(f"{where}: a modality is named {odd[0]!r}; letters, digits, - and _ only")


def read_inputs(source: Source, hints: Hints) -> tuple[list[str], tuple[int, ...], dict[str, Any]]:
    """(the inputs in the order of their tokens, (height, width) of the image, their declarations as in a config)."""
    state, where = source.tensors, source.where
    inputs = _parts(state, "input_adapters")
    inputs = [n for n in FIRST_INPUTS if n in inputs] + sorted(n for n in inputs if n not in FIRST_INPUTS)
    _check_names(inputs, where)
    projections = {name: source.shape(f"input_adapters.{name}.proj.weight", 4) for name in inputs}
    grids = {name: source.shape(f"input_adapters.{name}.pos_emb", 4)[2:] for name in inputs}
    # The modality with the finest pixels per token has the image's own resolution.
    finest = max(inputs, key=lambda name: projections[name][2] * grids[name][0])
    image_size = tuple(side * projections[finest][2] for side in grids[finest])
    modalities: dict[str, Any] = {}
    for name in inputs:
        _, channels, patch_pixels, columns = projections[name]
        rows = grids[name]
        if patch_pixels != columns or image_size[0] % rows[0] or (image_size[0] // rows[0]) % patch_pixels:
            raise ConversionError(
                f"{where}: modality {name!r} has patches of {patch_pixels} x {columns} pixels on a grid of {rows}: not square or not even"
            )
        patch = image_size[0] // rows[0]
        fields: dict[str, Any] = dict(patch=patch, stride=patch // patch_pixels)
        if f"input_adapters.{name}.class_emb.weight" in state:
            classes, embed = source.shape(f"input_adapters.{name}.class_emb.weight", 2)
            fields |= dict(kind="categorical", num_classes=classes, embed_dim=embed, loss="cross_entropy")
        else:
            fields |= dict(kind="continuous", channels=channels)
        if noted := hints.declared(name, fields, where):
            modalities[name] = noted | (dict(hints.rgb) if name == "rgb" else {})
            continue
        declared = DECLARED.get(name, {})
        alike = all(declared.get(field) == fields.get(field) for field in ("kind", "channels"))
        modalities[name] = {**declared, **fields} if alike else fields
        if not alike and name == "rgb":
            modalities[name] |= hints.statistics(channels, where)
        elif not alike and fields["kind"] == "continuous":
            change = f"config.modalities.{name}.scale, mean and std change it"
            hints.said.append(f"assumed: values of {name!r} are read as they are stored; {change}")
    return inputs, image_size, modalities


def read_encoder(source: Source, hints: Hints) -> dict[str, Any]:
    """Sizes of the encoder."""
    width = source.shape("global_tokens", 3)[2]
    variant = ENCODER_NAMES.get(str(hints.args.get("model")))
    return dict(
        width=width,
        depth=_count(source.tensors, r"encoder\.(\d+)\."),
        heads=hints.heads(width, source.where, VARIANTS[variant]["heads"] if variant else None),
        mlp_ratio=source.shape("encoder.0.mlp.fc1.weight", 2)[0] / width,
    )


def _decoder(source: Source, hints: Hints, output: str) -> dict[str, Any]:
    """Sizes of the decoders, as the first of them has them."""
    first = f"output_adapters.{output}"
    width = source.shape(f"{first}.mask_token", 3)[2]
    return dict(
        width=width,
        depth=_count(source.tensors, rf"{re.escape(first)}\.decoder_transformer\.(\d+)\."),
        heads=hints.decoder_heads(width, source.where),
        mlp_ratio=source.shape(f"{first}.mlp.fc1.weight", 2)[0] / width,
    )


def rules(config: Mapping[str, Any]) -> list[Rule]:
    """Every tensor of the model that `config` describes, in the reference's order; a MultiViT's where it has no outputs."""
    specs = parse_modalities(config["modalities"])
    objective, size = config["objective"], tuple(config["image_size"])
    encoder, decoder = encoder_sizes(objective["encoder"]), {**DECODER, **objective.get("decoder", {})}
    width, inputs, outputs = encoder["width"], tuple(objective["inputs"]), tuple(objective["outputs"])
    num_global = objective.get("num_global_tokens", 1)
    found: list[Rule] = [reshaped("global_tokens", "global_tokens", (1, num_global, width), (num_global, width))]
    for name in inputs:
        spec, key, path = specs[name], f"input_adapters.{name}", f"inputs/{name}"
        found.append(position_map(f"{key}.pos_emb", f"{path}/pos_embed", spec.grid(size), width))
        channels = spec.channels
        if spec.kind == "categorical":
            channels = spec.embed_dim
            found.append(same(f"{key}.class_emb.weight", f"{path}/class_embed", (spec.num_classes, spec.embed_dim)))
        found += patch_projection(f"{key}.proj", f"{path}/proj", channels, spec.patch_pixels, width)
    narrow, hidden = decoder["width"], round(decoder["width"] * decoder.get("mlp_ratio", 4.0))
    for name in outputs:
        spec, key, path = specs[name if name in specs else name.removeprefix("norm_")], f"output_adapters.{name}", f"outputs/{name}"
        found.append(reshaped(f"{key}.mask_token", f"{path}/mask_token", (1, 1, narrow), (narrow,)))
        found.append(position_map(f"{key}.pos_emb", f"{path}/pos_embed", spec.grid(size), narrow))
        found += [
            reshaped(f"{key}.task_embeddings.{other}", f"{path}/modality_embed/{other}", (1, 1, narrow), (narrow,))
            for other in sorted(inputs)
        ]
        found += linear(f"{key}.decoder.q", f"{path}/cross_attn/q", narrow, narrow)
        found += linear(f"{key}.decoder.kv", f"{path}/cross_attn/kv", narrow, 2 * narrow)
        found += linear(f"{key}.decoder.proj", f"{path}/cross_attn/proj", narrow, narrow)
        for norm in ("context_norm", "query_norm", "out_norm"):
            found += layer_norm(f"{key}.{norm}", f"{path}/{norm}", narrow)
        found += linear(f"{key}.mlp.fc1", f"{path}/mlp/fc1", narrow, hidden)
        found += linear(f"{key}.mlp.fc2", f"{path}/mlp/fc2", hidden, narrow)
        for i in range(decoder["depth"]):
            found += block(f"{key}.decoder_transformer.{i}", f"{path}/block_{i:02d}", narrow, hidden)
        channels = spec.num_classes if spec.kind == "categorical" else spec.channels
        found += patch_head(f"{key}.out_proj", f"{path}/head", channels, spec.patch_pixels, narrow)
        found += linear(f"{key}.proj_context", f"{path}/context_proj", width, narrow)
    for i in range(encoder["depth"]):
        found += block(f"encoder.{i}", f"encoder/block_{i:02d}", width, round(width * encoder.get("mlp_ratio", 4.0)))
    return found


def adam_by_key(optimizer: Mapping[str, Any], state: Mapping[str, np.ndarray], where: str, others: int = 0) -> dict[str, Any] | None:
    """AdamW's moments of a training checkpoint by tensor name: {"count", "mu", "nu"}; None where no step was taken.

    The optimizer numbers the model's parameters in state-dict order, the frozen position tables left out; `others` more
    that are not the model's (learned loss weights) come after them and are left out.
    """
    names = [key for key in state if not key.endswith(".pos_emb")]
    try:
        numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
        entries = optimizer["state"]
        if not entries:
            return None
        if len(numbers) != len(names) + others or set(entries) != set(numbers):
            raise ConversionError(f"{where}: the optimizer has {len(entries)} states for {len(names)} trained tensors")
        numbers = numbers[: len(names)]
        strangers = {kind for number in numbers for kind in entries[number]} - {"step", "exp_avg", "exp_avg_sq"}
        if strangers:
            raise ConversionError(f"{where}: its 'optimizer' is not AdamW's: it also holds {sorted(map(str, strangers))}")
        counts = {float(np.asarray(entries[number]["step"])) for number in numbers}
        if any(not 0 <= count < 2**31 for count in counts):
            raise ConversionError(f"{where}: the optimizer's step counts are no counts: {sorted(counts)[:4]}")
        if len(counts) != 1:
            raise ConversionError(f"{where}: the optimizer's tensors have taken different numbers of steps: {sorted(counts)}")
        if not all(isinstance(entries[number][kind], np.ndarray) for number in numbers for kind in ("exp_avg", "exp_avg_sq")):
            raise ConversionError(f"{where}: its 'optimizer' is not AdamW's: a moment is no tensor")
        moments = {kind: {name: entries[n][kind] for name, n in zip(names, numbers, strict=True)} for kind in ("exp_avg", "exp_avg_sq")}
    except ConversionError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ConversionError(f"{where}: its 'optimizer' is not AdamW's ({type(error).__name__}: {error})") from error
    return {"count": int(counts.pop()), "mu": moments["exp_avg"], "nu": moments["exp_avg_sq"]}
