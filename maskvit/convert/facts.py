"""What a file, or what lies beside it, says of a model: training arguments, config files of Hugging Face and timm, our own notes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskvit.convert.formats import ConversionError
from maskvit.convert.reader import is_file, read_json, read_stated
from maskvit.convert.stand_ins import Inert
from maskvit.heads.segmenter import SegmenterHead

# Our own notes: an entry of a .pth, a text in a .safetensors file.
OWN = "maskvit"
LICENCE = "weights_licence"  # there, the licence that the checkpoint recorded
DECLARED = "declared_modalities"  # there, inputs and what is answered per pixel, as the config declares them
# What files call their settings.
SETTINGS = (OWN, "args", "hyper_parameters", "hparams", "config", "cfg", "model_args", "model_config", "opt", "pretrained_cfg")
CONFIG, PREPROCESSING = "config.json", ("preprocessor_config.json", "processor_config.json")
OPEN_CLIP = "open_clip_config.json"
MODEL_TYPES = ("vit", "vit_mae", "dinov2")
# Of these names a file's own settings may say something of the input; "scale" there is mostly that of random crops.
STATISTICS = ("rgb_mean", "rgb_std", "rgb_scale")


def settings_in(content: Any) -> dict[str, Any]:
    """The training arguments in a file, the first to say something wins."""
    found: dict[str, Any] = {}
    for name in SETTINGS:
        part = content.get(name) if isinstance(content, Mapping) else None
        facts = _plain(part)
        if "mean" in facts and "std" in facts:
            facts |= statistics(facts["mean"], facts["std"], None)
        found = {**facts, **found}
    return found


def _plain(part: Any) -> dict[str, Any]:
    """The entries of a mapping, or of the stand-in for an object that holds settings (omegaconf keeps them in `_content`)."""
    if isinstance(part, Inert):
        inside = part.facts.get("_content")
        part = {**part.facts, **(inside if isinstance(inside, Mapping) else {})}
    if not isinstance(part, Mapping):
        return {}
    value = lambda x: x.facts.get("_val", x) if isinstance(x, Inert) else x  # noqa: E731
    return {key: value(entry) for key, entry in part.items() if isinstance(key, str)}


def statistics(mean: Any, std: Any, scale: Any) -> dict[str, Any]:
    """Mean, deviation and scale of an input where they are numbers that can be; else nothing.

    `scale` None: values run to 1 where the mean is that of such values, else as they are stored (to 255).
    """
    mean, std = (tuple(x) if isinstance(x, (list, tuple)) else (x,) for x in (mean, std))
    if not all(_is_number(x) for x in mean + std) or not mean or not std or not all(x > 0 for x in std):
        return {}
    if scale is None:
        scale = 1.0 if max(map(abs, mean)) > 2 else 1 / 255
    if not _is_number(scale) or scale <= 0:
        return {}
    return dict(rgb_mean=tuple(map(float, mean)), rgb_std=tuple(map(float, std)), rgb_scale=float(scale))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e6


def facts_beside(path: Path) -> tuple[dict[str, Any], list[str], list[str]]:
    """(what the file's own notes and the files beside it say, from which files, what is to be said of those that are of no use)."""
    found: dict[str, Any] = {}
    files: list[str] = []
    said: list[str] = []
    own = read_stated(path).get(OWN)
    if own is not None:
        try:
            noted = json.loads(own)
        except (ValueError, RecursionError):
            noted = None
        found |= _plain(noted)
        files.append(f"{path.name} itself") if found else None
    for name, read in ((CONFIG, _of_config), (OPEN_CLIP, _of_open_clip), *((name, _of_preprocessing) for name in PREPROCESSING)):
        beside = path.parent / name
        if not is_file(beside):
            continue
        try:
            content = read_json(beside)
        except ConversionError as error:
            said.append(f"{str(error).removeprefix(f'{path.parent}/')}: not used")
            continue
        facts = read(content, beside) if isinstance(content, dict) else {}
        if facts:
            files.append(name)
            found = {**facts, **found}
        elif name in PREPROCESSING:
            said.append(f"{name}: holds no mean and deviation that could be used")
    return found, files, said


def _of_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Hugging Face's config.json of one of the models here, or timm's."""
    if config.get("model_type") in MODEL_TYPES or ("model_type" in config and "hidden_size" in config):
        if config.get("hidden_act", "gelu") != "gelu":
            raise ConversionError(f"{path}: hidden_act is {config['hidden_act']!r}; models here have 'gelu'")
        return config
    if "architecture" not in config:
        return {}
    inside = next((config[name] for name in ("pretrained_cfg", "default_cfg") if isinstance(config.get(name), dict)), config)
    facts = statistics(inside.get("mean"), inside.get("std"), 1 / 255)
    return facts | {name: inside[name] for name in ("input_size",) if name in inside}


def _of_open_clip(config: dict[str, Any], _: Path) -> dict[str, Any]:
    inside = config.get("preprocess_cfg")
    return statistics(inside.get("mean"), inside.get("std"), 1 / 255) if isinstance(inside, dict) else {}


def _of_preprocessing(config: dict[str, Any], _: Path) -> dict[str, Any]:
    """Hugging Face's image processors: (stored value * rescale_factor - image_mean) / image_std."""
    inside = config.get("image_processor")
    config = inside if isinstance(inside, dict) else config
    scale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    if config.get("do_normalize", True) is False:
        return statistics(0.0, 1.0, scale)
    return statistics(config.get("image_mean"), config.get("image_std"), scale)


def own_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What our exports note of a model, which its tensors do not show; read back by `facts_beside` and `settings_in`."""
    objective, rgb = config["objective"], config["modalities"].get("rgb", {})
    size, decoder, inputs = config["image_size"], objective.get("decoder") or {}, tuple(objective.get("inputs") or ())
    found: dict[str, Any] = dict(image_size=[size, size] if isinstance(size, int) else list(size), num_heads=objective["encoder"]["heads"])
    if objective.get("outputs") and "heads" in decoder:
        found["decoder_num_heads"] = decoder["heads"]
    if objective.get("outputs") and objective.get("name") in ("mae", "crossmae"):
        found |= dict(norm_pix_loss=objective["outputs"][0].startswith("norm_"))
    task = objective.get("task") or {}
    if task:
        found |= dict(use_mean_pooling=objective["pool"] == "all", decoder_main_tasks=list(objective.get("read_from") or inputs[:1]))
    names = [name for name in (*inputs, task.get("target")) if name in config["modalities"]]
    found[DECLARED] = {name: dict(config["modalities"][name]) for name in names}
    if (head := objective.get("head") or {}).get("name") == "segmenter":
        found["segmenter_heads"] = head.get("heads", SegmenterHead.heads)
    if "mask_ratio" in objective:
        found["mask_ratio"] = objective["mask_ratio"]
    return found | dict(rgb_mean=list(rgb["mean"]), rgb_std=list(rgb["std"]), rgb_scale=rgb["scale"]) if "mean" in rgb else found
